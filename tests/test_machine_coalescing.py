"""vmm/machine/coalescing.py: console output that causes no exits comes out whole and in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import Machine, MachineConfig
from vmm.layout import MIB
from vmm.machine.coalescing import THRESHOLD

pytestmark = pytest.mark.needs_kvm

LINE_CONTROL = 0x3FB
DLAB = 0x80
Make = Callable[..., Machine]


@pytest.fixture
def machine(tmp_path: Path) -> Make:
    def make(code: bytes, **options: object) -> Machine:
        kernel = tiny.kernel(tmp_path, code)
        return Machine(MachineConfig(kernel, memory=4 * MIB, timeout=120, **options))  # type: ignore[arg-type]

    return make


def counting(size: int) -> bytes:
    """Prints `size` bytes that count down, each 64th a newline (it makes the UART let go of them).

    mov ecx, size; mov dx, 0x3f8; 1: mov al, cl; and al, 0x3f; add al, 0x0a; out dx, al
    dec ecx; jnz 1b
    """
    return (
        b"\xb9" + size.to_bytes(4, "little") + bytes.fromhex("66baf803 88c8 243f 040a ee 49 75f6")
    )


def counted(size: int) -> bytes:
    return bytes((number & 0x3F) + 0x0A for number in range(size, 0, -1))


def is_on() -> bool:
    return any(thread.name == "vmm-coalesced" for thread in threading.enumerate())


@pytest.mark.parametrize("size", [1, THRESHOLD - 1, THRESHOLD, THRESHOLD + 1, 1000, 20000])
def test_all_output_before_the_end_comes_out(machine: Make, size: int) -> None:
    with machine(counting(size) + tiny.POWEROFF + tiny.HALT) as guest:
        guest.start()
        assert guest.wait().kind == "poweroff"
        assert guest.console.bytes() == counted(size)
    assert not is_on()


@pytest.mark.parametrize(("size", "on"), [(THRESHOLD - 1, False), (THRESHOLD, True)])
def test_it_begins_with_a_guest_that_prints(machine: Make, size: int, on: bool) -> None:
    with machine(counting(size - 4) + tiny.prints(b"end\n") + tiny.SPIN) as guest:
        guest.start()
        guest.console.wait_for("end\n", timeout=60)
        assert guest.console.position == size
        if on:
            deadline = time.monotonic() + 60
            while not is_on():
                assert time.monotonic() < deadline
        assert is_on() is on
    assert not is_on()


@pytest.mark.parametrize("end", [tiny.SPIN, tiny.HALT], ids=["spins", "halts"])
def test_output_no_exit_follows_is_brought_out(machine: Make, end: bytes) -> None:
    """Nobody asks for it here: `position` looks at nothing but what has come."""
    with machine(counting(3000) + tiny.prints(b"\n") + end) as guest:
        guest.start()
        deadline = time.monotonic() + 60
        while guest.console.position < 3001:
            assert time.monotonic() < deadline, guest.console.position
            time.sleep(0.01)
        assert guest.console.bytes() == counted(3000) + b"\n"


def test_a_paused_machine_has_given_all_its_output(machine: Make) -> None:
    with machine(counting(2000) + tiny.COUNTING) as guest:
        guest.start()
        deadline = time.monotonic() + 60
        while not guest.memory.read_u32(tiny.COUNTER):
            assert time.monotonic() < deadline
        guest.pause()
        assert guest.console.bytes() == counted(2000)
        guest.resume()
        assert guest.stop().kind == "stopped"


def test_writes_keep_their_order_with_other_registers(machine: Make) -> None:
    """The same port is the divisor's low byte while DLAB is set: that is not output."""
    code = counting(1000)
    code += tiny.out(LINE_CONTROL, DLAB | 3) + tiny.out(0x3F8, 0x01) + tiny.out(LINE_CONTROL, 3)
    code += tiny.prints(b"end") + tiny.exits(4)
    with machine(code) as guest:
        guest.start()
        assert guest.wait().status == 4
        assert guest.console.bytes() == counted(1000) + b"end"
        # The divisor arrived where it was meant for.
        uart = guest.platform.uart
        uart.write(3, 1, DLAB | 3)
        assert uart.read(0, 1) == 1


def test_with_several_processors(machine: Make) -> None:
    with machine(counting(5000) + tiny.POWEROFF + tiny.HALT, cpus=3) as guest:
        guest.start()
        assert guest.wait().kind == "poweroff"
        assert guest.console.bytes() == counted(5000)


def test_a_machine_stopped_in_the_middle_leaves_no_thread(machine: Make) -> None:
    # mov dx, 0x3f8; 1: mov al, 'x'; out dx, al; mov al, 10; out dx, al; jmp 1b
    with machine(bytes.fromhex("66baf803 b078 ee b00a ee ebf8")) as guest:
        guest.start()
        guest.console.wait_for("x\n" * 1000, timeout=60)
        assert is_on()
        assert guest.stop().kind == "stopped"
        assert set(guest.console.bytes()) == set(b"x\n")
    assert not is_on()


def polling(size: int) -> bytes:
    """As `counting`, with a look at LSR before each byte, whose values it ANDs in BL.

    mov ecx, size; mov bl, 0xff; 1: mov dx, 0x3fd; in al, dx; and bl, al; mov dx, 0x3f8
    mov al, cl; and al, 0x3f; add al, 0x0a; out dx, al; dec ecx; jnz 1b
    """
    return (
        b"\xb9"
        + size.to_bytes(4, "little")
        + bytes.fromhex("b3ff 66bafd03 ec 20c3 66baf803 88c8 243f 040a ee 49 75eb")
    )


def test_a_look_at_lsr_need_not_empty_the_ring(machine: Make) -> None:
    """Sent, whatever is still in the ring: and all of it comes out, in order."""
    end = bytes.fromhex("88d8 e6f4")  # mov al, bl; out 0xf4, al
    with machine(polling(5000) + end + tiny.HALT) as guest:
        guest.start()
        assert guest.wait().status == 0x60  # THRE and TEMT, each time
        assert guest.console.bytes() == counted(5000)


def test_input_is_not_lost_on_a_driver_that_prints(machine: Make) -> None:
    """A byte that waits shows in LSR also while writes are in the ring: once the guest receives."""
    source = bytes.fromhex(
        "66bafc03 b003 ee"  # MCR: DTR and RTS, it receives
    )
    end = bytes.fromhex(
        "66bafd03 ec a801 74f7"  # 1: mov dx, 0x3fd; in al, dx; test al, 1; jz 1b
        "66baf803 ec e6f4"  # in al, [0x3f8]; out 0xf4, al
    )
    with machine(source + polling(3000) + end + tiny.HALT) as guest:
        guest.start()
        guest.platform.uart.receive(b"K")
        assert guest.wait().status == ord("K")
        assert guest.console.bytes() == counted(3000)
