"""CPUID tables that real KVMs gave (tests/data/cpuid_*.json), and an Intel one made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vmm.cpu import features
from vmm.kvm.cpuid import CpuidEntry

DATA = Path(__file__).resolve().parents[1] / "data"


def captured(name: str) -> list[CpuidEntry]:
    """KVM_GET_SUPPORTED_CPUID as stored: `amd_pvm` or `amd_nested`."""
    rows = json.loads((DATA / f"cpuid_{name}.json").read_text())["entries"]
    return [CpuidEntry(*row) for row in rows]


def intel() -> list[CpuidEntry]:
    """A server processor with AVX-512, AMX-less: written down from the SDM, not captured."""
    signature = (0x756E6547, 0x6C65746E, 0x49656E69)
    table = {(0x0, 0): CpuidEntry(0x0, 0, 0, 0x1F, *signature)}
    table[0x1, 0] = CpuidEntry(0x1, 0, 0, 0x000606A6, 0x07100800)
    # Caches of a 16-core socket with two threads a core.
    for index, eax in enumerate((0x3C004121, 0x3C004122, 0x3C004143, 0x3C07C163)):
        table[0x4, index] = CpuidEntry(0x4, index, 1, eax, 0x02C0003F, 0x3F, 0)
    for index, part in {0: (0xE7, 0, 0xA80), 1: (0, 0, 0), 2: (0x100, 0x240, 0)}.items():
        table[0xD, index] = CpuidEntry(0xD, index, 1, *part)
    table[0xD, 0].eax = 0x2E7
    for index, size, offset in ((5, 0x40, 0x440), (6, 0x200, 0x480), (7, 0x400, 0x680)):
        table[0xD, index] = CpuidEntry(0xD, index, 1, size, offset)
    table[0xD, 9] = CpuidEntry(0xD, 9, 1, 8, 0xA80)
    table[0x14, 0] = CpuidEntry(0x14, 0, 1, 1, 0xF, 7)
    table[0x8000_0000, 0] = CpuidEntry(0x8000_0000, 0, 0, 0x8000_0008)
    table[0x8000_0008, 0] = CpuidEntry(0x8000_0008, 0, 0, 0x3934)
    features.write(
        table,
        features.with_needs(
            features.flags(
                "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush "
                "mmx fxsr sse sse2 ss ht syscall nx lm lahf_lm pdpe1gb rdtscp pni pclmulqdq vmx "
                "ssse3 fma cx16 pcid sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand abm "
                "fsgsbase tsc_adjust bmi1 avx2 smep bmi2 erms invpcid avx512f avx512dq avx512cd "
                "avx512bw avx512vl avx512vbmi avx512_bf16 intel_pt pku umip gfni vaes vpclmulqdq "
                "xsaveopt xsavec xgetbv1 xsaves spec_ctrl spec_ctrl_ssbd arch_capabilities "
                "kvmclock kvmclock2 steal_time pv_eoi pv_unhalt clocksource_stable invtsc"
            )
        ),
        known_only=True,
    )
    return list(table.values())


TABLES = {
    "amd_pvm": lambda: captured("amd_pvm"),
    "amd_nested": lambda: captured("amd_nested"),
    "intel": intel,
}


def by_leaf(entries: Iterable[CpuidEntry]) -> dict[tuple[int, int], CpuidEntry]:
    """Entries by leaf and subleaf; a leaf given twice is an error."""
    table: dict[tuple[int, int], CpuidEntry] = {}
    for entry in entries:
        assert (entry.function, entry.index) not in table, entry
        table[entry.function, entry.index] = entry
    return table


def names(entries: Iterable[CpuidEntry]) -> set[str]:
    """The features a table shows."""
    return set(features.names_in(features.read(by_leaf(entries))))
