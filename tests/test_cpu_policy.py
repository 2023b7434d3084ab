"""vmm.cpu.policy: what each policy gives, and what it says when it cannot."""

from __future__ import annotations

import pytest

from tests.support.cpuid_tables import TABLES, by_leaf, names
from vmm.cpu import features, policy
from vmm.errors import UsageError

SIGNATURE = b"KVMKVMKVM\0\0\0"


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("text", ["host", "max"])
def test_machine_bits(table: str, text: str) -> None:
    resolved = policy.resolve(TABLES[table](), text)
    assert {"hypervisor", "x2apic", "tsc_deadline_timer", "kvmclock2", "pv_eoi"} <= names(resolved)
    leaf = by_leaf(resolved)[0x4000_0000, 0]
    assert leaf.eax == 0x4000_0001
    assert b"".join(r.to_bytes(4, "little") for r in (leaf.ebx, leaf.ecx, leaf.edx)) == SIGNATURE


@pytest.mark.parametrize("table", TABLES)
def test_tsc_deadline_follows_the_capability(table: str) -> None:
    assert "tsc_deadline_timer" not in names(
        policy.resolve(TABLES[table](), "host", tsc_deadline=False)
    )


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("text", ["host", "max", "host,-avx", "host,-fpu", "max,-hypervisor"])
def test_no_feature_without_its_needs(table: str, text: str) -> None:
    shown = features.read(by_leaf(policy.resolve(TABLES[table](), text)))
    assert features.without_orphans(shown) == shown


def test_host_keeps_what_kvm_supports() -> None:
    for table in ("amd_nested", "intel"):
        lost = names(TABLES[table]()) - names(policy.resolve(TABLES[table](), "host"))
        assert lost <= set(policy.HOST_LEAVES_OUT.split())


def test_max_adds_what_host_leaves_out() -> None:
    table = TABLES["intel"]
    host, most = names(policy.resolve(table(), "host")), names(policy.resolve(table(), "max"))
    assert most - host == {"vmx", "intel_pt"}
    assert (0x14, 0) not in by_leaf(policy.resolve(table(), "host"))
    assert (0x14, 0) in by_leaf(policy.resolve(table(), "host,+intel_pt"))


def test_the_caller_s_table_is_left_alone() -> None:
    table = TABLES["intel"]()
    policy.resolve(table, "host,-avx,-xsave")
    assert table == TABLES["intel"]()


def test_no_leaf_of_other_hypervisors_or_of_encrypted_guests() -> None:
    table = TABLES["amd_nested"]()
    for function in (0x4000_0003, 0x4000_0100, 0x8000_001F):
        table.append(type(table[0])(function, 0, 0, 0xF, 1, 1, 1))
    for text in ("host", "max"):
        leaves = {leaf for leaf, _ in by_leaf(policy.resolve(table, text))}
        assert not leaves & {0x4000_0003, 0x4000_0100, 0x8000_001F}


def test_without_hypervisor_no_kvm_leaves() -> None:
    resolved = policy.resolve(TABLES["amd_nested"](), "host,-hypervisor")
    assert not [entry for entry in resolved if entry.function >> 28 == 4]


def test_amd_s_copy_of_leaf_1_follows() -> None:
    table = by_leaf(policy.resolve(TABLES["amd_nested"](), "host,-mtrr"))
    assert not table[0x1, 0].edx & 1 << 12
    assert not table[0x8000_0001, 0].edx & 1 << 12
    assert table[0x8000_0001, 0].edx & 1 << 8
    table = by_leaf(policy.resolve(TABLES["amd_nested"](), "x86-64-v2"))
    assert table[0x8000_0001, 0].edx & 0x0183F3FF == table[0x1, 0].edx & 0x0183F3FF


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_a_baseline_is_its_level(level: str) -> None:
    shown = names(policy.resolve(TABLES["intel"](), level))
    assert set(policy.BASELINES[level].split()) <= shown
    assert shown <= {*policy.BASELINES[level].split(), *policy.BASELINE_TAKES.split()}


def test_baseline_leaves_nothing_of_the_host_s_extras() -> None:
    table = TABLES["intel"]()
    by_leaf(table)[0x7, 0].ecx |= 1 << 26
    by_leaf(table)[0x7, 0].eax = 2
    resolved = by_leaf(policy.resolve(table, "x86-64-v2"))
    assert resolved[0x7, 0].ecx == 1 << 2  # umip, which protects
    assert (0x14, 0) not in resolved and (0xD, 0) not in resolved
    assert resolved[0x0, 0].eax == max(leaf for leaf, _ in resolved if leaf < 0x4000_0000)
    brand = b"".join(
        getattr(resolved[leaf, 0], register).to_bytes(4, "little")
        for leaf in (0x8000_0002, 0x8000_0003, 0x8000_0004)
        for register in ("eax", "ebx", "ecx", "edx")
    )
    assert brand.rstrip(b"\0") == b"vmm x86-64-v2"


def test_features_change_a_baseline() -> None:
    shown = names(policy.resolve(TABLES["intel"](), "x86-64-v2,+avx2,+invtsc,-pv_eoi"))
    assert {"avx2", "avx", "xsave", "invtsc"} <= shown
    assert not {"fma", "pv_eoi"} & shown


def test_promises_are_the_person_s() -> None:
    for text in ("host", "max"):
        assert "realtime" not in names(policy.resolve(TABLES["amd_nested"](), text))
    table = by_leaf(policy.resolve(TABLES["amd_nested"](), "host,+realtime"))
    assert table[0x4000_0001, 0].edx == 1


ERRORS = [
    ("", "amd_nested", "no such policy; there are host, max, x86-64-v2, x86-64-v3, x86-64-v4"),
    ("hots", "amd_nested", "no such policy; did you mean host?; there are host,"),
    ("HOST", "amd_nested", "no such policy; did you mean host?"),
    ("x86-64-v5", "amd_nested", "did you mean x86-64-v4 or x86-64-v3 or x86-64-v2?"),
    ("+avx", "amd_nested", "starts with no policy; write host,+avx"),
    ("-avx", "amd_nested", "starts with no policy; write host,-avx"),
    ("host,", "amd_nested", "'' is neither +feature nor -feature"),
    ("host,avx", "amd_nested", "'avx' is neither +feature nor -feature"),
    ("host,-", "amd_nested", "'-' is neither +feature nor -feature"),
    ("host, -avx", "amd_nested", "' -avx' is neither"),
    ("host,-avx512", "amd_nested", "no such feature as avx512; did you mean avx512"),
    ("host,+qqqq", "amd_nested", "no such feature as qqqq; /proc/cpuinfo has names"),
    ("host,+avx512f", "amd_nested", "KVM does not support avx512f; leave out +avx512f"),
    ("host,+svm", "intel", "KVM does not support svm"),
    ("host,+avx,-avx", "amd_nested", "avx is both added and taken away"),
    ("host,-sse4.2,+sse4_2", "amd_nested", "sse4_2 is both added and taken away"),
    ("host,-xsave,+avx2", "amd_nested", "+avx2 needs xsave, taken away in the same list"),
    ("host,+ht", "amd_nested", "ht cannot be chosen: it comes from --cpus"),
    ("host,-osxsave", "amd_nested", "osxsave cannot be chosen"),
    ("x86-64-v4", "amd_nested", "KVM lacks avx512f avx512dq avx512cd avx512bw avx512vl; what"),
    ("x86-64-v4", "amd_nested", "what works here: host, max, x86-64-v2, x86-64-v3"),
    (
        "x86-64-v2",
        "amd_pvm",
        "KVM lacks pni ssse3 sse4_1 sse4_2 popcnt; what works here: host, max",
    ),
]


@pytest.mark.parametrize(("text", "table", "message"), ERRORS)
def test_what_cannot_be(text: str, table: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        policy.resolve(TABLES[table](), text)
    said = str(caught.value)
    assert said.startswith(f"--cpu {text}: ")
    assert message in said
    assert "\n" not in said
