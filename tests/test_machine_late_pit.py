"""vmm.machine.late_pit: a guest finds the same i8254 as where KVM has it from the start."""

import pytest

from vmm import Machine, MachineConfig
from vmm.boot import registers
from vmm.boot.state import BootState
from vmm.layout import MIB

pytestmark = pytest.mark.needs_kvm

RESULT = 0x3000
CONTROL, SPEAKER = 0x43, 0x61


def out(port: int, value: int) -> bytes:
    return bytes((0xB0, value, 0xE6, port))


def keep(port: int, index: int) -> bytes:
    """in al, port; mov [RESULT + index], al"""
    return bytes((0xE4, port, 0xA2)) + (RESULT + index).to_bytes(4, "little")


def status_of(channel: int, index: int) -> bytes:
    """The read-back command for the status byte, which has mode and access in its low 6 bits."""
    return out(CONTROL, 0xE0 | 2 << channel) + keep(0x40 + channel, index)


def run(code: bytes, *, early: bool, size: int) -> tuple[bytes, Machine]:
    with Machine(MachineConfig(memory=4 * MIB, timeout=60)) as machine:
        if early:
            machine.platform.pit.create()
        assert machine.platform.pit.created is early
        machine.memory.write(MIB, code + out(0xF4, 0) + b"\xf4")
        registers.set_up(machine.vcpus[0], BootState("pvh32", MIB, rsp=0x8000))
        machine.start()
        assert machine.wait().kind == "exit-port"
        return machine.memory.read(RESULT, size), machine


@pytest.mark.parametrize(
    ("code", "size", "masks"),
    [
        pytest.param(out(CONTROL, 0x34) + status_of(0, 0), 1, [0x3F], id="mode 2, both bytes"),
        pytest.param(out(CONTROL, 0x3E) + status_of(0, 0), 1, [0x3F], id="mode 7 is mode 3"),
        pytest.param(out(CONTROL, 0x71) + status_of(1, 0), 1, [0x3F], id="channel 1, BCD"),
        pytest.param(
            out(CONTROL, 0x92) + out(0x42, 0x55) + status_of(2, 0), 1, [0x3F], id="channel 2, LSB"
        ),
        pytest.param(
            # Gate low: the counter holds still, so what was loaded is what is read.
            out(SPEAKER, 0)
            + out(CONTROL, 0xB6)
            + out(0x42, 0x34)
            + out(0x42, 0x12)
            + status_of(2, 0),
            1,
            [0x3F],
            id="speaker port first",
        ),
        pytest.param(out(SPEAKER, 1) + keep(SPEAKER, 0), 1, [0x01], id="gate on"),
        pytest.param(out(SPEAKER, 3) + keep(SPEAKER, 0), 1, [0x03], id="gate and speaker on"),
        pytest.param(keep(SPEAKER, 0) + keep(SPEAKER, 1), 2, [0x03, 0x03], id="speaker port read"),
        pytest.param(
            keep(0x40, 0) + out(CONTROL, 0x30) + status_of(0, 1), 2, [0, 0x3F], id="counter read"
        ),
        pytest.param(
            out(0x40, 7) + out(CONTROL, 0x30) + status_of(0, 0), 1, [0x3F], id="counter written"
        ),
        pytest.param(
            out(CONTROL, 0xC4) + out(CONTROL, 0x14) + status_of(0, 0), 1, [0x3F], id="read back"
        ),
        pytest.param(
            out(CONTROL, 0x00) + out(CONTROL, 0x14) + status_of(0, 0), 1, [0x3F], id="latch"
        ),
    ],
)
def test_the_first_access_counts(code: bytes, size: int, masks: list[int]) -> None:
    late, machine = run(code, early=False, size=size)
    early, _ = run(code, early=True, size=size)
    assert machine.platform.pit.created
    assert [a & m for a, m in zip(late, masks, strict=True)] == [
        a & m for a, m in zip(early, masks, strict=True)
    ]


def test_it_is_not_made_for_a_guest_that_has_no_use_for_it() -> None:
    _, machine = run(b"\x90", early=False, size=1)
    assert not machine.platform.pit.created


def test_only_the_first_access_exits() -> None:
    _, machine = run(out(CONTROL, 0x34) + out(0x40, 0) * 20, early=False, size=1)
    assert machine._threads[0].exits == 2  # and the exit port
