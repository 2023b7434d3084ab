"""vmm.cpu.topology: the leaves decoded as Linux does, for both makers and many sizes."""

from __future__ import annotations

import pytest

from tests.support.cpuid_tables import TABLES, by_leaf
from vmm.cpu import build, policy, topology
from vmm.kvm.cpuid import CpuidEntry

SIZES = [1, 2, 3, 4, 5, 8, 16, 33, 64, 255, 256, 300, 1024]
Table = dict[tuple[int, int], CpuidEntry]


def tables(name: str, cpus: int) -> list[Table]:
    return [by_leaf(entries) for entries in build(TABLES[name](), "host", cpus)]


def extended(table: Table, leaf: int) -> tuple[int, int, int, int]:
    """APIC id, core id, package id, threads a core: Linux's detect_extended_topology()."""
    smt, core = table[leaf, 0], table[leaf, 1]
    assert smt.ecx == 0x100 and core.ecx == 0x201 and table[leaf, 2].ebx == 0
    assert all(table[leaf, index].flags == 1 for index in range(3))
    assert smt.edx == core.edx == table[leaf, 2].edx
    apic = core.edx
    package = apic >> core.eax
    core_id = (apic >> smt.eax) & ((1 << core.eax - smt.eax) - 1)
    return apic, core_id, package, smt.ebx & 0xFFFF


@pytest.mark.parametrize("cpus", SIZES)
@pytest.mark.parametrize("name", TABLES)
def test_one_socket_of_single_threaded_cores(name: str, cpus: int) -> None:
    seen = []
    for table in tables(name, cpus):
        assert table[0xB, 1].ebx == cpus
        apic, core, package, threads = extended(table, 0xB)
        assert (package, threads) == (0, 1)
        seen.append((apic, core))
    assert seen == [(cpu, cpu) for cpu in range(cpus)]


@pytest.mark.parametrize("cpus", SIZES)
@pytest.mark.parametrize("name", TABLES)
def test_leaf_1(name: str, cpus: int) -> None:
    for cpu, table in enumerate(tables(name, cpus)):
        leaf = table[1, 0]
        assert leaf.ebx >> 24 == cpu & 0xFF
        assert leaf.ebx >> 16 & 0xFF == min(cpus, 255)
        assert leaf.ebx & 0xFF00 == 0x0800  # CLFLUSH: 64 bytes, the host's
        assert bool(leaf.edx & topology.HTT) == (cpus > 1)


@pytest.mark.parametrize("cpus", SIZES)
def test_leaf_1f_says_the_same_where_there_is_one(cpus: int) -> None:
    for name in ("intel", "amd_nested"):
        for table in tables(name, cpus):
            assert ((0x1F, 0) in table) == (name == "intel")
            if name == "intel":
                assert extended(table, 0x1F) == extended(table, 0xB)


@pytest.mark.parametrize(
    ("cpus", "l3_sharing", "cores"),
    [(1, 1, 1), (2, 2, 2), (3, 4, 4), (4, 4, 4), (48, 64, 64), (64, 64, 64), (200, 256, 64)],
)
def test_intel_caches(cpus: int, l3_sharing: int, cores: int) -> None:
    host = by_leaf(TABLES["intel"]())
    table = tables("intel", cpus)[0]
    for index in range(4):
        leaf = table[4, index]
        assert leaf.eax & 0x3FFF == host[4, index].eax & 0x3FFF
        sharing = (leaf.eax >> 14 & 0xFFF) + 1
        assert sharing == (l3_sharing if leaf.eax >> 5 & 7 == 3 else 1)
        assert (leaf.eax >> 26) + 1 == cores


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 16, 255])
def test_amd_core_count(cpus: int) -> None:
    for name in ("amd_pvm", "amd_nested"):
        table = tables(name, cpus)[0]
        sizes = table[0x8000_0008, 0].ecx
        assert (sizes & 0xFF) + 1 == cpus
        assert 1 << (sizes >> 12 & 0xF) >= cpus
        # Without this bit Linux takes leaf 1's count for threads.
        assert bool(table[0x8000_0001, 0].ecx & topology.CMP_LEGACY) == (cpus > 1)
        assert (4, 0) not in table


@pytest.mark.parametrize("cpus", [1, 2, 5, 64])
def test_amd_topology_extension(cpus: int) -> None:
    for cpu, table in enumerate(tables("amd_pvm", cpus)):
        ids = table[0x8000_001E, 0]
        assert (ids.eax, ids.ebx & 0xFF, ids.ebx >> 8 & 0xFF, ids.ecx) == (cpu, cpu, 0, 0)
        sharing = [(table[0x8000_001D, index].eax >> 14 & 0xFFF) + 1 for index in range(4)]
        assert sharing == [1, 1, 1, cpus]
        assert table[0x8000_0000, 0].eax >= 0x8000_001E
    # The emulated processor has no such extension: nothing to be asked for.
    assert (0x8000_001E, 0) not in tables("amd_nested", cpus)[0]


def test_amd_s_newer_leaf_does_not_contradict() -> None:
    table = TABLES["amd_pvm"]()
    table.append(CpuidEntry(0x8000_0026, 0, 1, 1, 2, 0x100, 0))
    assert (0x8000_0026, 0) not in by_leaf(build(table, "max", 4)[0])


def test_old_processors_get_leaf_b() -> None:
    table = TABLES["amd_nested"]()
    by_leaf(table)[0, 0].eax = 5
    built = by_leaf(build(table, "host", 2)[1])
    assert built[0, 0].eax == 0xB
    assert built[0xB, 1].edx == 1


@pytest.mark.parametrize("text", ["host", "x86-64-v2", "x86-64-v3"])
def test_vcpus_differ_by_their_id_alone(text: str) -> None:
    first, second = build(TABLES["intel"](), text, 2)
    different = [(a.function, a.index) for a, b in zip(first, second, strict=True) if a != b]
    assert {leaf for leaf, _ in different} <= {0x1, 0xB, 0x1F}
    base = topology.apply(policy.resolve(TABLES["intel"](), text), 2)
    assert topology.for_vcpu(base, 0) == base == first
