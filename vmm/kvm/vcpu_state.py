"""All of a vCPU's state, saved as plain data and restored.

Order matters on restore: the processor model and system registers before what depends on them
(nested state and XCR0 before XSAVE, APIC base before the local APIC, the TSC and the APIC's timer
mode before the TSC deadline), and pending events last, as loading other state may clear them.
The VM's clock comes before any of it: some MSRs have KVM write the time into guest memory.
"""

from __future__ import annotations

from vmm.kvm import constants
from vmm.kvm.cpuid import CpuidEntry
from vmm.kvm.ffi import ffi, new

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmm.kvm.vcpu import Vcpu
    from vmm.shapes import Table

MSR_IA32_TSC = 0x10
MSR_IA32_FEATURE_CONTROL = 0x3A
MSR_IA32_TSC_DEADLINE = 0x6E0
MSR_KVM_ASYNC_PF_EN = 0x4B564D02

_STRUCTS = ("regs", "xcrs", "debugregs", "lapic", "vcpu_events")
_KINDS = {
    "regs": "kvm_regs",
    "sregs": "kvm_sregs",
    "xcrs": "kvm_xcrs",
    "debugregs": "kvm_debugregs",
    "lapic": "kvm_lapic_state",
    "vcpu_events": "kvm_vcpu_events",
}
XSAVE_MIN, XSAVE_MAX = 4096, 1 << 16
"""Bytes of an XSAVE area: struct kvm_xsave, and more with AMX."""
NESTED_MAX = 1 << 16
MSRS_MAX = 4096
CPUID_MAX = 256
"""KVM_MAX_CPUID_ENTRIES."""
MP_STATE_MAX = 9
"""KVM_MP_STATE_AP_RESET_HOLD, the last of those of x86."""
_LAST = (MSR_KVM_ASYNC_PF_EN, MSR_IA32_TSC_DEADLINE)
"""Set after the others: the first wakes the guest by an interrupt other MSRs tell, the second
starts a timer by what the TSC reads."""


def save(vcpu: Vcpu, msr_indices: Sequence[int]) -> dict[str, Any]:
    """State of a parked vCPU as ints, bytes, lists and dicts.

    Args:
        msr_indices: from `Kvm.msr_index_list`.
    """
    # First: reading it has KVM act on an INIT or SIPI that is pending, which changes the rest.
    state: dict[str, Any] = {"mp_state": vcpu.get_mp_state()}
    for name in _STRUCTS:
        state[name] = bytes(ffi.buffer(getattr(vcpu, f"get_{name}")()))
    state["sregs"] = bytes(ffi.buffer(vcpu.get_sregs()))
    state["xsave"] = bytes(vcpu.get_xsave())
    state["nested"] = vcpu.get_nested_state()
    state["msrs"] = vcpu.get_msrs(msr_indices)
    state["tsc_khz"] = vcpu.get_tsc_khz()
    state["cpuid"] = [
        (e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in vcpu.get_cpuid2()
    ]
    return state


def shape() -> Table:
    """What shape `save` gives a state (`vmm.shapes`): sizes are the structures' of KVM, which reads
    each as a whole."""
    from vmm.shapes import U32, U64, Data, Each, Items, Pairs, Table, Whole

    word = Whole(0, U32)
    structs = {name: Data(ffi.sizeof(f"struct {kind}")) for name, kind in _KINDS.items()}
    return Table(
        {
            "mp_state": Whole(0, MP_STATE_MAX),
            **structs,
            "xsave": Data(XSAVE_MIN, XSAVE_MAX),
            "nested": Data(0, NESTED_MAX),
            "msrs": Pairs(word, Whole(0, U64), MSRS_MAX),
            "tsc_khz": Whole(1, 0x7FFFFFFF),
            "cpuid": Items(Each([word] * 7), 1, CPUID_MAX),
        }
    )


def restore(
    vcpu: Vcpu, state: dict[str, Any], *, cpuid: bool = True, tsc_offset: int | None = None
) -> list[int]:
    """Put a saved state into a vCPU; the MSR indices KVM refused.

    Args:
        cpuid: also what CPUID says: for a vCPU that has not run.
        tsc_offset: the TSC goes on by this offset (`Vcpu.set_tsc_offset`), not from the value that
            was saved. Writing a value is not exact: KVM takes one near the present one for an
            attempt to synchronize vCPUs, and leaves the TSC as it is.
    """
    if cpuid:
        vcpu.set_cpuid2([CpuidEntry(*entry) for entry in state["cpuid"]])
    if vcpu.get_tsc_khz() != state["tsc_khz"]:
        vcpu.set_tsc_khz(state["tsc_khz"])
    msrs: dict[int, int] = dict(state["msrs"])
    vcpu.set_mp_state(state["mp_state"])
    vcpu.set_sregs(_struct("kvm_sregs", state["sregs"]))
    if state.get("nested"):
        control = msrs.pop(MSR_IA32_FEATURE_CONTROL, None)
        if control is not None:  # VMX must be allowed first
            vcpu.set_msrs([(MSR_IA32_FEATURE_CONTROL, control)])
        vcpu.set_nested_state(state["nested"])
    vcpu.set_regs(_struct("kvm_regs", state["regs"]))
    vcpu.set_xcrs(_struct("kvm_xcrs", state["xcrs"]))
    vcpu.set_xsave(bytearray(state["xsave"]))
    vcpu.set_debugregs(_struct("kvm_debugregs", state["debugregs"]))
    vcpu.set_lapic(_struct("kvm_lapic_state", state["lapic"]))
    if tsc_offset is not None:
        msrs.pop(MSR_IA32_TSC, None)
        vcpu.set_tsc_offset(tsc_offset)
    refused = vcpu.set_msrs((index, data) for index, data in msrs.items() if index not in _LAST)
    refused += vcpu.set_msrs((index, msrs[index]) for index in _LAST if index in msrs)
    events = _struct("kvm_vcpu_events", state["vcpu_events"])
    events.flags |= (
        constants.VCPUEVENT_VALID_NMI_PENDING
        | constants.VCPUEVENT_VALID_SIPI_VECTOR
        | constants.VCPUEVENT_VALID_SHADOW
    )
    vcpu.set_vcpu_events(events)
    return refused


def _struct(name: str, data: bytes) -> Any:
    struct = new(name)
    ffi.buffer(struct)[:] = data
    return struct
