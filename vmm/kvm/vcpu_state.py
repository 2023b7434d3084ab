"""All of a vCPU's state, saved as plain data and restored.

Order matters on restore: the processor model and system registers before what depends on them
(XCR0 before XSAVE, APIC base before the local APIC, the TSC deadline after the APIC's timer mode),
and pending events last, as loading other state may clear them.
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

MSR_IA32_TSC = 0x10
MSR_IA32_TSC_DEADLINE = 0x6E0

_STRUCTS = ("regs", "xcrs", "debugregs", "lapic", "vcpu_events")


def save(vcpu: Vcpu, msr_indices: Sequence[int]) -> dict[str, Any]:
    """State of a parked vCPU as ints, bytes, lists and dicts.

    Args:
        msr_indices: from `Kvm.msr_index_list`.
    """
    state: dict[str, Any] = {"mp_state": vcpu.get_mp_state()}
    for name in _STRUCTS:
        state[name] = bytes(ffi.buffer(getattr(vcpu, f"get_{name}")()))
    state["sregs"] = bytes(ffi.buffer(vcpu.get_sregs()))
    state["xsave"] = bytes(vcpu.get_xsave())
    state["msrs"] = vcpu.get_msrs(msr_indices)
    state["tsc_khz"] = vcpu.get_tsc_khz()
    state["cpuid"] = [
        (e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in vcpu.get_cpuid2()
    ]
    return state


def restore(vcpu: Vcpu, state: dict[str, Any]) -> list[int]:
    """Put a saved state into a vCPU that has not run; the MSR indices KVM refused."""
    vcpu.set_cpuid2([CpuidEntry(*entry) for entry in state["cpuid"]])
    if vcpu.get_tsc_khz() != state["tsc_khz"]:
        vcpu.set_tsc_khz(state["tsc_khz"])
    vcpu.set_mp_state(state["mp_state"])
    vcpu.set_regs(_struct("kvm_regs", state["regs"]))
    vcpu.set_sregs(_struct("kvm_sregs", state["sregs"]))
    vcpu.set_xcrs(_struct("kvm_xcrs", state["xcrs"]))
    vcpu.set_xsave(bytearray(state["xsave"]))
    vcpu.set_debugregs(_struct("kvm_debugregs", state["debugregs"]))
    vcpu.set_lapic(_struct("kvm_lapic_state", state["lapic"]))
    msrs: dict[int, int] = state["msrs"]
    last = {MSR_IA32_TSC_DEADLINE}
    refused = vcpu.set_msrs((index, data) for index, data in msrs.items() if index not in last)
    refused += vcpu.set_msrs((index, msrs[index]) for index in last if index in msrs)
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
