"""vmm.cpu.xsave: leaf 0xd follows the features."""

from __future__ import annotations

import pytest

from tests.support.cpuid_tables import TABLES, by_leaf
from vmm.cpu import features, policy, xsave


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
