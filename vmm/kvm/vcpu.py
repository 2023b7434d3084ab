"""A vCPU descriptor: registers, state, and KVM_RUN."""

from __future__ import annotations

import errno
import mmap
import os

from vmm.errors import KvmError, ShapeError
from vmm.forked import drop_in_child
from vmm.kvm import constants, cpuid, ioctls
from vmm.kvm.ffi import ffi, new
from vmm.kvm.ioctls import ioctl, ioctl_struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, Self

    from vmm.kvm.cpuid import CpuidEntry
    from vmm.kvm.vm import Vm

MSRS_A_CALL = 255
NESTED_HEADER = 128
"""sizeof(struct kvm_nested_state), which KVM reads first."""
"""KVM takes fewer than 256 MSRs in one KVM_GET_MSRS or KVM_SET_MSRS (MAX_IO_MSRS)."""


class Vcpu:
    """One virtual processor. Made by `Vm.create_vcpu`.

    All calls but `run` are for the thread that runs it, or for any while it is parked.

    Attributes:
        number: its APIC id.
        run_map: the mapping shared with the kernel; `kvm_run` is at its start.
        kvm_run: the same as a cffi `struct kvm_run`.
    """

    __slots__ = ("__weakref__", "fd", "kvm_run", "number", "run_map", "vm")

    def __init__(self, fd: int, number: int, vm: Vm) -> None:
        self.fd = fd
        self.number = number
        self.vm = vm
        try:
            self.run_map = mmap.mmap(fd, vm.kvm.vcpu_mmap_size())
        except BaseException:
            os.close(fd)
            raise
        drop_in_child(self)
        self.kvm_run: Any = ffi.from_buffer("struct kvm_run *", self.run_map)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and close."""
        if self.fd >= 0:
            ffi.release(self.kvm_run)
            self.kvm_run = None
            self.run_map.close()
            os.close(self.fd)
            self.fd = -1

    def run(self) -> int:
        """KVM_RUN until the next exit; its reason (constants.EXIT_*). No GIL meanwhile.

        Raises `KvmError` with errno EINTR when a signal or immediate_exit ended it.
        """
        ioctl(self.fd, ioctls.RUN)
        return int(self.kvm_run.exit_reason)

    def _get(self, call: ioctls.Ioctl, struct: str) -> Any:
        state = new(struct)
        ioctl_struct(self.fd, call, state)
        return state

    # --- registers -------------------------------------------------------------------------------

    def get_regs(self) -> Any:
        """KVM_GET_REGS: general registers, rip, rflags."""
        return self._get(ioctls.GET_REGS, "kvm_regs")

    def set_regs(self, regs: Any) -> None:
        """KVM_SET_REGS."""
        ioctl_struct(self.fd, ioctls.SET_REGS, regs)

    def get_sregs(self) -> Any:
        """KVM_GET_SREGS: segments, control registers, EFER, APIC base."""
        return self._get(ioctls.GET_SREGS, "kvm_sregs")

    def set_sregs(self, sregs: Any) -> None:
        """KVM_SET_SREGS."""
        ioctl_struct(self.fd, ioctls.SET_SREGS, sregs)

    def get_sregs2(self) -> Any:
        """KVM_GET_SREGS2 (KVM_CAP_SREGS2): the same with PDPTRs, without pending interrupts."""
        return self._get(ioctls.GET_SREGS2, "kvm_sregs2")

    def set_sregs2(self, sregs: Any) -> None:
        """KVM_SET_SREGS2."""
        ioctl_struct(self.fd, ioctls.SET_SREGS2, sregs)

    def get_fpu(self) -> Any:
        """KVM_GET_FPU: x87 and SSE."""
        return self._get(ioctls.GET_FPU, "kvm_fpu")

    def set_fpu(self, fpu: Any) -> None:
        """KVM_SET_FPU. A vCPU that has not used its FPU yet may ignore it: see `set_xsave`."""
        ioctl_struct(self.fd, ioctls.SET_FPU, fpu)

    def get_xsave(self) -> bytearray:
        """The XSAVE area: KVM_GET_XSAVE2 where offered (AMX needs over 4096 bytes), else _XSAVE."""
        size = max(self.vm.check_extension(constants.CAP_XSAVE2), 4096)
        area = bytearray(size)
        call = ioctls.GET_XSAVE if size == 4096 else ioctls.GET_XSAVE2
        ioctl_struct(self.fd, call, ffi.from_buffer(area))
        return area

    def get_xsave2(self) -> bytearray:
        """KVM_GET_XSAVE2 (KVM_CAP_XSAVE2), whatever the size of the area."""
        area = bytearray(max(self.vm.check_extension(constants.CAP_XSAVE2), 4096))
        ioctl_struct(self.fd, ioctls.GET_XSAVE2, ffi.from_buffer(area))
        return area

    def set_xsave(self, area: bytearray) -> None:
        """KVM_SET_XSAVE; takes what `get_xsave` and `get_xsave2` gave.

        A component whose bit in XSTATE_BV (offset 512) is clear is put into its initial state. KVM
        reads as much as it would give, so a shorter area is filled up with zeroes.
        """
        size = max(self.vm.check_extension(constants.CAP_XSAVE2), 4096)
        if len(area) < size:
            area = area.ljust(size, b"\0")
        ioctl_struct(self.fd, ioctls.SET_XSAVE, ffi.from_buffer(area))

    def get_xcrs(self) -> Any:
        """KVM_GET_XCRS: XCR0."""
        return self._get(ioctls.GET_XCRS, "kvm_xcrs")

    def set_xcrs(self, xcrs: Any) -> None:
        """KVM_SET_XCRS."""
        ioctl_struct(self.fd, ioctls.SET_XCRS, xcrs)

    def get_debugregs(self) -> Any:
        """KVM_GET_DEBUGREGS: DR0-3, 6, 7."""
        return self._get(ioctls.GET_DEBUGREGS, "kvm_debugregs")

    def set_debugregs(self, state: Any) -> None:
        """KVM_SET_DEBUGREGS."""
        ioctl_struct(self.fd, ioctls.SET_DEBUGREGS, state)

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """KVM_GET_MSRS: {index: value}; those that cannot be read are left out."""
        return read_msrs(self.fd, indices)

    def set_msrs(self, msrs: Iterable[tuple[int, int]]) -> list[int]:
        """KVM_SET_MSRS in the order given; the indices KVM refused."""
        pending = list(msrs)
        refused: list[int] = []
        while pending:
            part = pending[:MSRS_A_CALL]
            table = new("kvm_msrs", len(part))
            table.nmsrs = len(part)
            entries = table.entries
            for position, (index, data) in enumerate(part):
                entries[position].index = index
                entries[position].data = data
            done = ioctl_struct(self.fd, ioctls.SET_MSRS, table)
            if done < len(part):
                refused.append(part[done][0])
                done += 1
            pending = pending[done:]
        return refused

    # --- processor model -------------------------------------------------------------------------

    def set_cpuid2(self, entries: Sequence[CpuidEntry]) -> None:
        """KVM_SET_CPUID2: before the first KVM_RUN."""
        ioctl_struct(self.fd, ioctls.SET_CPUID2, cpuid.to_struct(entries))

    def get_cpuid2(self) -> list[CpuidEntry]:
        """KVM_GET_CPUID2."""
        table = new("kvm_cpuid2", cpuid.MAX_ENTRIES)
        table.nent = cpuid.MAX_ENTRIES
        ioctl_struct(self.fd, ioctls.GET_CPUID2, table)
        return cpuid.from_struct(table)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the guest's TSC frequency in kHz."""
        return ioctl(self.fd, ioctls.GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: other than the host's needs KVM_CAP_TSC_CONTROL."""
        ioctl(self.fd, ioctls.SET_TSC_KHZ, khz)

    def get_tsc_offset(self) -> int | None:
        """KVM_VCPU_TSC_OFFSET: what is added to the host's TSC, modulo 2**64; None where this KVM
        does not tell (before Linux 5.16)."""
        value = ffi.new("uint64_t *")
        try:
            ioctl_struct(self.fd, ioctls.GET_DEVICE_ATTR, _tsc_offset(value))
        except KvmError as err:
            if err.errno in (errno.ENXIO, errno.ENOTTY, errno.EINVAL):
                return None
            raise
        return int(value[0])

    def set_tsc_offset(self, offset: int) -> None:
        """Set it; the same one for every vCPU keeps their TSCs together."""
        value = ffi.new("uint64_t *", offset & (1 << 64) - 1)
        ioctl_struct(self.fd, ioctls.SET_DEVICE_ATTR, _tsc_offset(value))

    def get_nested_state(self) -> bytes:
        """KVM_GET_NESTED_STATE: of the guest's own guests; empty where KVM nests none."""
        size = self.vm.check_extension(constants.CAP_NESTED_STATE)
        if not size:
            return b""
        area = bytearray(size)
        area[4:8] = size.to_bytes(4, "little")  # struct kvm_nested_state: flags, format, size
        ioctl_struct(self.fd, ioctls.GET_NESTED_STATE, ffi.from_buffer(area))
        return bytes(area[: int.from_bytes(area[4:8], "little")])

    def set_nested_state(self, state: bytes) -> None:
        """KVM_SET_NESTED_STATE, with EFER and CR4 already as the guest had them.

        ShapeError: `state` is not as long as its header says, which is as much as KVM reads.
        """
        if len(state) < NESTED_HEADER or int.from_bytes(state[4:8], "little") > len(state):
            raise ShapeError(f"nested state of {len(state)} bytes, not as long as it says")
        ioctl_struct(self.fd, ioctls.SET_NESTED_STATE, ffi.from_buffer(bytearray(state)))

    # --- interrupts and run state ----------------------------------------------------------------

    def get_lapic(self) -> Any:
        """KVM_GET_LAPIC: the 1 KiB register page."""
        return self._get(ioctls.GET_LAPIC, "kvm_lapic_state")

    def set_lapic(self, state: Any) -> None:
        """KVM_SET_LAPIC."""
        ioctl_struct(self.fd, ioctls.SET_LAPIC, state)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: constants.MP_STATE_*."""
        return int(self._get(ioctls.GET_MP_STATE, "kvm_mp_state").mp_state)

    def set_mp_state(self, value: int) -> None:
        """KVM_SET_MP_STATE."""
        state = new("kvm_mp_state")
        state.mp_state = value
        ioctl_struct(self.fd, ioctls.SET_MP_STATE, state)

    def get_vcpu_events(self) -> Any:
        """KVM_GET_VCPU_EVENTS: pending exceptions, interrupts, NMIs."""
        return self._get(ioctls.GET_VCPU_EVENTS, "kvm_vcpu_events")

    def set_vcpu_events(self, events: Any) -> None:
        """KVM_SET_VCPU_EVENTS."""
        ioctl_struct(self.fd, ioctls.SET_VCPU_EVENTS, events)

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: queue a vector (without an in-kernel local APIC)."""
        state = new("kvm_interrupt")
        state.irq = vector
        ioctl_struct(self.fd, ioctls.INTERRUPT, state)

    def nmi(self) -> None:
        """KVM_NMI."""
        ioctl(self.fd, ioctls.NMI)

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest it was paused, so that watchdogs hold still."""
        ioctl(self.fd, ioctls.KVMCLOCK_CTRL)

    def set_signal_mask(self, blocked: Iterable[int]) -> None:
        """KVM_SET_SIGNAL_MASK: the signals blocked while in KVM_RUN, instead of the thread's.

        A signal blocked in the thread but not here ends KVM_RUN with EINTR and stays pending, so
        that kicking a vCPU needs no signal handler.
        """
        bits = 0
        for signum in blocked:
            bits |= 1 << (signum - 1)
        mask = new("kvm_signal_mask")
        mask.len = 8
        ffi.buffer(mask.sigset)[:] = bits.to_bytes(8, "little")
        ioctl_struct(self.fd, ioctls.SET_SIGNAL_MASK, mask)

    # --- debugging and options -------------------------------------------------------------------

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """KVM_SET_GUEST_DEBUG: constants.GUESTDBG_*; DR0-3 and DR7 for hardware breakpoints."""
        state = new("kvm_guest_debug")
        state.control = control
        for position, value in enumerate(debugreg):
            state.debugreg[position] = value
        ioctl_struct(self.fd, ioctls.SET_GUEST_DEBUG, state)

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP on the vCPU."""
        enable = new("kvm_enable_cap")
        enable.cap = cap
        for position, value in enumerate(args):
            enable.args[position] = value
        ioctl_struct(self.fd, ioctls.ENABLE_CAP, enable)

    def translate(self, linear: int) -> int | None:
        """KVM_TRANSLATE: guest linear to physical address, or None if not mapped."""
        state = new("kvm_translation")
        state.linear_address = linear
        ioctl_struct(self.fd, ioctls.TRANSLATE, state)
        return int(state.physical_address) if state.valid else None


def _tsc_offset(value: Any) -> Any:
    """struct kvm_device_attr for KVM_VCPU_TSC_OFFSET, at a `uint64_t *`."""
    attr = new("kvm_device_attr")
    attr.group = constants.VCPU_TSC_CTRL
    attr.attr = constants.VCPU_TSC_OFFSET
    attr.addr = int(ffi.cast("uintptr_t", value))
    return attr


def read_msrs(fd: int, indices: Sequence[int]) -> dict[int, int]:
    """KVM_GET_MSRS on a vCPU or system descriptor; MSRs that cannot be read are left out."""
    pending = list(indices)
    values: dict[int, int] = {}
    while pending:
        part = pending[:MSRS_A_CALL]
        table = new("kvm_msrs", len(part))
        table.nmsrs = len(part)
        entries = table.entries
        for position, index in enumerate(part):
            entries[position].index = index
        try:
            done = ioctl_struct(fd, ioctls.GET_MSRS, table)
        except KvmError:
            done = 0  # the system ioctl fails as a whole where the first cannot be read
        for position in range(done):
            values[entries[position].index] = entries[position].data
        # KVM stops at the first it cannot read: step over it.
        pending = pending[done + (done < len(part)) :]
    return values
