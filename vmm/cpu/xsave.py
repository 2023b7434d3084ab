"""CPUID leaf 0xd: the parts of the XSAVE area, kept in step with the features that use them.

Intel SDM volume 1, chapter 13; AMD APM volume 3, E.3.8.
"""

from __future__ import annotations

from vmm.cpu import features

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm.cpuid import CpuidEntry

LEGACY_SIZE = 512 + 64
"""Bytes of the FXSAVE area and the XSAVE header; the other parts follow."""

_X87_SSE = 0b11

_USERS = (
    # What uses a part, the part's bits in XCR0 | IA32_XSS.
    ("avx", 1 << 2),
    ("mpx", 0b11 << 3),
    ("avx512f", 0b111 << 5),
    ("intel_pt", 1 << 8),
    ("pku", 1 << 9),
    ("enqcmd", 1 << 10),
    ("arch_lbr", 1 << 15),
    ("amx_tile", 0b11 << 17),
    ("apx_f", 1 << 19),
    ("lwp", 1 << 62),
)
_CET = 0b11 << 11
"""Bits 11 (user) and 12 (supervisor) of IA32_XSS; shstk or ibt uses them."""


def parts(chosen: int) -> tuple[int, int]:
    """Bits of XCR0 and IA32_XSS that a set of features uses, and all those a feature can use."""
    known = used = _X87_SSE
    for name, bits in _USERS:
        known |= bits
        if chosen >> features.BITS[name] & 1:
            used |= bits
    if chosen & features.flags("shstk ibt"):
        used |= _CET
    return used, known | _CET


_STATE = "avx mpx avx512f pku amx_tile apx_f lwp"
"""Features of `_USERS` that the guest's kernel uses through XSETBV and XSAVE alone."""


def half_declared(table: dict[tuple[int, int], CpuidEntry]) -> int:
    """The set of features whose registers a host's table gives no place in the XSAVE area, or not
    all of it.

    KVM's table has AMX in leaf 7 also where this process has no permission for its state
    (arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)); leaf 0xd then has none of its two parts, or before
    Linux 6.4 the first. A guest that believes leaf 7 dies of the XSETBV.
    """
    there = 0
    for subleaf, low, high in ((0, "eax", "edx"), (1, "ecx", "edx")):
        entry = table.get((0xD, subleaf))
        if entry is not None:
            there |= getattr(entry, low) | getattr(entry, high) << 32
    for bit in range(2, 63):
        if there >> bit & 1 and not ((0xD, bit) in table and table[0xD, bit].eax):
            there &= ~(1 << bit)
    missing = 0
    for name, bits in _USERS:
        if there & bits != bits and name in _STATE.split():
            missing |= features.flags(name)
    if there & _CET != _CET:
        missing |= features.flags("shstk ibt")
    if missing & features.flags("amx_tile"):
        missing |= features.flags("xfd")  # nothing else is enabled by it
    return missing


def trim(
    table: dict[tuple[int, int], CpuidEntry], chosen: int, *, known_only: bool = False
) -> None:
    """Take the parts that no chosen feature uses out of leaf 0xd; all of it without xsave.

    Parts of features without a name here stay, unless `known_only`. EBX of subleaves 0 and 1 (the
    size for what is enabled) is KVM's to fill in while the guest runs.
    """
    if not chosen & features.flags("xsave"):
        for key in [key for key in table if key[0] == 0xD]:
            del table[key]
        return
    first = table.get((0xD, 0))
    if first is None:
        return
    used, known = parts(chosen)
    mask = used if known_only else used | ~known & 0xFFFF_FFFF_FFFF_FFFF
    first.eax &= mask & 0xFFFF_FFFF
    first.edx &= mask >> 32
    system = table.get((0xD, 1))
    if system is not None:
        if not chosen & features.flags("xsaves"):
            system.ecx = system.edx = 0
        system.ecx &= mask & 0xFFFF_FFFF
        system.edx &= mask >> 32
        if not chosen & features.flags("xsavec xsaves"):
            system.ebx = 0
    user = first.eax | first.edx << 32
    kept = user | (system.ecx | system.edx << 32 if system is not None else 0)
    size = LEGACY_SIZE
    for key in [key for key in table if key[0] == 0xD and key[1] > 1]:
        if not kept >> key[1] & 1:
            del table[key]
        elif user >> key[1] & 1:
            part = table[key]
            size = max(size, part.ebx + part.eax)
    first.ecx = size
    first.ebx = LEGACY_SIZE
