"""Named CPU features: where each one's bit is, and what it cannot be without.

Names are Linux's (/proc/cpuinfo, arch/x86/include/asm/cpufeatures.h); those of the paravirtual
leaf 0x40000001 are KVM's (Documentation/virt/kvm/x86/cpuid.rst). Bit positions: Intel SDM volume
2A (CPUID), AMD APM volume 3 appendix E.

A set of features is one int, as in Linux's cpuinfo_x86: 32 bits a word, the words in the order of
`WORDS`. That makes the policies' work a few operations on ints.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm.cpuid import CpuidEntry

Word = tuple[int, int, str, str]
"""Leaf, subleaf, register, the names of its bits from 0 up (`-`: no name known here)."""

WORDS: tuple[Word, ...] = (
    (
        0x1, 0, "edx",
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov "
        "pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    (
        0x1, 0, "ecx",
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm "
        "- pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx "
        "f16c rdrand hypervisor",
    ),
    (
        0x7, 0, "ebx",
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm "
        "zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb "
        "intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    (
        0x7, 0, "ecx",
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq "
        "avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - "
        "bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    (
        0x7, 0, "edx",
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear "
        "rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt "
        "- amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d "
        "arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    (
        0x7, 1, "eax",
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 - cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - "
        "- - fred lkgs wrmsrns - amx_fp16 - avx_ifma - - lam",
    ),
    (
        0x7, 1, "edx",
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti "
        "- - - - avx10 - apx_f",
    ),
    (
        0x7, 2, "edx",
        "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    (0xD, 1, "eax", "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        0x8000_0001, 0, "ecx",
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs "
        "xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext "
        "ptsc perfctr_llc mwaitx",
    ),
    (
        0x8000_0001, 0, "edx",
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - "
        "lm 3dnowext 3dnow",
    ),
    (0x8000_0007, 0, "edx", "- - - - - - - - invtsc"),
    (
        0x8000_0008, 0, "ebx",
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - "
        "amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd "
        "btc_no amd_ibpb_ret brs",
    ),
    (
        0x8000_0021, 0, "eax",
        "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc - - verw_clear null_sel_clr_base - "
        "autoibrs no_smm_ctl_msr - - - - - - - - - - - - - - - - - sbpb ibpb_brtype srso_no "
        "srso_user_kernel_no",
    ),
    (0x8000_0021, 0, "ecx", "- tsa_sq_no tsa_l1_no"),
    (
        0x4000_0001, 0, "eax",
        "kvmclock nop_io_delay mmu_op kvmclock2 async_pf steal_time pv_eoi pv_unhalt - "
        "pv_tlb_flush async_pf_vmexit pv_ipi poll_control pv_sched_yield async_pf_int "
        "msi_ext_dest_id hc_map_gpa_range migration_control - - - - - - clocksource_stable",
    ),
    (0x4000_0001, 0, "edx", "realtime"),
    (0x6, 0, "eax", "- - arat"),
)  # fmt: skip

_ALIASES = {
    "sse3": "pni",
    "lzcnt": "abm",
    "cmpxchg16b": "cx16",
    "cmpxchg8b": "cx8",
    "pclmul": "pclmulqdq",
    "tsc_deadline": "tsc_deadline_timer",
    "constant_tsc": "invtsc",
    "nonstop_tsc": "invtsc",
    "sha": "sha_ni",
    "cet_ss": "shstk",
    "cet_ibt": "ibt",
    "kvm_hint_dedicated": "realtime",
    "hint_dedicated": "realtime",
}
"""Other names people know (QEMU's, the manuals'), for `--cpu`."""

_NEEDS = (
    "mmx:fpu mmxext:mmx 3dnow:mmx 3dnowext:3dnow fxsr:fpu fxsr_opt:fxsr sse:fxsr sse2:sse "
    "pni:sse2 ssse3:pni sse4_1:ssse3 sse4_2:sse4_1 sse4a:pni misalignsse:sse "
    "pclmulqdq:sse2 aes:sse2 sha_ni:sse2 gfni:sse2 "
    "xsave:fxsr osxsave:xsave xsaveopt:xsave xsavec:xsave xgetbv1:xsave xsaves:xsavec xfd:xsavec "
    "xsaveerptr:xsave pku:xsave ospke:pku pks:xsaves shstk:xsaves ibt:xsaves mpx:xsave lwp:xsave "
    "avx:xsave,sse4_2 avx2:avx fma:avx f16c:avx fma4:avx xop:avx vaes:avx,aes "
    "vpclmulqdq:avx,pclmulqdq avx_vnni:avx2 avx_ifma:avx2 avx_vnni_int8:avx2 "
    "avx_vnni_int16:avx2 avx_ne_convert:avx2 sha512:avx2 sm3:avx sm4:avx2 "
    "avx512f:avx2 avx512dq:avx512f avx512cd:avx512f avx512bw:avx512f avx512vl:avx512f "
    "avx512ifma:avx512f avx512pf:avx512f avx512er:avx512f avx512vbmi:avx512bw "
    "avx512_vbmi2:avx512bw avx512_vnni:avx512f avx512_bitalg:avx512bw avx512_vpopcntdq:avx512f "
    "avx512_4vnniw:avx512f avx512_4fmaps:avx512f avx512_vp2intersect:avx512f "
    "avx512_bf16:avx512bw avx512_fp16:avx512bw,avx512vl avx10:avx512vl apx_f:xsave "
    "amx_tile:xfd amx_bf16:amx_tile amx_int8:amx_tile amx_fp16:amx_tile amx_complex:amx_tile "
    "enqcmd:xsaves fred:lkgs sgx_lc:sgx spec_ctrl_ssbd:spec_ctrl "
    "nx:pae lm:pae pse36:pse pdpe1gb:lm lahf_lm:lm fsgsbase:lm la57:lm lam:lm pcid:lm "
    "x2apic:apic tsc_deadline_timer:apic,tsc rdtscp:tsc tsc_adjust:tsc invtsc:tsc "
    "kvmclock:hypervisor kvmclock2:kvmclock clocksource_stable:kvmclock nop_io_delay:hypervisor "
    "mmu_op:hypervisor async_pf:hypervisor async_pf_vmexit:async_pf async_pf_int:async_pf "
    "steal_time:hypervisor pv_eoi:hypervisor,apic pv_unhalt:hypervisor,apic "
    "pv_tlb_flush:steal_time pv_ipi:hypervisor,apic poll_control:hypervisor "
    "pv_sched_yield:hypervisor msi_ext_dest_id:hypervisor hc_map_gpa_range:hypervisor "
    "migration_control:hypervisor realtime:hypervisor"
)
"""`feature:what it needs`, the lines of its needs always before its own. After Linux's
arch/x86/kernel/cpu/cpuid-deps.c, the two manuals, and KVM's guest side (arch/x86/kernel/kvm.c):
pv_tlb_flush reads the preempted flag of the steal time record."""


def _index() -> dict[str, int]:
    bits = {}
    for word, (_, _, _, names) in enumerate(WORDS):
        for bit, name in enumerate(names.split()):
            if name != "-":
                bits[name] = 32 * word + bit
    return bits


BITS: dict[str, int] = _index()
"""Feature name -> its bit's number in a set of features."""

_NAMED = sum(1 << bit for bit in BITS.values())


def _dependencies() -> list[tuple[int, int]]:
    """(feature, what it needs) as sets, needs before those who need them."""
    found = []
    for line in _NEEDS.split():
        name, _, needs = line.partition(":")
        wanted = 0
        for need in needs.split(","):
            wanted |= 1 << BITS[need]
        found.append((1 << BITS[name], wanted))
    return found


NEEDS: list[tuple[int, int]] = _dependencies()


def canonical(name: str) -> str | None:
    """The table's name for what a person wrote (case, `-` `_` `.` alike, aliases), or None."""
    plain = name.lower().replace("-", "_").replace(".", "_")
    plain = _ALIASES.get(plain, plain)
    return plain if plain in BITS else None


def known_names() -> list[str]:
    """Every name `canonical` takes, in the table's spelling."""
    return [*BITS, *_ALIASES]


def location(name: str) -> tuple[int, int, str, int]:
    """Leaf, subleaf, register and bit number of a feature."""
    word, bit = divmod(BITS[name], 32)
    leaf, subleaf, register, _ = WORDS[word]
    return leaf, subleaf, register, bit


def flags(names: str) -> int:
    """The set of the features named, separated by blanks."""
    value = 0
    for name in names.split():
        value |= 1 << BITS[name]
    return value


def names_in(value: int) -> list[str]:
    """The names in a set, in the table's order."""
    return [name for name, bit in BITS.items() if value >> bit & 1]


def with_needs(value: int) -> int:
    """`value` and everything the features in it need."""
    for flag, needs in reversed(NEEDS):
        if value & flag:
            value |= needs
    return value


def without_orphans(value: int) -> int:
    """`value` less the features whose needs are not all in it."""
    for flag, needs in NEEDS:
        if value & flag and value & needs != needs:
            value ^= flag
    return value


def missing_for(name: str, value: int) -> list[str]:
    """What `name` needs, near or far, that is not in `value`."""
    flag = 1 << BITS[name]
    return names_in(with_needs(flag) & ~flag & ~value)


def read(table: dict[tuple[int, int], CpuidEntry]) -> int:
    """The set of features in a CPUID table; bits without a name are left out."""
    value = 0
    for word, (leaf, subleaf, register, _) in enumerate(WORDS):
        entry = table.get((leaf, subleaf))
        if entry is not None:
            value |= getattr(entry, register) << 32 * word
    return value & _NAMED


def write(table: dict[tuple[int, int], CpuidEntry], value: int, *, known_only: bool) -> None:
    """Set and clear the named bits in a table as `value` says.

    Bits without a name stay as they are, or are cleared with `known_only`. An entry that is needed
    and not there is added (a subleaf's with KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
    """
    from vmm.kvm.cpuid import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, CpuidEntry

    for word, (leaf, subleaf, register, _) in enumerate(WORDS):
        bits = value >> 32 * word & 0xFFFF_FFFF
        entry = table.get((leaf, subleaf))
        if entry is None:
            if not bits:
                continue
            flag = KVM_CPUID_FLAG_SIGNIFCANT_INDEX if leaf in (0x7, 0xD) else 0
            entry = table[leaf, subleaf] = CpuidEntry(leaf, subleaf, flag)
        if not known_only:
            bits |= getattr(entry, register) & ~(_NAMED >> 32 * word) & 0xFFFF_FFFF
        setattr(entry, register, bits)
