"""vmm.cpu.xsave: leaf 0xd follows the features."""

from __future__ import annotations

import pytest

from tests.support.cpuid_tables import TABLES, by_leaf
from vmm.cpu import features, policy, xsave
from vmm.errors import UsageError
from vmm.kvm.cpuid import CpuidEntry


@pytest.mark.parametrize(
    ("text", "xcr0", "size", "subleaves"),
    [
        # x87, SSE, AVX, opmask, ZMM_Hi256, Hi16_ZMM, PKRU: SDM volume 1, 13.1.
        ("host", 0x2E7, 0xA88, {0, 2, 5, 6, 7, 9}),
        ("host,-pku", 0xE7, 0xA80, {0, 2, 5, 6, 7}),
        ("host,-avx512f", 0x207, 0xA88, {0, 2, 9}),
        ("host,-avx2,-pku", 0x7, 0x340, {0, 2}),
        ("host,-avx,-pku", 0x3, 0x240, {0}),
        ("x86-64-v3", 0x7, 0x340, {0, 2}),
        ("x86-64-v4", 0xE7, 0xA80, {0, 2, 5, 6, 7}),
    ],
)
def test_area_of_an_intel_processor(text: str, xcr0: int, size: int, subleaves: set[int]) -> None:
    table = by_leaf(policy.resolve(TABLES["intel"](), text))
    assert table[0xD, 0].eax == xcr0
    assert table[0xD, 0].ecx == size
    assert {index for leaf, index in table if leaf == 0xD and index != 1} == subleaves


@pytest.mark.parametrize("text", ["host,-xsave", "x86-64-v2"])
def test_no_area_without_xsave(text: str) -> None:
    for name in ("intel", "amd_nested"):
        table = by_leaf(policy.resolve(TABLES[name](), text))
        assert not [leaf for leaf, _ in table if leaf == 0xD]


def test_pvm_reports_an_area_without_xsave() -> None:
    supported = by_leaf(TABLES["amd_pvm"]())
    assert supported[0xD, 0].eax and not supported[0x1, 0].ecx >> 26 & 1
    assert (0xD, 0) not in by_leaf(policy.resolve(supported.values(), "host"))


def test_kvm_s_own_table_needs_no_change() -> None:
    before = by_leaf(TABLES["amd_nested"]())
    after = by_leaf(policy.resolve(before.values(), "host"))
    for index in (0, 2, 9):
        assert (after[0xD, index].eax, after[0xD, index].ecx) == (
            before[0xD, index].eax,
            before[0xD, index].ecx,
        )


def test_unknown_parts_stay_with_their_unknown_features() -> None:
    table = by_leaf(TABLES["intel"]())
    table[0xD, 0].eax |= 1 << 25
    chosen = features.read(table)
    xsave.trim(table, chosen)
    assert table[0xD, 0].eax == 0x2E7 | 1 << 25
    xsave.trim(table, chosen, known_only=True)
    assert table[0xD, 0].eax == 0x2E7


def test_supervisor_parts_need_xsaves() -> None:
    table = by_leaf(TABLES["intel"]())
    features.write(table, features.read(table) | features.flags("shstk xsaves"), known_only=False)
    table[0xD, 1].ecx = 1 << 11 | 1 << 12 | 1 << 8
    xsave.trim(table, features.read(table) & ~features.flags("intel_pt"))
    assert table[0xD, 1].ecx == 1 << 11 | 1 << 12
    xsave.trim(table, features.read(table) & ~features.flags("shstk xsaves"))
    assert table[0xD, 1].ecx == 0


AMX = ("amx_tile", "amx_int8", "amx_bf16")


def with_amx(parts: int) -> dict[tuple[int, int], CpuidEntry]:
    """The Intel table with AMX in leaf 7, and of its two parts of the area those of `parts`."""
    table = by_leaf(TABLES["intel"]())
    for name in (*AMX, "xfd"):
        leaf, subleaf, register, bit = features.location(name)
        entry = table.setdefault((leaf, subleaf), CpuidEntry(leaf, subleaf, 1))
        setattr(entry, register, getattr(entry, register) | 1 << bit)
    table[0xD, 0].eax |= parts
    for bit, size, offset in ((17, 64, 2752), (18, 8192, 2816)):
        if parts >> bit & 1:
            table[0xD, bit] = CpuidEntry(0xD, bit, 1, size, offset, 2, 0)
    table[0x1D, 0] = CpuidEntry(0x1D, 0, 1, 1)
    table[0x1D, 1] = CpuidEntry(0x1D, 1, 1, 0x04002000, 0x00080040, 16)
    table[0x1E, 0] = CpuidEntry(0x1E, 0, 1, 0, 0x4010)
    return table


@pytest.mark.parametrize("text", ["host", "max"])
@pytest.mark.parametrize("parts", [0, 1 << 17, 1 << 18, 0b11 << 17])
def test_amx_is_wholly_there_or_wholly_gone(text: str, parts: int) -> None:
    """KVM's tables with and without ARCH_REQ_XCOMP_GUEST_PERM, of Linux 5.17 to 6.3 and later."""
    table = by_leaf(policy.resolve(with_amx(parts).values(), text))
    there = parts == 0b11 << 17
    chosen = features.names_in(features.read(table))
    assert [name for name in (*AMX, "xfd") if name in chosen] == ([*AMX, "xfd"] if there else [])
    assert table[0xD, 0].eax & 0b11 << 17 == (parts if there else 0)
    assert {leaf for leaf, _ in table if leaf in (0x1D, 0x1E)} == ({0x1D, 0x1E} if there else set())
    assert {index for leaf, index in table if leaf == 0xD and index in (17, 18)} == (
        {17, 18} if there else set()
    )
    if not there:
        with pytest.raises(UsageError, match="amx_tile"):
            policy.resolve(with_amx(parts).values(), f"{text},+amx_tile")


@pytest.mark.parametrize(
    ("bit", "gone"), [(2, "avx avx2 avx512f fma f16c"), (5, "avx512f avx512bw"), (9, "pku")]
)
@pytest.mark.parametrize("how", ["not in XCR0", "no subleaf", "of no size"])
def test_features_without_a_place_for_their_registers_go(bit: int, gone: str, how: str) -> None:
    table = by_leaf(TABLES["intel"]())
    before = features.names_in(features.read(by_leaf(policy.resolve(table.values(), "host"))))
    assert set(gone.split()) <= set(before)
    if how == "not in XCR0":
        table[0xD, 0].eax &= ~(1 << bit)
    elif how == "no subleaf":
        del table[0xD, bit]
    else:
        table[0xD, bit].eax = 0
    after = by_leaf(policy.resolve(table.values(), "host"))
    assert not set(gone.split()) & set(features.names_in(features.read(after)))
    assert not after[0xD, 0].eax >> bit & 1
    assert (0xD, bit) not in after
    if bit < 9:
        with pytest.raises(UsageError):
            policy.resolve(table.values(), "x86-64-v4")
