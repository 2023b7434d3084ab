"""vmm.faults.lan: a LAN in parts, and the faults of machines' network cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.net_guest import MachineNetGuest
from vmm import Machine, MachineConfig, StateError, UsageError
from vmm.faults import partition

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

MIB = 1 << 20
ALL = b"\xff" * 6


class Member:
    """A machine on LANs, and its first card's driver."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.guest = MachineNetGuest(machine, buffers=40)
        self.mac = bytes(self.guest.nic.config[:6])

    def send(self, number: int, to: bytes = ALL) -> bytes:
        data = to + self.mac + b"\x88\xb5" + bytes((number,)) * 46
        self.guest.send(data)
        return data

    def heard(self) -> int:
        """The number of the next frame that arrives. What a partition keeps back never comes: a
        frame that was sent later is the next."""
        return self.guest.frame(0x88B5, within=60)[14]


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Callable[..., list[Member]]]:
    machines: list[Machine] = []

    def make(*nets: str) -> list[Member]:
        found = []
        for each in nets:
            config = MachineConfig(
                tiny.kernel(tmp_path, tiny.SPIN), memory=32 * MIB, nets=each.split()
            )
            machines.append(Machine(config))
            machines[-1].start()
            found.append(Member(machines[-1]))
        return found

    yield make
    for machine in machines:
        machine.close()


def test_each_hears_its_own_part(members: Callable[..., list[Member]]) -> None:
    a, b, c = members(*["lan=one"] * 3)
    with partition([a.machine, b.machine], [c.machine]) as fault:
        a.send(1)
        c.send(2)
        c.send(3, to=a.mac)
        assert b.heard() == 1
        assert fault.active
    b.send(4)
    assert (a.heard(), c.heard()) == (4, 4)
    c.send(5)
    assert (a.heard(), b.heard()) == (5, 5)
    for member in (a, b, c):
        said = [str(event) for event in member.machine.faults.log]
        assert said == [
            "fault: lan one partition set: machines=[2, 1]",
            "fault: lan one partition cleared: struck=0",
        ]
        assert member.machine.event_log[-1].to_dict()["device"] == "lan one"


def test_those_not_named_are_a_part(members: Callable[..., list[Member]]) -> None:
    a, b, c, d = members(*["lan=one"] * 4)
    lost = partition(a.machine)
    a.send(1)
    b.send(2)
    assert (c.heard(), d.heard()) == (2, 2)
    with partition([b.machine, a.machine], c.machine):  # both hold
        b.send(3)
        c.send(4)
        d.send(5)
    lost.clear()
    d.send(6)
    assert (a.heard(), b.heard(), c.heard()) == (6, 6, 6)


def test_a_machine_may_end_meanwhile(members: Callable[..., list[Member]]) -> None:
    a, b, c = members(*["lan=one"] * 3)
    fault = partition([a.machine], [b.machine], [c.machine])
    a.machine.close()
    b.send(1)
    fault.clear()
    b.send(2)
    assert c.heard() == 2
    assert len(c.machine.faults.log) == 2


def test_which_lan(members: Callable[..., list[Member]]) -> None:
    a, b, c = members("lan=one lan=two", "lan=two lan=one", "lan=one")
    with pytest.raises(UsageError, match="the machines share 'one', 'two'; say lan="):
        partition(a.machine, b.machine)
    with partition(a.machine, b.machine, lan="two") as fault:
        assert fault.device == "lan two"
    with partition(a.machine, c.machine) as fault:
        assert fault.device == "lan one"
    with pytest.raises(UsageError, match=r'do not share lan=two; nets=\["lan=NAME"\] makes one'):
        partition(a.machine, c.machine, lan="two")


def test_wrong_uses(members: Callable[..., list[Member]]) -> None:
    [a] = members("lan=one")
    with Machine(MachineConfig(memory=2 * MIB)) as alone:
        with pytest.raises(UsageError, match="the machines do not share a LAN"):
            partition(a.machine, alone)
        with pytest.raises(UsageError, match=r"faults.net\(0\): there is no such; .* has none"):
            alone.faults.net(0)
    with pytest.raises(UsageError, match=r"no machines; say partition\(\[a, b\], \[c\]\)"):
        partition([])
    with pytest.raises(UsageError, match="a machine is in two parts"):
        partition([a.machine], a.machine)
    with pytest.raises(UsageError, match="3 is not a machine"):
        partition([3])  # type: ignore[list-item]


# --- a machine's cards ----------------------------------------------------------------------------


def test_frames_of_a_machine(members: Callable[..., list[Member]]) -> None:
    a, b = members("lan=one", "lan=one")
    faults = a.machine.faults
    assert faults.net(0) is faults.net()
    with faults.net(0).loss(nth=2, direction="tx") as fault:
        for number in range(1, 4):
            a.send(number)
        assert (b.heard(), b.heard()) == (1, 3)
    assert list(fault.log) == [{"frame": 2, "direction": "tx", "size": 60}]
    assert [str(event) for event in a.machine.event_log if event.name == "fault"][1] == (
        "fault: net0 loss struck: frame=2, direction=tx, size=60"
    )
    faults.net(0).delay(0.01)
    a.machine.pause()
    b.send(7)
    a.machine.resume()
    assert a.heard() == 7
    faults.clear()
    assert faults.active == ()


def test_close_while_frames_wait(members: Callable[..., list[Member]]) -> None:
    a, b = members("lan=one", "lan=one")
    for member in (a, b):
        member.machine.faults.net(0).delay(0.001, jitter=100_000)
    for number in range(30):
        a.send(number)
        b.send(number)
    a.machine.close()
    b.machine.close()
    with pytest.raises(StateError, match="faults of net0: the machine is closed"):
        a.machine.faults.net(0).loss()
