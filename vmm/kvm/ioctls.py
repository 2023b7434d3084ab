"""The ioctls of linux/kvm.h this project uses, as one table, and the one function that makes them.

A number is `dir << 30 | size << 16 | KVMIO << 8 | nr` (asm-generic/ioctl.h); sizes come from the
structures in `abi_build.py`.
"""

from __future__ import annotations

import fcntl

from vmm.errors import KvmError
from vmm.kvm.ffi import ffi, sizeof

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KVMIO = 0xAE

_NONE, _WRITE, _READ = 0, 1, 2


class Ioctl:
    """One ioctl: its name in linux/kvm.h and its number."""

    __slots__ = ("name", "number")

    def __init__(self, name: str, nr: int, direction: int = _NONE, struct: str | int = 0) -> None:
        size = struct if isinstance(struct, int) else sizeof(f"struct {struct}")
        self.name = name
        self.number = direction << 30 | size << 16 | KVMIO << 8 | nr

    def __repr__(self) -> str:
        return f"{self.name}({self.number:#x})"


# --- system: /dev/kvm -----------------------------------------------------------------------
GET_API_VERSION = Ioctl("KVM_GET_API_VERSION", 0x00)
CREATE_VM = Ioctl("KVM_CREATE_VM", 0x01)
GET_MSR_INDEX_LIST = Ioctl("KVM_GET_MSR_INDEX_LIST", 0x02, _READ | _WRITE, "kvm_msr_list")
CHECK_EXTENSION = Ioctl("KVM_CHECK_EXTENSION", 0x03)
GET_VCPU_MMAP_SIZE = Ioctl("KVM_GET_VCPU_MMAP_SIZE", 0x04)
GET_SUPPORTED_CPUID = Ioctl("KVM_GET_SUPPORTED_CPUID", 0x05, _READ | _WRITE, "kvm_cpuid2")
GET_EMULATED_CPUID = Ioctl("KVM_GET_EMULATED_CPUID", 0x09, _READ | _WRITE, "kvm_cpuid2")
GET_MSR_FEATURE_INDEX_LIST = Ioctl(
    "KVM_GET_MSR_FEATURE_INDEX_LIST", 0x0A, _READ | _WRITE, "kvm_msr_list"
)

# --- VM ---------------------------------------------------------------------------------------
CREATE_VCPU = Ioctl("KVM_CREATE_VCPU", 0x41)
GET_DIRTY_LOG = Ioctl("KVM_GET_DIRTY_LOG", 0x42, _WRITE, "kvm_dirty_log")
SET_USER_MEMORY_REGION = Ioctl(
    "KVM_SET_USER_MEMORY_REGION", 0x46, _WRITE, "kvm_userspace_memory_region"
)
SET_TSS_ADDR = Ioctl("KVM_SET_TSS_ADDR", 0x47)
SET_IDENTITY_MAP_ADDR = Ioctl("KVM_SET_IDENTITY_MAP_ADDR", 0x48, _WRITE, 8)
SET_USER_MEMORY_REGION2 = Ioctl(
    "KVM_SET_USER_MEMORY_REGION2", 0x49, _WRITE, "kvm_userspace_memory_region2"
)
CREATE_IRQCHIP = Ioctl("KVM_CREATE_IRQCHIP", 0x60)
IRQ_LINE = Ioctl("KVM_IRQ_LINE", 0x61, _WRITE, "kvm_irq_level")
GET_IRQCHIP = Ioctl("KVM_GET_IRQCHIP", 0x62, _READ | _WRITE, "kvm_irqchip")
SET_IRQCHIP = Ioctl("KVM_SET_IRQCHIP", 0x63, _READ, "kvm_irqchip")
REGISTER_COALESCED_MMIO = Ioctl(
    "KVM_REGISTER_COALESCED_MMIO", 0x67, _WRITE, "kvm_coalesced_mmio_zone"
)
UNREGISTER_COALESCED_MMIO = Ioctl(
    "KVM_UNREGISTER_COALESCED_MMIO", 0x68, _WRITE, "kvm_coalesced_mmio_zone"
)
SET_GSI_ROUTING = Ioctl("KVM_SET_GSI_ROUTING", 0x6A, _WRITE, "kvm_irq_routing")
IRQFD = Ioctl("KVM_IRQFD", 0x76, _WRITE, "kvm_irqfd")
CREATE_PIT2 = Ioctl("KVM_CREATE_PIT2", 0x77, _WRITE, "kvm_pit_config")
IOEVENTFD = Ioctl("KVM_IOEVENTFD", 0x79, _WRITE, "kvm_ioeventfd")
SET_CLOCK = Ioctl("KVM_SET_CLOCK", 0x7B, _WRITE, "kvm_clock_data")
GET_CLOCK = Ioctl("KVM_GET_CLOCK", 0x7C, _READ, "kvm_clock_data")
GET_PIT2 = Ioctl("KVM_GET_PIT2", 0x9F, _READ, "kvm_pit_state2")
SET_PIT2 = Ioctl("KVM_SET_PIT2", 0xA0, _WRITE, "kvm_pit_state2")
SIGNAL_MSI = Ioctl("KVM_SIGNAL_MSI", 0xA5, _WRITE, "kvm_msi")
CLEAR_DIRTY_LOG = Ioctl("KVM_CLEAR_DIRTY_LOG", 0xC0, _READ | _WRITE, "kvm_clear_dirty_log")

# --- vCPU -------------------------------------------------------------------------------------
RUN = Ioctl("KVM_RUN", 0x80)
GET_REGS = Ioctl("KVM_GET_REGS", 0x81, _READ, "kvm_regs")
SET_REGS = Ioctl("KVM_SET_REGS", 0x82, _WRITE, "kvm_regs")
GET_SREGS = Ioctl("KVM_GET_SREGS", 0x83, _READ, "kvm_sregs")
SET_SREGS = Ioctl("KVM_SET_SREGS", 0x84, _WRITE, "kvm_sregs")
TRANSLATE = Ioctl("KVM_TRANSLATE", 0x85, _READ | _WRITE, "kvm_translation")
INTERRUPT = Ioctl("KVM_INTERRUPT", 0x86, _WRITE, "kvm_interrupt")
GET_MSRS = Ioctl("KVM_GET_MSRS", 0x88, _READ | _WRITE, "kvm_msrs")
SET_MSRS = Ioctl("KVM_SET_MSRS", 0x89, _WRITE, "kvm_msrs")
SET_SIGNAL_MASK = Ioctl("KVM_SET_SIGNAL_MASK", 0x8B, _WRITE, 4)
GET_FPU = Ioctl("KVM_GET_FPU", 0x8C, _READ, "kvm_fpu")
SET_FPU = Ioctl("KVM_SET_FPU", 0x8D, _WRITE, "kvm_fpu")
GET_LAPIC = Ioctl("KVM_GET_LAPIC", 0x8E, _READ, "kvm_lapic_state")
SET_LAPIC = Ioctl("KVM_SET_LAPIC", 0x8F, _WRITE, "kvm_lapic_state")
SET_CPUID2 = Ioctl("KVM_SET_CPUID2", 0x90, _WRITE, "kvm_cpuid2")
GET_CPUID2 = Ioctl("KVM_GET_CPUID2", 0x91, _READ | _WRITE, "kvm_cpuid2")
GET_MP_STATE = Ioctl("KVM_GET_MP_STATE", 0x98, _READ, "kvm_mp_state")
SET_MP_STATE = Ioctl("KVM_SET_MP_STATE", 0x99, _WRITE, "kvm_mp_state")
NMI = Ioctl("KVM_NMI", 0x9A)
SET_GUEST_DEBUG = Ioctl("KVM_SET_GUEST_DEBUG", 0x9B, _WRITE, "kvm_guest_debug")
GET_VCPU_EVENTS = Ioctl("KVM_GET_VCPU_EVENTS", 0x9F, _READ, "kvm_vcpu_events")
SET_VCPU_EVENTS = Ioctl("KVM_SET_VCPU_EVENTS", 0xA0, _WRITE, "kvm_vcpu_events")
GET_DEBUGREGS = Ioctl("KVM_GET_DEBUGREGS", 0xA1, _READ, "kvm_debugregs")
SET_DEBUGREGS = Ioctl("KVM_SET_DEBUGREGS", 0xA2, _WRITE, "kvm_debugregs")
SET_TSC_KHZ = Ioctl("KVM_SET_TSC_KHZ", 0xA2)
GET_TSC_KHZ = Ioctl("KVM_GET_TSC_KHZ", 0xA3)
ENABLE_CAP = Ioctl("KVM_ENABLE_CAP", 0xA3, _WRITE, "kvm_enable_cap")
GET_XSAVE = Ioctl("KVM_GET_XSAVE", 0xA4, _READ, "kvm_xsave")
SET_XSAVE = Ioctl("KVM_SET_XSAVE", 0xA5, _WRITE, "kvm_xsave")
GET_XCRS = Ioctl("KVM_GET_XCRS", 0xA6, _READ, "kvm_xcrs")
SET_XCRS = Ioctl("KVM_SET_XCRS", 0xA7, _WRITE, "kvm_xcrs")
KVMCLOCK_CTRL = Ioctl("KVM_KVMCLOCK_CTRL", 0xAD)
GET_NESTED_STATE = Ioctl("KVM_GET_NESTED_STATE", 0xBE, _READ | _WRITE, 128)
SET_NESTED_STATE = Ioctl("KVM_SET_NESTED_STATE", 0xBF, _WRITE, 128)
GET_SREGS2 = Ioctl("KVM_GET_SREGS2", 0xCC, _READ, "kvm_sregs2")
SET_SREGS2 = Ioctl("KVM_SET_SREGS2", 0xCD, _WRITE, "kvm_sregs2")
GET_XSAVE2 = Ioctl("KVM_GET_XSAVE2", 0xCF, _READ, "kvm_xsave")

# --- devices (KVM_CREATE_DEVICE) and attributes, on any descriptor ------------------------------
CREATE_DEVICE = Ioctl("KVM_CREATE_DEVICE", 0xE0, _READ | _WRITE, "kvm_create_device")
SET_DEVICE_ATTR = Ioctl("KVM_SET_DEVICE_ATTR", 0xE1, _WRITE, "kvm_device_attr")
GET_DEVICE_ATTR = Ioctl("KVM_GET_DEVICE_ATTR", 0xE2, _WRITE, "kvm_device_attr")
HAS_DEVICE_ATTR = Ioctl("KVM_HAS_DEVICE_ATTR", 0xE3, _WRITE, "kvm_device_attr")


def ioctl(fd: int, call: Ioctl, arg: int = 0) -> int:
    """Make a call whose argument is an integer; its result. `KvmError` if it fails."""
    try:
        # A zero left out is three times as fast: fcntl tries an integer as a buffer first.
        return fcntl.ioctl(fd, call.number, arg) if arg else fcntl.ioctl(fd, call.number)
    except OSError as err:
        raise _error(call, err) from None


def ioctl_struct(fd: int, call: Ioctl, struct: Any) -> int:
    """Make a call whose argument points to a cffi structure, which the kernel may change.

    `fcntl.ioctl` copies a buffer of up to 1,024 bytes in and out, and passes a larger one as it
    is; the size is that of the whole allocation, so flexible arrays go whole.
    """
    try:
        result: int = fcntl.ioctl(fd, call.number, ffi.buffer(struct))
        return result
    except OSError as err:
        raise _error(call, err) from None


def _error(call: Ioctl, err: OSError) -> KvmError:
    number = err.errno or 0
    try:
        from vmm.kvm.hints import hint_for
    except OSError:  # no descriptor is left to read that module with
        return KvmError(call.name, number, "too many open files: raise `ulimit -n`")
    return KvmError(call.name, number, hint_for(call.name, number))
