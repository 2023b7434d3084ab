"""Functions of the program at ports and addresses of a guest."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import GuestMemoryError, Machine, MachineConfig, StateError, UsageError
from vmm.machine import exits
from vmm.snapshot import capture

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(120)]

Make = Callable[..., Machine]
GPA = 0xD8000000
IN = b"\xec"  # in al, dx
IN16, OUT16 = b"\x66\xed", b"\x66\xef"
IN32 = b"\xed"


def mov_dx(port: int) -> bytes:
    return b"\x66\xba" + struct.pack("<H", port)


def load(gpa: int) -> bytes:
    """mov eax, [gpa]."""
    return b"\xa1" + struct.pack("<I", gpa)


def store(gpa: int, value: int) -> bytes:
    """mov dword ptr [gpa], value."""
    return b"\xc7\x05" + struct.pack("<II", gpa, value)


EXIT_AL = b"\xe6\xf4" + tiny.HALT  # out 0xf4, al


@pytest.fixture
def machine(tmp_path: Path) -> Make:
    def make(code: bytes, **options: object) -> Machine:
        values: dict[str, object] = {"memory": 16 << 20, **options}
        return Machine(MachineConfig(tiny.kernel(tmp_path, code), **values))  # type: ignore[arg-type]

    return make


def status(m: Machine) -> int:
    m.start()
    return m.wait(60).status


def test_ports(machine: Make) -> None:
    """Reads AX at the base, writes it plus one two ports on, ends with what a byte read gives."""
    code = mov_dx(0x1510) + IN16 + b"\x66\x40" + mov_dx(0x1512) + OUT16
    written: list[tuple[int, int, int]] = []
    reads: list[tuple[int, int]] = []

    def read(offset: int, size: int) -> int:
        reads.append((offset, size))
        return 0x1233 if size == 2 else 77

    with machine(code + IN + EXIT_AL) as m:
        m.bind_port(0x1510, 4, read=read, write=lambda *what: written.append(what))
        assert status(m) == 77
    assert reads == [(0, 2), (2, 1)]
    assert written == [(2, 2, 0x1234)]


def test_addresses(machine: Make) -> None:
    written: list[tuple[int, int, int]] = []
    code = store(GPA + 8, 0xCAFEF00D) + load(GPA + 4)
    with machine(code + EXIT_AL) as m:
        m.bind_mmio(
            GPA, 16, read=lambda offset, size: 40 + offset, write=lambda *w: written.append(w)
        )
        assert status(m) == 44
    assert written == [(8, 4, 0xCAFEF00D)]


def test_one_side_alone(machine: Make) -> None:
    written: list[int] = []
    code = mov_dx(0x1510) + IN + tiny.out(0x1511, 3) + EXIT_AL
    with machine(code) as m:
        m.bind_port(0x1510, write=lambda offset, size, value: written.append(value))
        m.bind_port(0x1511, read=lambda offset, size: 0)
        assert status(m) == 3
    with machine(mov_dx(0x1510) + IN + EXIT_AL) as m:
        m.bind_port(0x1510, write=lambda offset, size, value: written.append(value))
        assert status(m) == 0xFF  # nobody answers reads
    assert written == []


def test_bound_and_unbound_while_paused(machine: Make) -> None:
    """The guest reads the port over and over, and stops where it reads 9."""
    again = IN + b"\x3c\x09"  # cmp al, 9
    loop = again + b"\x75" + struct.pack("b", -len(again) - 2)  # jne
    with machine(mov_dx(0x1510) + loop + EXIT_AL) as m:
        values = iter([1, 2])
        seen: list[int] = []

        def read(offset: int, size: int) -> int:
            seen.append(next(values, 0))
            return seen[-1]

        m.start()
        m.pause()
        unbind = m.bind_port(0x1510, read=read)
        m.resume()
        while len(seen) < 10:
            assert m.state == "running"
        with pytest.raises(StateError, match=r"unbinding port 0x1510.* is running"):
            unbind()
        m.pause()
        unbind()
        unbind()
        before = len(seen)
        m.bind_port(0x1510, read=lambda offset, size: 9)
        m.resume()
        assert m.wait(60).status == 9
        assert len(seen) == before
        unbind()
    unbind()


@pytest.mark.one_lane
@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("kind", ["port", "mmio"])
def test_what_a_function_raises_ends_the_machine(machine: Make, kind: str, side: str) -> None:
    def broken(*arguments: int) -> int:
        raise KeyError(arguments[0])

    codes = {
        ("port", "read"): mov_dx(0x1510) + IN,
        ("port", "write"): tiny.out(0x1510, 5),
        ("mmio", "read"): load(GPA),
        ("mmio", "write"): store(GPA, 5),
    }
    with machine(codes[kind, side] + tiny.exits(0)) as m:
        functions = {side: broken}
        if kind == "port":
            m.bind_port(0x1510, **functions)
        else:
            m.bind_mmio(GPA, 4, **functions)
        m.start()
        ended = m.wait(60)
    assert (ended.kind, ended.message) == (exits.MONITOR_ERROR, "monitor error: KeyError: 0")
    size = 1 if kind == "port" else 4
    call = f"read(0, {size})" if side == "read" else f"write(0, {size}, 0x5)"
    where = "port 0x1510..0x1510" if kind == "port" else "mmio 0xd8000000..0xd8000003"
    assert f"in the function bound to {where}, called as {call}" in ended.report
    assert "in broken" in ended.report


@pytest.mark.one_lane
@pytest.mark.parametrize("value", [256, -1, None, "x", 1.0])
def test_what_is_no_answer_ends_the_machine(machine: Make, value: object) -> None:
    with machine(mov_dx(0x1510) + IN + tiny.exits(0)) as m:
        m.bind_port(0x1510, read=lambda offset, size: value)  # type: ignore[arg-type,return-value]
        m.start()
        assert m.wait(60).message == (
            "monitor error: the function bound to port 0x1510..0x1510: read(0, 1) returned "
            f"{value!r}, not a number of 8 bits"
        )


@pytest.mark.one_lane
@pytest.mark.parametrize(
    ("port", "size", "says"),
    [
        (0x3F0, 16, "bind_port: port: port 0x3f0..0x3ff at .* overlaps .* at 0x3f8..0x3ff"),
        (0x21, 1, "bind_port: 0x21..0x21 overlaps KVM's PIC at 0x20..0x21"),
        (0x40, 1, "bind_port: port: .* overlaps pit at 0x40..0x43"),
        (0xF4, 1, "bind_port: port: .* overlaps .*exit.* at 0xf4..0xf4"),
        (0x1510, 0, "bind_port 0x1510: 0 from there is not within 0 to 0xffff"),
        (-1, 1, "bind_port -0x1: 1 from there is not within"),
        (0xFFFF, 2, "bind_port 0xffff: 2 from there is not within 0 to 0xffff"),
    ],
)  # fmt: skip
def test_ports_that_are_taken(machine: Make, port: int, size: int, says: str) -> None:
    with machine(tiny.HALT) as m, pytest.raises(UsageError, match=says):
        m.bind_port(port, size, read=lambda offset, size: 0)


@pytest.mark.one_lane
@pytest.mark.parametrize(
    ("gpa", "size", "options", "says"),
    [
        (0x1000, 16, {}, "overlaps the guest's RAM at 0x0..0xffffff"),
        (0xFFF000, 0x2000, {}, "overlaps the guest's RAM"),
        (0xFEC00000, 4, {}, "overlaps KVM's IOAPIC at 0xfec00000..0xfec00fff"),
        (0xFEE00000, 4, {}, "overlaps KVM's local APICs"),
        (0xFFFBC000, 4, {}, "overlaps KVM's own pages"),
        (0xCFFFFFFC, 8, {"rng": True}, r"overlaps rng at 0xd0000000\.\."),
        (0xC0000000, 4, {"transport": "pci"}, "overlaps the guest's window for PCI BARs"),
        (0xE0000000, 4, {"transport": "pci"}, "mmio: .* overlaps .* at 0xe0000000..0xe00fffff"),
        ((1 << 64) - 1, 2, {}, "is not within 0 to 0xffffffffffffffff"),
    ],
)
def test_addresses_that_are_taken(
    machine: Make, gpa: int, size: int, options: dict[str, object], says: str
) -> None:
    with machine(tiny.HALT, **options) as m, pytest.raises(UsageError, match=says):
        m.bind_mmio(gpa, size, read=lambda offset, size: 0)


@pytest.mark.one_lane
def test_one_over_another_and_none_at_all(machine: Make) -> None:
    with machine(tiny.HALT) as m:
        m.bind_port(0x1510, 2, read=lambda offset, size: 0)
        with pytest.raises(UsageError, match=r"overlaps port 0x1510\.\.0x1511 at 0x1510"):
            m.bind_port(0x1511, 2, read=lambda offset, size: 0)
        with pytest.raises(UsageError, match="bind_port 0x1600: give it read=, write= or both"):
            m.bind_port(0x1600)


@pytest.mark.one_lane
@pytest.mark.parametrize("state", ["running", "stopped", "closed"])
def test_only_while_nothing_runs(machine: Make, state: str) -> None:
    with machine(tiny.HALT) as m:
        m.start()
        if state != "running":
            m.stop()
        if state == "closed":
            m.close()
        for bind in (m.bind_port, m.bind_mmio):
            with pytest.raises(StateError, match=f"the machine is {state}, not created or paused"):
                bind(0xD8000000, 4, read=lambda offset, size: 0)
        if state == "closed":
            with pytest.raises(GuestMemoryError, match="is gone: the memory is closed"):
                m.memory.read(0, 4)


@pytest.mark.one_lane
def test_the_state_of_a_machine_is_without_them(machine: Make) -> None:
    with machine(tiny.HALT) as m, machine(tiny.HALT) as other:
        m.bind_port(0x1510, read=lambda offset, size: 0)
        state = capture.capture(m)
        assert not any("1510" in name for name in state["devices"])
        capture.apply(other, state)
        other.bind_port(0x1510, 2, read=lambda offset, size: 0)
        capture.apply(other, state)
