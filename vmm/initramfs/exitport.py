"""A program of 182 bytes for the guest: `vmm-exit N` ends the machine with status N.

/dev/port would do as well, where the guest's kernel has it (CONFIG_DEVPORT; Debian's cloud kernel
does not).
"""

from __future__ import annotations

import struct

from vmm.layout import PORT_EXIT

_BASE = 0x400000
_CODE = bytes.fromhex(
    "488b742410"  # mov  rsi, [rsp+16]     argv[1]
    "31c0"  # xor  eax, eax
    "4885f6"  # test rsi, rsi
    "7415"  # jz   2f
    "0fb60e"  # 1: movzx ecx, byte [rsi]
    "83e930"  # sub  ecx, '0'
    "83f909"  # cmp  ecx, 9
    "770a"  # ja   2f
    "6bc00a"  # imul eax, eax, 10
    "01c8"  # add  eax, ecx
    "48ffc6"  # inc  rsi
    "ebeb"  # jmp  1b
    "89c3"  # 2: mov ebx, eax
    "b8ad000000"  # mov eax, 173          ioperm(PORT_EXIT, 1, 1)
    f"bf{PORT_EXIT:02x}000000"  # mov edi, PORT_EXIT
    "be01000000"  # mov esi, 1
    "89f2"  # mov edx, esi
    "0f05"  # syscall
    f"ba{PORT_EXIT:02x}000000"  # mov edx, PORT_EXIT
    "93"  # xchg eax, ebx
    "ee"  # out dx, al             the machine is over; SIGSEGV if ioperm was refused
    "f4"  # hlt
)


def exit_program() -> bytes:
    """A static x86-64 ELF executable for Linux; run as root with the status, 0 to 255."""
    start = 64 + 56
    size = start + len(_CODE)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, 62, 1, _BASE + start, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + _CODE
