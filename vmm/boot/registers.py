"""The state a vCPU starts in, as the boot protocols ask for it.

64-bit boot protocol (Documentation/arch/x86/boot.rst): long mode, paging on with an identity map,
flat __BOOT_CS 0x10 and __BOOT_DS 0x18, rsi the zero page, interrupts off. PVH (Xen's
docs/misc/pvh.pandoc): 32-bit protected mode, paging off, ebx the start info.
"""

from __future__ import annotations

import struct

from vmm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.boot import BootState
    from vmm.kvm import Vcpu

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_FIXED = 1 << 1

MSR_MTRR_DEF_TYPE = 0x2FF
MTRR_ENABLE = 1 << 11
MTRR_WRITE_BACK = 6
MSR_MISC_ENABLE = 0x1A0
MISC_ENABLE_FAST_STRING = 1

_APIC_LVT_LINT0 = 0x350
_APIC_LVT_LINT1 = 0x360
_DELIVERY_EXTINT = 7 << 8
_DELIVERY_NMI = 4 << 8


def set_up(vcpu: Vcpu, state: BootState | None) -> None:
    """Give `vcpu` its state before the first instruction; None for an application processor,
    which waits for INIT and SIPI as the hardware leaves it."""
    # Firmware's part: caches on (write-back by default), or Linux maps all RAM uncached.
    vcpu.set_msrs(
        (
            (MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
            (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        )
    )
    _virtual_wire(vcpu)
    if state is None:
        return
    sregs = vcpu.get_sregs()
    long_mode = state.kind == "long64"
    code = (0, 0xFFFFFFFF, 0x10, 11, 1, 0, not long_mode, 1, long_mode, 1, 0, 0, 0)
    data = (0, 0xFFFFFFFF, 0x18, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    sregs.cs = code
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, data)
    sregs.tr = (0, 0x67, 0, 11, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    sregs.gdt.base, sregs.gdt.limit = layout.GDT, 4 * 8 - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    if long_mode:
        sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG
        sregs.cr3 = state.cr3
        sregs.cr4 = CR4_PAE
        sregs.efer = EFER_LME | EFER_LMA
    else:
        sregs.cr0 = CR0_PE | CR0_ET
        sregs.cr4 = 0
        sregs.efer = 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp = state.rip, state.rsp
    regs.rsi, regs.rbx = state.rsi, state.rbx
    regs.rflags = RFLAGS_FIXED
    vcpu.set_regs(regs)


def _virtual_wire(vcpu: Vcpu) -> None:
    """LINT0 takes the PIC, LINT1 NMI: the mode firmware leaves (MP spec 1.4, section 3.6.2.2)."""
    lapic = vcpu.get_lapic()
    _set_lapic_register(lapic, _APIC_LVT_LINT0, _DELIVERY_EXTINT)
    _set_lapic_register(lapic, _APIC_LVT_LINT1, _DELIVERY_NMI)
    vcpu.set_lapic(lapic)


def _set_lapic_register(lapic: Any, offset: int, value: int) -> None:
    from vmm.kvm.ffi import ffi

    struct.pack_into("<I", ffi.buffer(lapic), offset, value)
