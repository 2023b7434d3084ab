"""ACPI Machine Language, written directly: functions that return bytes (ACPI 6.5, chapter 20)."""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    Term = bytes | int | str

SYSTEM_MEMORY, SYSTEM_IO = 0, 1
"""Region spaces (section 20.2.5.2)."""
BYTE_ACC, DWORD_ACC = 1, 3
LOCAL0 = b"\x60"
ARG0 = b"\x68"


def pkg_length(content: bytes) -> bytes:
    """PkgLength and `content` (section 20.2.4); the length counts its own bytes."""
    for extra in range(4):
        total = len(content) + 1 + extra
        if total <= _MOST[extra]:
            return _encode_length(total, extra) + content
    raise ValueError(f"an AML package of {len(content)} bytes is too long")


_MOST = (0x3F, 0xFFF, 0xFFFFF, 0xFFFFFFF)
"""The highest PkgLength with so many bytes after its first."""


def _encode_length(value: int, extra: int) -> bytes:
    """A PkgLength of `extra` bytes after the first, which has the lowest 6, or 4, bits."""
    if not extra:
        return bytes((value,))
    return bytes((extra << 6 | value & 0xF,)) + (value >> 4).to_bytes(extra, "little")


_NAME_CHARACTERS = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


def name_seg(name: str) -> bytes:
    """A NameSeg: up to four of A-Z, 0-9 and _, no digit first; padded with underscores."""
    if not 1 <= len(name) <= 4 or set(name) - _NAME_CHARACTERS or name[0].isdigit():
        raise ValueError(f"{name!r} is no AML name")
    return name.ljust(4, "_").encode("ascii")


def name_string(path: str) -> bytes:
    """A NameString: `ABCD`, `\\_SB.PWRB`, `^ABCD`."""
    prefix = b""
    while path[:1] in ("\\", "^"):
        prefix += path[:1].encode()
        path = path[1:]
    parts = [name_seg(part) for part in path.split(".")] if path else []
    if not parts:
        return prefix + b"\x00"
    if len(parts) == 1:
        return prefix + parts[0]
    if len(parts) == 2:
        return prefix + b"\x2e" + parts[0] + parts[1]
    return prefix + b"\x2f" + bytes((len(parts),)) + b"".join(parts)


def integer(value: int) -> bytes:
    """The shortest encoding of an unsigned integer of up to 64 bits (section 20.2.3)."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << (8 * size):
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} is no AML integer: 0 to 64 bits")


def term(value: Term) -> bytes:
    """An operand: encoded bytes as they are, an integer, or a string."""
    if isinstance(value, int):
        return integer(value)
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(f"{value!r} is no AML string: it has a NUL in it")
        return b"\x0d" + value.encode("ascii") + b"\0"
    return value


def name(path: str, value: Term) -> bytes:
    """DefName."""
    return b"\x08" + name_string(path) + term(value)


def scope(path: str, *body: bytes) -> bytes:
    """DefScope."""
    return b"\x10" + pkg_length(name_string(path) + b"".join(body))


def device(path: str, *body: bytes) -> bytes:
    """DefDevice."""
    return b"\x5b\x82" + pkg_length(name_string(path) + b"".join(body))


def method(path: str, arguments: int, *body: bytes, serialized: bool = True) -> bytes:
    """DefMethod."""
    flags = arguments | (8 if serialized else 0)
    return b"\x14" + pkg_length(name_string(path) + bytes((flags,)) + b"".join(body))


def package(*elements: Term) -> bytes:
    """DefPackage."""
    body = b"".join(term(element) for element in elements)
    return b"\x12" + pkg_length(bytes((len(elements),)) + body)


def buffer(data: bytes) -> bytes:
    """DefBuffer with initial data."""
    return b"\x11" + pkg_length(integer(len(data)) + data)


def operation_region(path: str, space: int, offset: int, length: int) -> bytes:
    """DefOpRegion."""
    return b"\x5b\x80" + name_string(path) + bytes((space,)) + integer(offset) + integer(length)


def field(region: str, access: int, *fields: tuple[str, int]) -> bytes:
    """DefField: (name, bits) in order; no lock, preserve."""
    body = b"".join(name_seg(part) + _field_length(bits) for part, bits in fields)
    return b"\x5b\x81" + pkg_length(name_string(region) + bytes((access,)) + body)


def _field_length(bits: int) -> bytes:
    """A FieldElement's PkgLength: the number itself, not counting its own bytes."""
    for extra, most in enumerate(_MOST):
        if 0 < bits <= most:
            return _encode_length(bits, extra)
    raise ValueError(f"an AML field of {bits} bits")


def store(value: Term, target: bytes) -> bytes:
    """DefStore."""
    return b"\x70" + term(value) + target


def bit_and(left: Term, right: Term) -> bytes:
    """DefAnd without a target."""
    return b"\x7b" + term(left) + term(right) + b"\0"


def if_(condition: bytes, *body: bytes) -> bytes:
    """DefIfElse without Else."""
    return b"\xa0" + pkg_length(condition + b"".join(body))


def notify(path: str, value: int) -> bytes:
    """DefNotify."""
    return b"\x86" + name_string(path) + integer(value)


def return_(value: Term) -> bytes:
    """DefReturn."""
    return b"\xa4" + term(value)


def eisa_id(text: str) -> bytes:
    """A compressed EISA id, e.g. PNP0501 (section 19.3.4)."""
    letters = [ord(c) - 0x40 for c in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


# --- resources (section 6.4) --------------------------------------------------------------------


def resource_template(*descriptors: bytes) -> bytes:
    """ResourceTemplate: descriptors and an end tag (checksum 0: not checked)."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io(base: int, length: int) -> bytes:
    """IO (Decode16, base, base, 1, length)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq_no_flags(number: int) -> bytes:
    """IRQNoFlags: an ISA interrupt, edge-triggered, active high, exclusive."""
    return struct.pack("<BH", 0x22, 1 << number)


def memory32_fixed(base: int, length: int, *, writable: bool = True) -> bytes:
    """Memory32Fixed."""
    return struct.pack("<BHBII", 0x86, 9, int(writable), base, length)


def interrupt(gsi: int, *, edge: bool = True) -> bytes:
    """Interrupt (ResourceConsumer, Edge or Level, ActiveHigh, Exclusive) {gsi}."""
    return struct.pack("<BHBBI", 0x89, 6, 1 | (2 if edge else 0), 1, gsi)


def address_space(
    kind: int, minimum: int, length: int, *, bits: int = 32, specific: int = 0
) -> bytes:
    """(D|Q)WordMemory, WordBusNumber: a window that children take from, fixed at both ends.

    `kind` is 0 memory, 1 I/O, 2 bus numbers; `specific` the type-specific flags.
    """
    tags = {
        16: (0x88, "<BHBBBHHHHH", 13),
        32: (0x87, "<BHBBBIIIII", 23),
        64: (0x8A, "<BHBBBQQQQQ", 43),
    }
    tag, form, size = tags[bits]
    maximum = minimum + length - 1
    return struct.pack(form, tag, size, kind, 0x0C, specific, 0, minimum, maximum, 0, length)
