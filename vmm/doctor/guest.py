"""A guest of a few instructions in long mode, at CPL0 or CPL3, that ends within a time limit.

It has 2 MiB of RAM, identity-mapped by one page that user code may use, segments for `syscall`,
and no IDT: any exception is a triple fault, which ends KVM_RUN (KVM_EXIT_SHUTDOWN).
"""

from __future__ import annotations

import contextlib
import errno
import signal
import struct
import threading

from vmm import layout
from vmm.errors import KvmError, VmmError
from vmm.kvm import constants
from vmm.kvm.ffi import ffi
from vmm.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from vmm.kvm import Kvm, Vcpu

CODE = 0x8000
"""GPA of the code given."""
HANDLER = 0x9000
"""GPA of the code given for `syscall` (LSTAR)."""
KERNEL_CS, USER_DS, USER_CS = 0x08, 0x20 | 3, 0x28 | 3
"""Selectors as `syscall` and `sysret` with STAR want them: SS is CS + 8, and CS - 8."""

CR0_PE, CR0_ET, CR0_NE, CR0_PG = 1 << 0, 1 << 4, 1 << 5, 1 << 31
CR4_PAE = 1 << 5
EFER_SCE, EFER_LME, EFER_LMA = 1 << 0, 1 << 8, 1 << 10
RFLAGS_FIXED = 1 << 1
RFLAGS_IOPL3 = 3 << 12
MSR_STAR = 0xC0000081
MSR_LSTAR = 0xC0000082
MSR_FMASK = 0xC0000084

_MEMORY = 2 * layout.MIB
_GDT, _PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000, 0x4000
_P_RW_US = 7
_PS = 1 << 7
_DESCRIPTORS = (
    0,
    0x00AF9B000000FFFF,  # 0x08 kernel code, 64 bits
    0x00CF93000000FFFF,  # 0x10 kernel data
    0x00CFFB000000FFFF,  # 0x18 user code, 32 bits
    0x00CFF3000000FFFF,  # 0x20 user data
    0x00AFFB000000FFFF,  # 0x28 user code, 64 bits
)
_KICK = signal.SIGRTMIN + 2
_IMMEDIATE_EXIT = ffi.offsetof("struct kvm_run", "immediate_exit")


class GuestFailed(VmmError):
    """The guest did something else than it was written to do; the message says what."""


class TinyGuest:
    """A vCPU about to execute `code` at privilege level `cpl` (0 or 3; at 3 it may use ports).

    Args:
        handler: what `syscall` enters.

    >>> with Kvm() as kvm, TinyGuest(kvm, bytes.fromhex("e6f4")) as guest:  # doctest: +SKIP
    ...     guest.run(1.0)  # out 0xf4, al
    (244, 0)
    """

    def __init__(self, kvm: Kvm, code: bytes, *, cpl: int = 0, handler: bytes = b"") -> None:
        with contextlib.ExitStack() as stack:
            self.memory = stack.enter_context(GuestMemory(_MEMORY))
            vm = stack.enter_context(kvm.create_vm())
            # Intel hosts without "unrestricted guest" want both, though we never use real mode.
            vm.set_tss_addr(layout.TSS)
            vm.set_identity_map_addr(layout.IDENTITY_MAP)
            vm.set_user_memory_region(0, 0, _MEMORY, self.memory.regions[0].hva)
            # A vCPU without a local APIC makes the host patch its kernel (kvm_has_noapic_vcpu).
            vm.create_irqchip()
            self.vcpu: Vcpu = stack.enter_context(vm.create_vcpu(0))
            self.vcpu.set_cpuid2(kvm.supported_cpuid())
            self._fill(code, handler)
            self._set_up(cpl)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _fill(self, code: bytes, handler: bytes) -> None:
        memory = self.memory
        memory.write(_GDT, struct.pack(f"<{len(_DESCRIPTORS)}Q", *_DESCRIPTORS))
        memory.write_u64(_PML4, _PDPT | _P_RW_US)
        memory.write_u64(_PDPT, _PD | _P_RW_US)
        memory.write_u64(_PD, _P_RW_US | _PS)
        memory.write(CODE, code)
        memory.write(HANDLER, handler)

    def _set_up(self, cpl: int) -> None:
        vcpu = self.vcpu
        sregs = vcpu.get_sregs()
        code, data = (USER_CS, USER_DS) if cpl else (KERNEL_CS, KERNEL_CS + 8)
        # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
        sregs.cs = (0, 0xFFFFFFFF, code, 11, 1, cpl, 0, 1, 1, 1, 0, 0, 0)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, (0, 0xFFFFFFFF, data, 3, 1, cpl, 1, 1, 0, 1, 0, 0, 0))
        sregs.tr = (0, 0x67, 0, 11, 1, 0, 0, 0, 0, 0, 0, 0, 0)
        sregs.gdt.base, sregs.gdt.limit = _GDT, 8 * len(_DESCRIPTORS) - 1
        sregs.idt.base, sregs.idt.limit = 0, 0
        sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG
        sregs.cr3 = _PML4
        sregs.cr4 = CR4_PAE
        sregs.efer = EFER_LME | EFER_LMA | EFER_SCE
        vcpu.set_sregs(sregs)
        sysret_base = (USER_DS & ~3) - 8
        vcpu.set_msrs(
            (
                (MSR_STAR, sysret_base << 48 | KERNEL_CS << 32),
                (MSR_LSTAR, HANDLER),
                (MSR_FMASK, 0),
            )
        )
        regs = vcpu.get_regs()
        regs.rip, regs.rsp = CODE, CODE
        regs.rflags = RFLAGS_FIXED | (RFLAGS_IOPL3 if cpl else 0)
        vcpu.set_regs(regs)

    def set_rcx(self, value: int) -> None:
        """Set RCX before the next `run`."""
        regs = self.vcpu.get_regs()
        regs.rcx = value
        self.vcpu.set_regs(regs)

    def run(self, limit: float) -> tuple[int, int]:
        """Run to the next one-byte OUT; its port and value.

        Raises:
            GuestFailed: another exit, or none within `limit` seconds.
        """
        run = self.vcpu.kvm_run
        with _Limit(self.vcpu, limit) as deadline:
            while True:
                try:
                    reason = self.vcpu.run()
                except KvmError as err:
                    if err.errno != errno.EINTR:
                        raise GuestFailed(str(err)) from None
                    if deadline.passed:
                        raise GuestFailed(f"it did not end within {limit:g} s") from None
                    continue
                if reason != constants.EXIT_INTR:
                    break
        if reason == constants.EXIT_IO and run.io.direction == constants.EXIT_IO_OUT:
            return int(run.io.port), self.vcpu.run_map[run.io.data_offset]
        what = constants.EXIT_NAMES.get(reason, f"exit {reason}")
        if reason == constants.EXIT_INTERNAL_ERROR:
            what += f", suberror {run.internal.suberror}"
        elif reason == constants.EXIT_SHUTDOWN:
            what += " (triple fault)"
        elif reason == constants.EXIT_FAIL_ENTRY:
            what += f", reason {run.fail_entry.hardware_entry_failure_reason:#x}"
        raise GuestFailed(what)


class _Limit:
    """Ends the calling thread's KVM_RUN after some seconds (EINTR).

    The signal is blocked but in KVM_RUN, so one sent too early still ends the next KVM_RUN, one
    sent too late is taken back, and no handler is needed.
    """

    def __init__(self, vcpu: Vcpu, seconds: float) -> None:
        self.passed = False
        self._vcpu = vcpu
        self._thread = threading.get_ident()
        self._timer = threading.Timer(seconds, self._kick)
        self._blocked: set[int] = set()

    def __enter__(self) -> Self:
        self._blocked = {int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, {_KICK})}
        self._vcpu.set_signal_mask(self._blocked - {_KICK})
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        self._timer.join()
        while signal.sigtimedwait({_KICK}, 0) is not None:
            pass
        self._vcpu.run_map[_IMMEDIATE_EXIT] = 0
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def _kick(self) -> None:
        self.passed = True
        self._vcpu.run_map[_IMMEDIATE_EXIT] = 1
        signal.pthread_kill(self._thread, _KICK)
