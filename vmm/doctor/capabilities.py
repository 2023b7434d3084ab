"""The KVM capabilities this project uses, what for, and KVM's limits."""

from __future__ import annotations

from vmm.kvm import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm import Kvm

REQUIRED: dict[int, str] = {
    c.CAP_USER_MEMORY: "guest memory",
    c.CAP_EXT_CPUID: "the guest's CPUID",
    c.CAP_IRQCHIP: "interrupt controllers in the kernel",
    c.CAP_PIT2: "the timer Linux calibrates with",
    c.CAP_SET_TSS_ADDR: "real mode on Intel processors",
    c.CAP_SET_IDENTITY_MAP_ADDR: "real mode on Intel processors",
    c.CAP_MP_STATE: "starting vCPUs by INIT and SIPI",
    c.CAP_IMMEDIATE_EXIT: "pausing and ending a machine",
}

OPTIONAL: dict[int, str] = {
    c.CAP_IRQFD: "interrupts without an exit",
    c.CAP_IOEVENTFD: "notifies without an exit",
    c.CAP_IOEVENTFD_ANY_LENGTH: "notifies of any width",
    c.CAP_IRQ_ROUTING: "MSI routes",
    c.CAP_SIGNAL_MSI: "MSIs without a route",
    c.CAP_COALESCED_MMIO: "console output in batches",
    c.CAP_COALESCED_PIO: "console output in batches, by port",
    c.CAP_SYNC_REGS: "registers without ioctls",
    c.CAP_TSC_DEADLINE_TIMER: "the guest's quickest timer",
    c.CAP_TSC_CONTROL: "a TSC frequency of choice",
    c.CAP_GET_TSC_KHZ: "the guest's TSC frequency",
    c.CAP_ASYNC_PF: "guests go on while the host swaps",
    c.CAP_ADJUST_CLOCK: "saving and setting kvmclock",
    c.CAP_VCPU_EVENTS: "saving pending events",
    c.CAP_DEBUGREGS: "saving debug registers",
    c.CAP_XSAVE: "saving FPU and vector state",
    c.CAP_XSAVE2: "saving AMX state",
    c.CAP_XCRS: "saving XCR0",
    c.CAP_SREGS2: "saving PDPTRs",
    c.CAP_GET_MSR_FEATURES: "CPU policies for feature MSRs",
    c.CAP_X86_USER_SPACE_MSR: "MSRs KVM does not know",
    c.CAP_EXIT_ON_EMULATION_FAILURE: "a full report when emulation fails",
    c.CAP_SET_GUEST_DEBUG: "breakpoints and single steps",
    c.CAP_READONLY_MEM: "ROM",
    c.CAP_USER_MEMORY2: "guest memory from guest_memfd",
    c.CAP_GUEST_MEMFD: "memory the host cannot map",
    c.CAP_MANUAL_DIRTY_LOG_PROTECT2: "snapshots and migration, in steps",
    c.CAP_DIRTY_LOG_RING: "snapshots and migration, by ring",
    c.CAP_BINARY_STATS_FD: "statistics",
}

LIMITS: dict[str, int] = {
    "vcpus_max": c.CAP_MAX_VCPUS,
    "vcpus_recommended": c.CAP_NR_VCPUS,
    "vcpu_id_max": c.CAP_MAX_VCPU_ID,
    "memory_slots": c.CAP_NR_MEMSLOTS,
    "gsi_routes": c.CAP_IRQ_ROUTING,
}
"""Name in the report, and the capability whose value it is."""


class Capability:
    """One capability as this KVM has it."""

    __slots__ = ("name", "purpose", "required", "value")

    def __init__(self, name: str, value: int, required: bool, purpose: str) -> None:
        self.name = name
        self.value = value
        self.required = required
        self.purpose = purpose


def check(kvm: Kvm) -> list[Capability]:
    """Every capability this project uses; the required ones first."""
    return [
        Capability(f"KVM_CAP_{c.CAP_NAMES[cap]}", kvm.check_extension(cap), required, purpose)
        for required, table in ((True, REQUIRED), (False, OPTIONAL))
        for cap, purpose in table.items()
    ]


def limits(kvm: Kvm) -> dict[str, int]:
    """KVM's limits for one VM."""
    return {name: kvm.check_extension(cap) for name, cap in LIMITS.items()}
