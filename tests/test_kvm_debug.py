"""KVM_SET_GUEST_DEBUG: single steps and breakpoints, and what each back end can do of it.

PVM steps and breaks in the code it interprets (CPL0); not on data, nor in CPL3 code, which runs on
the processor itself: there a single step is the guest's own #DB.
"""

from __future__ import annotations

import pytest

from tests.support import host
from tests.support.guests import CODE, DATA, Guest
from vmm.kvm import constants

pytestmark = pytest.mark.needs_kvm

DB, BP = 1, 3
"""Exception vectors."""
DR6_B0, DR6_BS = 1, 1 << 14
NOPS = "nop; nop; nop; nop; done 9"
G0, EXECUTE, WRITE_1 = 2, 0, 1 << 16
"""DR7: breakpoint 0 on globally; its kind and length (Intel SDM volume 3, 17.2.4)."""

not_in_tcg = pytest.mark.skipif(
    host.emulated(), reason="QEMU's TCG loads no breakpoints at VMRUN, nor intercepts INT3"
)


def debug(guest: Guest, control: int, *debugreg: int) -> None:
    guest.vcpu.set_guest_debug(constants.GUESTDBG_ENABLE | control, debugreg)


def stop(guest: Guest) -> tuple[int, int]:
    """Run to a debug exit: vector and linear address."""
    assert guest.run() == constants.EXIT_DEBUG, guest.where()
    arch = guest.vcpu.kvm_run.debug.arch
    return arch.exception, arch.pc


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_single_step(mode: str) -> None:
    with Guest(NOPS, mode) as guest:
        debug(guest, constants.GUESTDBG_SINGLESTEP)
        for address in range(CODE + 1, CODE + 5):
            assert stop(guest) == (DB, address)
            assert guest.get("rip") == address
            assert guest.vcpu.kvm_run.debug.arch.dr6 & DR6_BS
        guest.vcpu.set_guest_debug(0)
        assert guest.done() == 9


@not_in_tcg
@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_hardware_breakpoint(mode: str) -> None:
    with Guest(NOPS, mode) as guest:
        at = (CODE + 2, 0, 0, 0, 0, 0, 0, G0 | EXECUTE | 1 << 10)
        debug(guest, constants.GUESTDBG_USE_HW_BP, *at)
        assert stop(guest) == (DB, CODE + 2)
        assert guest.vcpu.kvm_run.debug.arch.dr6 & DR6_B0
        assert guest.get("rip") == CODE + 2
        guest.vcpu.set_guest_debug(0)
        assert guest.done() == 9


@not_in_tcg
@pytest.mark.parametrize("mode", ["protected", "long"])
def test_software_breakpoint(mode: str) -> None:
    with Guest("nop; int3; nop; done 9", mode) as guest:
        debug(guest, constants.GUESTDBG_USE_SW_BP)
        if host.backend() == "kvm_pvm":  # whose interpreter has no int3
            assert guest.run() == constants.EXIT_INTERNAL_ERROR
            assert guest.get("rip") == CODE + 1
            return
        assert stop(guest) == (BP, CODE + 1)
        guest.put(rip=CODE + 2)  # a debugger puts the instruction back; this one had none there
        assert guest.done() == 9


@not_in_tcg
@pytest.mark.parametrize("mode", ["long", "user"])
def test_data_breakpoint(mode: str) -> None:
    with Guest(f"nop; movb $1, {DATA}; nop; done 9", mode) as guest:
        debug(guest, constants.GUESTDBG_USE_HW_BP, DATA, 0, 0, 0, 0, 0, 0, G0 | WRITE_1 | 1 << 10)
        if host.backend() == "kvm_pvm":
            assert guest.done() == 9
            return
        assert stop(guest)[0] == DB
        assert guest.memory.read_u8(DATA) == 1  # a trap: after the write
        assert guest.done() == 9


def test_single_step_at_cpl_3() -> None:
    with Guest(f"done 1; {NOPS}", "user") as guest:
        assert guest.done() == 1
        guest.complete()
        debug(guest, constants.GUESTDBG_SINGLESTEP)
        if host.backend() == "kvm_pvm":  # gives the #DB to the guest, which has no handler
            assert guest.run() == constants.EXIT_SHUTDOWN
            return
        start = guest.get("rip")
        assert guest.vcpu.get_sregs().cs.selector & 3 == 3
        for address in range(start + 1, start + 5):
            assert stop(guest) == (DB, address)


def test_off_is_off() -> None:
    with Guest(NOPS) as guest:
        debug(guest, constants.GUESTDBG_SINGLESTEP)
        assert stop(guest) == (DB, CODE + 1)
        guest.vcpu.set_guest_debug(0)
        assert guest.done() == 9
