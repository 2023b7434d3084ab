"""Guests of a few instructions, for examples and tests where any guest will do.

    python -m vmm.testing.guests login vmlinuz

writes the guest `login` as the file `vmlinuz`: a 64-bit ELF executable with a PVH note (the Xen
document "x86/HVM direct boot ABI"), which `vmm run` boots and every KVM can run. The names are
those of GUESTS. The code is 32-bit protected mode with flat segments, no paging, no IDT and
interrupts off, at ENTRY.
"""

from __future__ import annotations

import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

ENTRY = 1 << 20
"""The GPA that a guest's code is loaded at and started from."""
COUNTER = 0x200000
"""The GPA that `count` counts at, 32 bits, little-endian."""
PAGE = 4096
_PVH_NOTE = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", ENTRY)
"""ELF note XEN_ELFNOTE_PHYS32_ENTRY (18): the entry's physical address."""

HALT = b"\xf4\xeb\xfd"  # 1: hlt; jmp 1b
SPIN = b"\xeb\xfe"  # 1: jmp 1b


def counting(place: int) -> bytes:
    """Code that increments the 32 bits at GPA `place` for ever."""
    return b"\xff\x05" + struct.pack("<I", place) + b"\xeb\xf8"  # 1: inc [place]; jmp 1b


def out(port: int, value: int) -> bytes:
    """Code that writes the byte `value` to an I/O port."""
    # mov dx, port; mov al, value; out dx, al
    return b"\x66\xba" + struct.pack("<H", port) + b"\xb0" + bytes((value,)) + b"\xee"


def prints(text: bytes) -> bytes:
    """Code that sends `text` to the serial port."""
    return b"".join(out(0x3F8, byte) for byte in text)


def exits(status: int) -> bytes:
    """Code that ends the machine with `status`, by I/O port 0xf4."""
    return out(0xF4, status) + HALT


POWEROFF = out(0x600, 5 << 2 | 1 << 5)
"""Code that powers off: SLP_TYP 5 and SLP_EN to the sleep control register (ACPI 6.5, 4.8.3.7)."""

LOGIN = (
    # Echoes what is typed, until the power button is pressed.
    # loop: mov dx, 0x604; in eax, dx; test al, 1; jnz off; mov dx, 0x3fd; in al, dx; test al, 1
    #       jz loop; mov dx, 0x3f8; in al, dx; out dx, al; jmp loop; off:
    prints(b"Welcome\n\nhost login: ")
    + bytes.fromhex("66ba0406 ed a801 7511 66bafd03 ec a801 74ee 66baf803 ec ee ebe6")
    + POWEROFF
    + HALT
)

GUESTS = {
    "login": (LOGIN, "a login prompt; echoes what is typed; powers off at the power button"),
    "count": (counting(COUNTER), f"counts in the 32 bits at {COUNTER:#x}"),
    "halt": (HALT, "does nothing"),
    "spin": (SPIN, "does nothing, busily"),
    "suite": (
        prints(b"booting\nall tests passed\n") + exits(0),
        "prints two lines and ends with status 0",
    ),
    # mov dx, 0x510; in eax, dx; inc eax; mov [0xd8000000], eax
    "device": (
        b"\x66\xba\x10\x05\xed\x40\xa3\x00\x00\x00\xd8" + exits(0),
        "reads 4 bytes at I/O port 0x510, adds 1, writes them to 0xd8000000",
    ),
}
"""The guests that have names: the code, and what it does."""


def image(code: bytes) -> bytes:
    """An ELF file of one segment with `code`, and a PVH note."""
    size = max(len(code), PAGE)
    note, segment = 64 + 2 * 56, 64 + 2 * 56 + len(_PVH_NOTE)
    ident = b"\x7fELF\2\1\1" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, segment, 0, ENTRY, len(code), size, PAGE)
    notes = struct.pack("<IIQQQQQQ", 4, 4, note, 0, 0, len(_PVH_NOTE), len(_PVH_NOTE), 4)
    return ident + header + load + notes + _PVH_NOTE + code


def write(name: str, path: str | PathLike[str]) -> None:
    """Write the guest `name`, one of GUESTS, to the file `path`. KeyError for no such name."""
    with open(path, "wb") as file:
        file.write(image(GUESTS[name][0]))


def main(arguments: Sequence[str]) -> int:
    """`python -m vmm.testing.guests NAME FILE`; the exit status."""
    if len(arguments) != 2 or arguments[0] not in GUESTS:
        print("usage: python -m vmm.testing.guests NAME FILE; NAME is", file=sys.stderr)
        for name, (_, what) in GUESTS.items():
            print(f"  {name:7} {what}", file=sys.stderr)
        return 2
    try:
        write(*arguments)
    except OSError as err:
        print(f"guests: {arguments[1]}: {err.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
