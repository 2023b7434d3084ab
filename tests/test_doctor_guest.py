"""vmm/doctor/guest.py: tiny guests run, end in time whatever they do, and leave nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from vmm.doctor.guest import _KICK, GuestFailed, TinyGuest
from vmm.kvm import Kvm

pytestmark = pytest.mark.needs_kvm

LIMIT = 20.0
"""Seconds; only an emulated host comes near it."""
OUT_42 = bytes.fromhex("b02a e6f4")  # mov al, 42; out 0xf4, al
FOREVER = bytes.fromhex("ebfe")  # jmp .


def run(code: str | bytes, *, cpl: int, limit: float = LIMIT) -> tuple[int, int]:
    data = bytes.fromhex(code) if isinstance(code, str) else code
    with Kvm() as kvm, TinyGuest(kvm, data, cpl=cpl) as guest:
        return guest.run(limit)


@pytest.mark.parametrize("cpl", [0, 3])
def test_an_out_is_port_and_value(cpl: int) -> None:
    assert run(OUT_42, cpl=cpl) == (0xF4, 42)


@pytest.mark.parametrize("cpl", [0, 3])
def test_it_runs_at_the_level_asked_for(cpl: int) -> None:
    port, cs = run("8cc8 e6f4", cpl=cpl)  # mov eax, cs; out 0xf4, al
    assert (port, cs & 3) == (0xF4, cpl)


def test_it_goes_on_where_it_was_with_another_rcx() -> None:
    # start: mov eax, ecx; out 0xf4, al; jmp start
    with Kvm() as kvm, TinyGuest(kvm, bytes.fromhex("89c8 e6f4 ebfa")) as guest:
        for value in (7, 200, 0):
            guest.set_rcx(value)
            assert guest.run(LIMIT) == (0xF4, value)


@pytest.mark.parametrize(("code", "cpl"), [(FOREVER, 0), (FOREVER, 3), (b"\xf4", 0)])  # hlt
def test_a_guest_that_never_ends_is_ended(code: bytes, cpl: int) -> None:
    with pytest.raises(GuestFailed, match=r"did not end within 0\.2 s"):
        run(code, cpl=cpl, limit=0.2)


def test_a_guest_can_run_again_after_its_time_was_up() -> None:
    with Kvm() as kvm, TinyGuest(kvm, bytes.fromhex("48ffc9 75fb e6f4 ebf7")) as guest:
        guest.set_rcx(1 << 60)  # dec rcx; jnz .-3; out 0xf4, al
        with pytest.raises(GuestFailed):
            guest.run(0.1)
        guest.set_rcx(5)
        assert guest.run(LIMIT)[0] == 0xF4


@pytest.mark.parametrize(
    ("code", "cpl"),
    [
        ("0f0b", 0),  # ud2
        ("0f0b", 3),
        ("0f20d8", 3),  # mov rax, cr3: privileged
        ("8b0425 00002000", 0),  # mov eax, [0x200000]: not mapped
    ],
)
def test_an_exception_is_a_triple_fault(code: str, cpl: int) -> None:
    with pytest.raises(GuestFailed, match="triple fault"):
        run(code, cpl=cpl)


def test_another_exit_is_told_by_name() -> None:
    with pytest.raises(GuestFailed, match="KVM_EXIT_IO"):
        run("e4f4", cpl=0)  # in al, 0xf4


@pytest.mark.parametrize("code", [OUT_42, FOREVER, b"\x0f\x0b"])
def test_nothing_is_left_behind(code: bytes) -> None:
    def state() -> tuple[object, ...]:
        return (
            os.listdir("/proc/self/fd"),
            threading.active_count(),
            signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            signal.sigpending(),
        )

    before = state()
    for _ in range(3):
        with contextlib.suppress(GuestFailed):
            run(code, cpl=3, limit=LIMIT if code != FOREVER else 0.1)
    assert state() == before


def test_a_caller_that_blocks_the_signal_itself_keeps_it_blocked() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {_KICK})
    try:
        with pytest.raises(GuestFailed):
            run(FOREVER, cpl=0, limit=0.1)
        assert _KICK in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert _KICK not in signal.sigpending()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {_KICK})
