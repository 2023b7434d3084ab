"""The calls of a vCPU that cross to the machine's process, by what they take and give."""

from __future__ import annotations

STRUCTS = {
    "regs": "kvm_regs",
    "sregs": "kvm_sregs",
    "sregs2": "kvm_sregs2",
    "fpu": "kvm_fpu",
    "xcrs": "kvm_xcrs",
    "debugregs": "kvm_debugregs",
    "lapic": "kvm_lapic_state",
    "vcpu_events": "kvm_vcpu_events",
}
"""`get_X` gives, and `set_X` takes, this structure; its bytes cross."""
AREAS_OUT = ("get_xsave", "get_xsave2", "get_nested_state")
AREAS_IN = ("set_xsave", "set_nested_state")
"""Calls that give, or take, bytes."""
PLAIN = (
    "get_mp_state", "set_mp_state", "get_tsc_khz", "set_tsc_khz", "get_tsc_offset",
    "set_tsc_offset", "interrupt", "nmi", "kvmclock_ctrl", "set_guest_debug", "translate",
    "set_msrs",
)  # fmt: skip
"""Calls with numbers, or lists of them."""
