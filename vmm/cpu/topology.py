"""Topology leaves: N vCPUs are one socket of N cores of one thread, with APIC ids 0 to N-1.

Intel: leaves 1, 4, 0xb and 0x1f (SDM volume 2A; volume 3A, 9.9). AMD: leaves 1, 0xb, 0x80000001,
0x80000008, 0x8000001d and 0x8000001e (APM volume 3, E.3 to E.5). Linux reads them in
arch/x86/kernel/cpu/{topology,common,amd,intel,cacheinfo}.c.
"""

from __future__ import annotations

from vmm.kvm.cpuid import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, CpuidEntry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Table = dict[tuple[int, int], CpuidEntry]

HTT = 1 << 28
"""Leaf 1 EDX: more than one logical processor in the package."""
CMP_LEGACY = 1 << 1
"""Leaf 0x80000001 ECX: those are cores, not threads."""
TOPOEXT = 1 << 22
"""Leaf 0x80000001 ECX: leaves 0x8000001d and 0x8000001e are there."""

LEVEL_SMT = 1 << 8
LEVEL_CORE = 2 << 8
"""Level types in ECX of leaves 0xb and 0x1f."""

_LAST_LEVEL = 3
"""Caches below this level belong to one core; this one and those above, to the socket."""

_AMD = ((0x6874_7541, 0x444D_4163), (0x6F67_7948, 0x656E_6975))
"""EBX, ECX of leaf 0: AuthenticAMD, HygonGenuine."""


def id_bits(cpus: int) -> int:
    """Bits of APIC id that tell `cpus` cores apart."""
    return (cpus - 1).bit_length()


def is_amd(table: Table) -> bool:
    """Whether the table's processor has AMD's leaves."""
    leaf = table.get((0, 0))
    return leaf is not None and (leaf.ebx, leaf.ecx) in _AMD


def apply(base: Iterable[CpuidEntry], cpus: int) -> list[CpuidEntry]:
    """`base` with the topology of `cpus` cores, as vCPU 0 sees it.

    Entries of `base` are changed in place; what is missing is added. `for_vcpu` makes the others'.
    """
    table = {(entry.function, entry.index): entry for entry in base}
    amd = is_amd(table)
    _leaf_1(table, cpus)
    _x2apic_levels(table, cpus)
    if amd:
        _amd(table, cpus)
    else:
        _intel(table, cpus)
    return list(table.values())


def for_vcpu(base: list[CpuidEntry], vcpu: int) -> list[CpuidEntry]:
    """The table of the vCPU with APIC id `vcpu`, from `apply`'s.

    Only the entries that hold the id are new; the others are `base`'s own and must not be changed.
    """
    return [_with_id(entry, vcpu) if entry.function in _HOLD_ID else entry for entry in base]


_HOLD_ID = frozenset((0x1, 0xB, 0x1F, 0x8000_001E))


def _with_id(entry: CpuidEntry, vcpu: int) -> CpuidEntry:
    entry = entry.copy()
    if entry.function == 0x1:
        entry.ebx = entry.ebx & 0x00FF_FFFF | (vcpu & 0xFF) << 24
    elif entry.function == 0x8000_001E:
        entry.eax = vcpu
        entry.ebx = entry.ebx & ~0xFF | vcpu & 0xFF
    else:
        entry.edx = vcpu
    return entry


def _leaf_1(table: Table, cpus: int) -> None:
    """EBX: initial APIC id 31:24, logical processors 23:16; EDX: HTT."""
    leaf = table.setdefault((1, 0), CpuidEntry(1))
    leaf.ebx = leaf.ebx & 0xFFFF | min(cpus, 255) << 16
    leaf.edx = leaf.edx & ~HTT | (HTT if cpus > 1 else 0)


def _x2apic_levels(table: Table, cpus: int) -> None:
    """Leaf 0xb, and 0x1f where the table reaches that far: one thread a core, `cpus` cores."""
    first = table.setdefault((0, 0), CpuidEntry(0))
    first.eax = max(first.eax, 0xB)
    for function in (0xB, 0x1F):
        for key in [key for key in table if key[0] == function]:
            del table[key]
        if function > first.eax:
            continue
        levels = ((0, 1, LEVEL_SMT), (id_bits(cpus), cpus, LEVEL_CORE), (0, 0, 0))
        for index, (shift, count, kind) in enumerate(levels):
            # Without this flag KVM would answer every subleaf with the first.
            table[function, index] = CpuidEntry(
                function, index, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, shift, count, kind | index
            )


def _intel(table: Table, cpus: int) -> None:
    """Leaf 4 EAX: ids that share the cache less one in 25:14, cores' ids less one in 31:26."""
    span = (1 << id_bits(cpus)) - 1
    for (function, _), leaf in table.items():
        if function == 0x4 and leaf.eax & 0x1F:
            sharing = min(span, 0xFFF) if leaf.eax >> 5 & 7 >= _LAST_LEVEL else 0
            leaf.eax = leaf.eax & 0x3FFF | sharing << 14 | min(span, 0x3F) << 26


def _amd(table: Table, cpus: int) -> None:
    table.pop((0x4, 0), None)  # reserved; some hosts' KVM repeats it
    # Linux 6.9 and later prefer this leaf; leaf 0xb says the same.
    for key in [key for key in table if key[0] == 0x8000_0026]:
        del table[key]
    extended = table.get((0x8000_0001, 0))
    if extended is not None:
        extended.ecx = extended.ecx & ~CMP_LEGACY | (CMP_LEGACY if cpus > 1 else 0)
    sizes = table.get((0x8000_0008, 0))
    if sizes is not None:
        # ApicIdSize 15:12; NC 7:0, cores less one.
        sizes.ecx = sizes.ecx & ~0xF0FF | id_bits(cpus) << 12 | min(cpus - 1, 0xFF)
    if extended is None or not extended.ecx & TOPOEXT:
        return
    for (function, _), leaf in table.items():
        if function == 0x8000_001D and leaf.eax & 0x1F:
            sharing = min(cpus - 1, 0xFFF) if leaf.eax >> 5 & 7 >= _LAST_LEVEL else 0
            leaf.eax = leaf.eax & 0x3FFF | sharing << 14
    # EAX: APIC id; EBX: core id 7:0, threads less one 15:8; ECX: node 7:0, nodes less one 10:8.
    table[0x8000_001E, 0] = CpuidEntry(0x8000_001E)
    last = table.get((0x8000_0000, 0))
    if last is not None:
        last.eax = max(last.eax, 0x8000_001E)
