"""CPU policies: from what KVM can give a vCPU to what `--cpu` asks for.

A policy is a name, then any number of `+feature` and `-feature`, separated by commas:

    host             what KVM supports here, less what a machine of ours cannot use or save
                     (`HOST_LEAVES_OUT`)
    max              what KVM supports here
    x86-64-v2, -v3, -v4
                     the x86-64 psABI's levels: the same features on every host that has them

What is asked for is checked against KVM_GET_SUPPORTED_CPUID; what a removed feature carries goes
with it (`features.NEEDS`, the save area of leaf 0xd, leaves of their own).

The PVM back end answers leaves 1 (ECX, EDX) and 7 with the host's own features whatever it is
given, so what is cleared there stays visible to the guest. The other leaves are as given.
"""

from __future__ import annotations

from vmm.cpu import features, xsave
from vmm.cpu.topology import is_amd
from vmm.errors import UsageError
from vmm.kvm.cpuid import CpuidEntry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Table = dict[tuple[int, int], CpuidEntry]

V1 = (
    "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse "
    "sse2 syscall nx lm"
)
V2 = V1 + " pni ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm"
V3 = V2 + " xsave avx avx2 fma f16c bmi1 bmi2 abm movbe"
V4 = V3 + " avx512f avx512bw avx512cd avx512dq avx512vl"
BASELINES = {"x86-64-v2": V2, "x86-64-v3": V3, "x86-64-v4": V4}
"""x86-64 psABI 1.0, table 3.1; V1 is with what Linux expects of any 64-bit processor."""

POLICIES = ("host", "max", *BASELINES)

BASELINE_TAKES = (
    # KVM makes these in software, on any host.
    "hypervisor x2apic tsc_deadline_timer tsc_adjust arat "
    "kvmclock kvmclock2 clocksource_stable async_pf async_pf_int steal_time pv_eoi pv_unhalt "
    "pv_tlb_flush pv_ipi poll_control pv_sched_yield "
    # Protection: a guest without it is worse off than one that differs from its neighbour.
    "smep smap umip spec_ctrl intel_stibp spec_ctrl_ssbd arch_capabilities md_clear flush_l1d "
    "srbds_ctrl intel_psfd ipred_ctrl rrsba_ctrl bhi_ctrl amd_ibpb amd_ibrs amd_stibp "
    "amd_stibp_always_on amd_ssbd virt_ssbd amd_ssb_no amd_psfd btc_no amd_ibpb_ret "
    "verw_clear lfence_rdtsc null_sel_clr_base autoibrs sbpb ibpb_brtype srso_no tsa_sq_no "
    "tsa_l1_no "
    # AMD's leaves of caches and topology are read only with it.
    "topoext"
)
"""What a baseline has besides its level, where KVM supports it."""

HOST_LEAVES_OUT = "vmx svm sgx sgx_lc intel_pt"
"""Nested virtualization, enclaves and trace: state that a snapshot does not hold, a wider way into
the host's kernel, and nothing that a guest misses. `+svm` brings one back."""

_ASSUMED = "hypervisor x2apic"
"""KVM offers these with its in-kernel APIC, though older kernels do not report them."""

_FREE = "realtime"
"""Promises of the person who starts the machine; KVM takes any (KVM_HINTS_REALTIME: vCPUs are
never preempted for long)."""

_NOT_A_CHOICE = {
    "ht": "comes from --cpus",
    "cmp_legacy": "comes from --cpus",
    "osxsave": "is the guest's CR4.OSXSAVE",
    "ospke": "is the guest's CR4.PKE",
}

_LEAF_OF = {
    0x12: "sgx",
    0x14: "intel_pt",
    0x1C: "arch_lbr",
    0x1D: "amx_tile",
    0x1E: "amx_tile",
    0x24: "avx10",
    0x4000_0000: "hypervisor",
    0x4000_0001: "hypervisor",
    0x8000_000A: "svm",
    0x8000_001B: "ibs",
}
"""Leaves that describe one feature."""

_BASELINE_LEAVES = frozenset(
    {
        *(0x0, 0x1, 0x2, 0x4, 0x6, 0x7, 0xB, 0xD, 0x1F, 0x4000_0000, 0x4000_0001),
        *(0x8000_0000, 0x8000_0001, 0x8000_0005, 0x8000_0006, 0x8000_0008),
        *(0x8000_001D, 0x8000_001E),
    }
)
"""Leaves a baseline keeps besides those of its features: vendor and family, caches, topology."""

_SEV = 0x8000_001F
"""Never given: a guest that finds SEV here reads MSR 0xc0010131, which only an encrypted guest
has, and dies of it before its exception handlers are set up (Linux sme_enable())."""

_KVM_SIGNATURE = (0x4B4D564B, 0x564B4D56, 0x0000004D)
"""`KVMKVMKVM` in EBX, ECX, EDX of leaf 0x40000000."""

_LEAF1_IN_80000001_EDX = 0x0183_F3FF
"""AMD repeats these bits of leaf 1 EDX there (APM volume 3, E.4.2)."""


def parse(text: str) -> tuple[str, list[str], list[str]]:
    """The policy, features added and features taken away that `--cpu text` names.

    UsageError: no such policy or feature, or one both added and taken away.
    """
    policy, *changes = text.split(",")
    if policy not in POLICIES:
        known = ", ".join(POLICIES)
        if policy[:1] in ("+", "-"):
            raise _error(text, f"starts with no policy; write host,{text}")
        raise _error(text, f"no such policy{_close(policy.lower(), POLICIES)}; there are {known}")
    added: list[str] = []
    removed: list[str] = []
    for change in changes:
        sign, written = change[:1], change[1:]
        if sign not in ("+", "-") or not written:
            raise _error(text, f"'{change}' is neither +feature nor -feature")
        name = features.canonical(written)
        if name is None:
            hint = _close(written.lower().replace("-", "_"), features.known_names())
            raise _error(text, f"no such feature as {written}{hint or '; /proc/cpuinfo has names'}")
        if name in _NOT_A_CHOICE:
            raise _error(text, f"{name} cannot be chosen: it {_NOT_A_CHOICE[name]}")
        if name in (removed if sign == "+" else added):
            raise _error(text, f"{name} is both added and taken away; keep one of the two")
        (added if sign == "+" else removed).append(name)
    return policy, added, removed


def resolve(
    supported: Iterable[CpuidEntry],
    text: str = "host",
    *,
    tsc_deadline: bool = True,
    brand: str = "",
) -> list[CpuidEntry]:
    """The CPUID table that policy `text` makes of KVM_GET_SUPPORTED_CPUID's; new entries.

    `tsc_deadline`: KVM_CAP_TSC_DEADLINE_TIMER is there and so is the in-kernel APIC (the table
    itself does not say). `brand`: the host processor's name, which KVM's table does not have; a
    baseline has one of its own. Leaves that would read as zeros are left out, which to a guest is
    the same. The topology leaves are still the host's: see `vmm.cpu.topology`.

    UsageError: as `parse`, a feature asked for that KVM does not support here, or a baseline that
    this host does not reach.
    """
    policy, added, removed = parse(text)
    table = {
        (entry.function, entry.index): entry.copy()
        for entry in supported
        if (entry.eax or entry.ebx or entry.ecx or entry.edx)
        and entry.function != _SEV
        and not 0x4000_0001 < entry.function < 0x8000_0000
    }
    _put_signature(table)
    able = _supported(table, tsc_deadline)
    chosen = _base(policy, text, able)
    if added or removed:
        chosen = _change(chosen, able, text, added, removed)
    chosen = features.without_orphans(chosen)
    _write(table, chosen, known_only=policy in BASELINES)
    xsave.trim(table, chosen, known_only=policy in BASELINES)
    if policy in BASELINES:
        _level_out(table, chosen, policy)
    elif brand and (0x8000_0002, 0) not in table:
        _put_brand(table, brand)
    return list(table.values())


def offered(supported: Iterable[CpuidEntry], *, tsc_deadline: bool) -> int:
    """The set of features a guest can have here; arguments as of `resolve`."""
    return _supported({(entry.function, entry.index): entry for entry in supported}, tsc_deadline)


def _supported(table: Table, tsc_deadline: bool) -> int:
    """The set of features the host's table and we can offer."""
    able = features.read(table) | features.flags(_ASSUMED) | features.flags(_FREE)
    able &= ~xsave.half_declared(table)
    timer = features.flags("tsc_deadline_timer")
    return able | timer if tsc_deadline else able & ~timer


def _base(policy: str, text: str, able: int) -> int:
    if policy == "max":
        return able & ~features.flags(_FREE)
    if policy == "host":
        return able & ~features.flags(f"{HOST_LEAVES_OUT} {_FREE}")
    level = features.flags(BASELINES[policy])
    missing = features.names_in(level & ~able)
    if missing:
        works = [name for name, names in BASELINES.items() if not features.flags(names) & ~able]
        raise _error(
            text,
            f"this host's KVM lacks {' '.join(missing)}; "
            f"what works here: {', '.join(['host', 'max', *works])}",
        )
    return level | able & features.flags(BASELINE_TAKES)


def _change(chosen: int, able: int, text: str, added: list[str], removed: list[str]) -> int:
    """`chosen` with features added, with what they need, and others removed with their needers."""
    gone = features.flags(" ".join(removed))
    for name in added:
        if not able >> features.BITS[name] & 1:
            raise _error(text, f"this host's KVM does not support {name}; leave out +{name}")
        lacking = features.missing_for(name, able)
        if lacking:
            raise _error(
                text, f"{name} needs {' '.join(lacking)}, which this host's KVM does not support"
            )
        chosen |= features.with_needs(1 << features.BITS[name])
    chosen = features.without_orphans(chosen & ~gone)
    for name in added:
        if not chosen >> features.BITS[name] & 1:
            needs = features.names_in(features.with_needs(1 << features.BITS[name]) & gone)
            raise _error(text, f"+{name} needs {' '.join(needs)}, taken away in the same list")
    return chosen


def _put_signature(table: Table) -> None:
    """Leaf 0x40000000 as a KVM guest looks for it."""
    leaf = table.setdefault((0x4000_0000, 0), CpuidEntry(0x4000_0000))
    # Zero from old kernels stands for 0x40000001 (Documentation/virt/kvm/x86/cpuid.rst).
    leaf.eax = 0x4000_0001
    leaf.ebx, leaf.ecx, leaf.edx = _KVM_SIGNATURE


def _write(table: Table, chosen: int, *, known_only: bool) -> None:
    """Put the chosen features into the table; bits without a name stay unless `known_only`."""
    before = table[1, 0].edx if (1, 0) in table else 0
    features.write(table, chosen, known_only=known_only)
    extended = table.get((0x8000_0001, 0))
    if extended is not None and is_amd(table):
        after = table[1, 0].edx
        if known_only:
            extended.edx |= after & _LEAF1_IN_80000001_EDX
        extended.edx &= ~(before & ~after & _LEAF1_IN_80000001_EDX)
    for function, name in _LEAF_OF.items():
        if not chosen >> features.BITS[name] & 1:
            for key in [key for key in table if key[0] == function]:
                del table[key]


def _level_out(table: Table, chosen: int, policy: str) -> None:
    """Leave of a baseline's table only what its features are read from, under its own name."""
    kept = set(_BASELINE_LEAVES)
    named: dict[tuple[int, int], set[str]] = {}
    for word, (leaf, subleaf, register, _) in enumerate(features.WORDS):
        named.setdefault((leaf, subleaf), set()).add(register)
        if chosen >> 32 * word & 0xFFFF_FFFF:
            kept.add(leaf)
    kept.update(leaf for leaf, name in _LEAF_OF.items() if chosen >> features.BITS[name] & 1)
    for key in [key for key in table if key[0] not in kept]:
        del table[key]
    for key in ((0x7, 1), (0x7, 2), (0x8000_0021, 0)):
        if key in table:
            for register in {"eax", "ebx", "ecx", "edx"} - named[key]:
                setattr(table[key], register, 0)
    _put_brand(table, f"vmm {policy}")
    for first in (0, 0x8000_0000):
        if (first, 0) in table:
            table[first, 0].eax = max(leaf for leaf, _ in table if leaf >> 28 == first >> 28)


def _put_brand(table: Table, brand: str) -> None:
    """The processor's name, in leaves 0x80000002 to 4 (48 bytes, padded with NUL)."""
    text = brand.encode("ascii", "replace")[:47].ljust(48, b"\0")
    for leaf in (0x8000_0002, 0x8000_0003, 0x8000_0004):
        at = 16 * (leaf - 0x8000_0002)
        words = [int.from_bytes(text[i : i + 4], "little") for i in range(at, at + 16, 4)]
        table[leaf, 0] = CpuidEntry(leaf, 0, 0, *words)


def _error(text: str, problem: str) -> UsageError:
    return UsageError(f"--cpu {text}: {problem}")


def _close(word: str, known: Iterable[str]) -> str:
    """`; did you mean A or B?`, or nothing."""
    import difflib

    names = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(names)}?" if names else ""
