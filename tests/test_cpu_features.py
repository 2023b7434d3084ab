"""vmm.cpu.features: the table of names, and sets of features."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cpuid_tables import TABLES, by_leaf
from vmm.cpu import features, policy

# Linux arch/x86/include/asm/cpufeatures.h and asm/kvm_para.h; AMD APM volume 3 appendix E.
KNOWN = [
    ("fpu", 0x1, 0, "edx", 0),
    ("sse2", 0x1, 0, "edx", 26),
    ("pbe", 0x1, 0, "edx", 31),
    ("pni", 0x1, 0, "ecx", 0),
    ("x2apic", 0x1, 0, "ecx", 21),
    ("tsc_deadline_timer", 0x1, 0, "ecx", 24),
    ("xsave", 0x1, 0, "ecx", 26),
    ("avx", 0x1, 0, "ecx", 28),
    ("hypervisor", 0x1, 0, "ecx", 31),
    ("avx2", 0x7, 0, "ebx", 5),
    ("avx512f", 0x7, 0, "ebx", 16),
    ("avx512vl", 0x7, 0, "ebx", 31),
    ("pku", 0x7, 0, "ecx", 3),
    ("la57", 0x7, 0, "ecx", 16),
    ("rdpid", 0x7, 0, "ecx", 22),
    ("sgx_lc", 0x7, 0, "ecx", 30),
    ("amx_tile", 0x7, 0, "edx", 24),
    ("spec_ctrl", 0x7, 0, "edx", 26),
    ("arch_capabilities", 0x7, 0, "edx", 29),
    ("avx_vnni", 0x7, 1, "eax", 4),
    ("amx_fp16", 0x7, 1, "eax", 21),
    ("lam", 0x7, 1, "eax", 26),
    ("prefetchiti", 0x7, 1, "edx", 14),
    ("xsaves", 0xD, 1, "eax", 3),
    ("svm", 0x8000_0001, 0, "ecx", 2),
    ("abm", 0x8000_0001, 0, "ecx", 5),
    ("topoext", 0x8000_0001, 0, "ecx", 22),
    ("syscall", 0x8000_0001, 0, "edx", 11),
    ("nx", 0x8000_0001, 0, "edx", 20),
    ("lm", 0x8000_0001, 0, "edx", 29),
    ("invtsc", 0x8000_0007, 0, "edx", 8),
    ("amd_ibpb", 0x8000_0008, 0, "ebx", 12),
    ("amd_ssbd", 0x8000_0008, 0, "ebx", 24),
    ("autoibrs", 0x8000_0021, 0, "eax", 8),
    ("srso_no", 0x8000_0021, 0, "eax", 29),
    ("kvmclock", 0x4000_0001, 0, "eax", 0),
    ("steal_time", 0x4000_0001, 0, "eax", 5),
    ("pv_eoi", 0x4000_0001, 0, "eax", 6),
    ("pv_unhalt", 0x4000_0001, 0, "eax", 7),
    ("pv_tlb_flush", 0x4000_0001, 0, "eax", 9),
    ("pv_sched_yield", 0x4000_0001, 0, "eax", 13),
    ("async_pf_int", 0x4000_0001, 0, "eax", 14),
    ("clocksource_stable", 0x4000_0001, 0, "eax", 24),
    ("realtime", 0x4000_0001, 0, "edx", 0),
    ("arat", 0x6, 0, "eax", 2),
]


@pytest.mark.parametrize(("name", "leaf", "subleaf", "register", "bit"), KNOWN)
def test_where_a_feature_is(name: str, leaf: int, subleaf: int, register: str, bit: int) -> None:
    assert features.location(name) == (leaf, subleaf, register, bit)


def test_names_are_once_each_and_fit_their_register() -> None:
    named = [name for word in features.WORDS for name in word[3].split() if name != "-"]
    assert len(named) == len(set(named)) == len(features.BITS)
    assert all(len(word[3].split()) <= 32 for word in features.WORDS)


def test_needs_come_before_those_who_need_them() -> None:
    needers = {flag for flag, _ in features.NEEDS}
    seen = 0
    for flag, needs in features.NEEDS:
        assert not flag & seen, features.names_in(flag)
        for name in features.names_in(needs):
            need = 1 << features.BITS[name]
            assert need & seen or need not in needers, (features.names_in(flag), name)
        seen |= flag


@pytest.mark.parametrize(
    ("gone", "also"),
    [
        ("avx", "avx2 fma f16c avx512f avx512bw avx512_bf16 vaes vpclmulqdq"),
        ("xsave", "avx avx2 xsavec xsaves xgetbv1 pku avx512f amx_tile xfd"),
        ("avx512f", "avx512dq avx512_vnni avx512_fp16"),
        ("hypervisor", "kvmclock kvmclock2 pv_eoi pv_tlb_flush async_pf_int realtime"),
        ("apic", "x2apic tsc_deadline_timer pv_eoi pv_ipi"),
        ("steal_time", "pv_tlb_flush"),
        ("lm", "lahf_lm pdpe1gb fsgsbase pcid la57"),
        ("fpu", "mmx fxsr sse sse2 avx"),
    ],
)
def test_what_goes_with_a_feature(gone: str, also: str) -> None:
    everything = features.flags(" ".join(features.BITS))
    left = features.without_orphans(everything & ~features.flags(gone))
    assert not left & features.flags(also)
    assert left & features.flags("cmov") and left & features.flags("rdrand")


def test_with_needs_brings_the_whole_chain() -> None:
    assert set(features.names_in(features.with_needs(features.flags("avx2")))) == {
        *("avx2", "avx", "xsave", "fxsr", "fpu", "sse", "sse2", "pni", "ssse3", "sse4_1", "sse4_2")
    }
    assert features.missing_for("avx", features.flags("fpu fxsr sse sse2 pni ssse3 xsave")) == [
        "sse4_1",
        "sse4_2",
    ]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("avx2", "avx2"),
        ("AVX2", "avx2"),
        ("sse4.1", "sse4_1"),
        ("tsc-deadline", "tsc_deadline_timer"),
        ("lahf-lm", "lahf_lm"),
        ("sse3", "pni"),
        ("lzcnt", "abm"),
        ("constant_tsc", "invtsc"),
        ("kvm-hint-dedicated", "realtime"),
        ("-", None),
        ("", None),
        ("avx3", None),
    ],
)
def test_names_people_write(written: str, name: str | None) -> None:
    assert features.canonical(written) == name


@pytest.mark.parametrize("table", TABLES)
def test_write_then_read_is_the_same_set(table: str) -> None:
    entries = by_leaf(TABLES[table]())
    wanted = features.flags("fpu avx2 lm kvmclock xsaves realtime avx_vnni")
    features.write(entries, wanted, known_only=False)
    assert features.read(entries) == wanted
    added = entries[0x7, 1]
    assert added.flags == 1 and added.eax == 1 << 4


def test_bits_without_a_name_stay_unless_told() -> None:
    entries = by_leaf(TABLES["amd_nested"]())
    entries[0x7, 0].ecx |= 1 << 26
    features.write(entries, 0, known_only=False)
    assert entries[0x7, 0].ecx == 1 << 26
    features.write(entries, 0, known_only=True)
    assert entries[0x7, 0].ecx == 0


def test_the_document_lists_every_feature() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs/cpu.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| 0x")]
    listed = [name for row in rows for name in row[2].split()]
    assert sorted(listed) == sorted(features.BITS.keys() - policy._NOT_A_CHOICE.keys())
    assert all(f"`{name}`" in text for name in (*policy.POLICIES, *policy._NOT_A_CHOICE))
