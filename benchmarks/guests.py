"""Guests of a few instructions, given alike to Machine, to native.c and to QEMU.

Exits are made in long mode from an image at address 0 that holds its own GDT and page tables:
the first 2 MiB mapped one to one, then 2 MiB of device registers, all open to CPL3.
"""

from __future__ import annotations

import struct

from vmm.kvm import Vcpu
from vmm.layout import MIB, VIRTIO_MMIO_BASE

EXIT_0 = bytes.fromhex("b000 e6f4 f4")  # mov al, 0; out 0xf4, al; hlt
HALT = bytes.fromhex("fa f4 ebfd")  # cli; hlt; jmp to the hlt

OPERATIONS = {
    "PIO write": "e6f0",  # out 0xf0, al
    "PIO read": "e4f0",  # in al, 0xf0
    "MMIO write": "8903",  # mov [rbx], eax
    "MMIO read": "8b03",  # mov eax, [rbx]
}
"""Instructions that exit, in 64-bit code with rbx at the device registers."""
PORT = 0xF0
MMIO = VIRTIO_MMIO_BASE
MARK_PORT = 0xF1
"""Written before the first and after the last of the exits that are timed."""

_CODE = 0x8000
_GDT, _PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000, 0x4000
_USER_RW, _HUGE = 7, 1 << 7
_DESCRIPTORS = (
    *(0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF),  # kernel code 0x08, data 0x10
    *(0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF),  # user data 0x20, code 0x28
)


def pvh_elf(code: bytes) -> bytes:
    """An ELF kernel with a PVH note whose 32-bit entry, at 1 MiB, is `code`."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen", MIB)  # XEN_ELFNOTE_PHYS32_ENTRY
    notes_at = 64 + 2 * 56
    code_at = notes_at + len(note) + 12
    ident = b"\x7fELF\2\1\1" + bytes(9)
    head = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, MIB, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, code_at, MIB, MIB, len(code), 4096, 4096)
    notes = struct.pack("<IIQQQQQQ", 4, 4, notes_at, 0, 0, len(note), len(note), 4)
    return ident + head + load + notes + note + bytes(12) + code


def exits_image(operation: str, count: int) -> bytes:
    """Memory from address 0 for a guest that does `operation` `count` times, then ends."""
    image = bytearray(_CODE)
    struct.pack_into(f"<{len(_DESCRIPTORS)}Q", image, _GDT, *_DESCRIPTORS)
    struct.pack_into("<Q", image, _PML4, _PDPT | _USER_RW)
    struct.pack_into("<Q", image, _PDPT, _PD | _USER_RW)
    struct.pack_into("<QQ", image, _PD, _USER_RW | _HUGE, MMIO | _USER_RW | _HUGE)
    start = b"\xb9" + struct.pack("<I", count) + b"\xbb" + struct.pack("<I", 2 * MIB)
    mark = bytes((0xE6, MARK_PORT))
    loop = bytes.fromhex(OPERATIONS[operation]) + b"\xff\xc9"  # dec ecx
    again = b"\x75" + struct.pack("<b", -len(loop) - 2)  # jnz
    return bytes(image) + start + mark + loop + again + mark + EXIT_0


def dirty_image(pages: int, stride: int) -> bytes:
    """Memory from address 0 for a guest that writes to `pages` pages, `stride` bytes apart from
    2 MiB on (up to 1 GiB), then to the exit port, and again."""
    image = bytearray(exits_image("PIO write", 1)[:_CODE])
    for number in range(512):
        struct.pack_into("<Q", image, _PD + 8 * number, number * 2 * MIB | _USER_RW | _HUGE)
    start = b"\xb9" + struct.pack("<I", pages) + b"\xbf" + struct.pack("<I", 2 * MIB)
    loop = b"\x48\x89\x0f\x48\x81\xc7" + struct.pack("<I", stride)  # mov [rdi], rcx; add rdi
    loop += b"\xff\xc9"  # dec ecx
    again = b"\x75" + struct.pack("<b", -len(loop) - 2)  # jnz
    code = start + loop + again + EXIT_0[:4]
    return bytes(image) + code + b"\xeb" + struct.pack("<b", -len(code) - 2)


def busy_image() -> bytes:
    """Memory from address 0 for a guest that counts in the 64 bits at 2 MiB, and never ends."""
    image = dirty_image(0, 0)[:_CODE]
    loop = b"\x48\xff\x04\x25" + struct.pack("<I", 2 * MIB)  # inc qword [2 MiB]
    return image + loop + b"\xeb" + struct.pack("<b", -len(loop) - 2)


def set_long_mode(vcpu: Vcpu, cpl: int) -> None:
    """Let `vcpu` start in an image of `exits_image` at privilege level 0 or 3 (with IOPL 3)."""
    sregs = vcpu.get_sregs()
    code, data = (0x2B, 0x23) if cpl else (0x08, 0x10)
    # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
    sregs.cs = (0, 0xFFFFFFFF, code, 11, 1, cpl, 0, 1, 1, 1, 0, 0, 0)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, (0, 0xFFFFFFFF, data, 3, 1, cpl, 1, 1, 0, 1, 0, 0, 0))
    sregs.tr = (0, 0x67, 0, 11, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    sregs.gdt.base, sregs.gdt.limit = _GDT, 8 * len(_DESCRIPTORS) - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8000_0031, _PML4, 0x20, 0x500
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp = _CODE, 0x8FF0
    regs.rflags = 0x3002 if cpl else 2
    vcpu.set_regs(regs)
