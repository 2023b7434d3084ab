"""vmm/boot/registers.py: what the boot protocols promise, read back and seen by the guest."""

from __future__ import annotations

import struct

import pytest

from tests.support.guests import CODE, Guest, assemble
from vmm import Machine, MachineConfig, layout
from vmm.boot import paging, registers
from vmm.boot.state import BootState
from vmm.kvm.ffi import ffi
from vmm.layout import MIB

pytestmark = pytest.mark.needs_kvm

BOOT_CS, BOOT_DS = 0x10, 0x18
LONG = BootState("long64", 0x100200, rsi=layout.ZERO_PAGE, rsp=layout.BOOT_STACK, cr3=layout.PML4)
PVH = BootState("pvh32", 0x100000, rbx=layout.PVH_START_INFO, rsp=layout.BOOT_STACK)


@pytest.mark.parametrize("state", [LONG, PVH], ids=["long64", "pvh32"])
def test_general_registers(state: BootState) -> None:
    with Guest("hlt") as guest:
        registers.set_up(guest.vcpu, state)
        regs = guest.vcpu.get_regs()
    assert (regs.rip, regs.rsp) == (state.rip, layout.BOOT_STACK)
    assert (regs.rsi, regs.rbx) == (state.rsi, state.rbx)
    assert regs.rflags == 2, "interrupts off, direction up"


def test_long_mode_with_an_identity_map() -> None:
    """boot.rst, "64-bit boot protocol"."""
    with Guest("hlt", "real") as guest:
        registers.set_up(guest.vcpu, LONG)
        sregs = guest.vcpu.get_sregs()
    assert sregs.cr0 & 0x80000001 == 0x80000001, "PG and PE"
    assert sregs.cr3 == layout.PML4
    assert sregs.cr4 & 1 << 5, "PAE"
    assert sregs.efer & 0x500 == 0x500, "LME and LMA"
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.dpl) == (BOOT_CS, 1, 0, 0)
    assert (sregs.gdt.base, sregs.gdt.limit) == (layout.GDT, 31)


def test_protected_mode_without_paging() -> None:
    """Xen's docs/misc/pvh.pandoc: cr0 only PE (and ET), cr4 all clear, flat segments."""
    with Guest("hlt") as guest:
        registers.set_up(guest.vcpu, PVH)
        sregs = guest.vcpu.get_sregs()
    assert sregs.cr0 & ~0x10 == 1
    assert sregs.cr4 == 0
    assert sregs.efer & 0x500 == 0
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.dpl) == (BOOT_CS, 0, 1, 0)
    assert (sregs.tr.base, sregs.tr.limit) == (0, 0x67)


@pytest.mark.parametrize("state", [LONG, PVH], ids=["long64", "pvh32"])
def test_segments_are_flat(state: BootState) -> None:
    with Guest("hlt", "real") as guest:
        registers.set_up(guest.vcpu, state)
        sregs = guest.vcpu.get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        assert (segment.base, segment.limit, segment.g) == (0, 0xFFFFFFFF, 1), name
        assert (segment.present, segment.unusable) == (1, 0), name
        if name != "cs":
            assert (segment.selector, segment.type) == (BOOT_DS, 3), name


@pytest.mark.parametrize("state", [LONG, None], ids=["boot processor", "application processor"])
def test_what_firmware_does_for_every_processor(state: BootState | None) -> None:
    with Guest("hlt") as guest:
        registers.set_up(guest.vcpu, state)
        # Caches: MTRRs on, write-back by default.
        assert guest.vcpu.get_msrs([0x2FF]) == {0x2FF: 0x806}
        lapic = bytes(ffi.buffer(guest.vcpu.get_lapic()))
    lint0, lint1 = struct.unpack_from("<I", lapic, 0x350), struct.unpack_from("<I", lapic, 0x360)
    assert lint0[0] & 0x10700 == 0x700, "LINT0 takes the PIC, unmasked"
    assert lint1[0] & 0x10700 == 0x400, "LINT1 takes NMIs, unmasked"


def test_an_application_processor_stays_as_it_is() -> None:
    with Guest("hlt", "real") as guest:
        before = bytes(ffi.buffer(guest.vcpu.get_sregs()))
        rip = guest.get("rip")
        registers.set_up(guest.vcpu, None)
        assert bytes(ffi.buffer(guest.vcpu.get_sregs())) == before
        assert guest.get("rip") == rip == CODE


# Reloading the segments proves that the GDT in memory is what the hidden parts say.
LOOK = """
    mov %ds, %eax; cmp $0x18, %ax; jne 1f
    mov %cs, %eax; cmp $0x10, %ax; jne 1f
    mov $0x18, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss
    {jump}
2:  mov %cr0, %{a}x; and $0x80000001, %eax; cmp ${cr0}, %eax; jne 1f
    pushf; pop %{a}x; test $0x200, %eax; jnz 1f
    cmp ${info}, %e{register}; jne 1f
    done 0
1:  done 1
"""
JUMPS = {"long": "push $0x10; push $2f; lretq", "protected": "ljmp $0x10, $2f"}


@pytest.mark.parametrize("kind", ["long64", "pvh32"])
def test_a_guest_finds_it_so(kind: str) -> None:
    mode, a, cr0 = ("long", "ra", 0x80000001) if kind == "long64" else ("protected", "ea", 1)
    register = "si" if kind == "long64" else "bx"
    code = assemble(
        LOOK.format(a=a, cr0=cr0, info=0x7000, register=register, jump=JUMPS[mode]), mode
    )
    state = BootState(
        kind, CODE, rsi=0x7000, rbx=0x7000, rsp=layout.BOOT_STACK,
        cr3=layout.PML4 if kind == "long64" else 0,
    )  # fmt: skip
    with Machine(MachineConfig(memory=4 * MIB, timeout=60)) as machine:
        paging.write_gdt(machine.memory, paging.CODE_64 if kind == "long64" else paging.CODE_32)
        paging.write_page_tables(machine.memory)
        machine.memory.write(CODE, code)
        registers.set_up(machine.vcpus[0], state)
        machine.start()
        ended = machine.wait()
    assert (ended.kind, ended.status) == ("exit-port", 0), ended.report
