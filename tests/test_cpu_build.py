"""vmm.cpu.build against a real KVM: tables it accepts, and what the guest then reads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import host
from tests.support.cpuid_tables import TABLES
from vmm.cpu import build
from vmm.kvm import Kvm, Vcpu, constants
from vmm.memory import GuestMemory

CPUID_THEN_OUT = b"\x0f\xa2\xe6\xf4"
"""cpuid; out 0xf4, al: in real mode, KVM's own answer on every back end."""


def ask(vcpu: Vcpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """CPUID executed by the guest."""
    regs = vcpu.get_regs()
    regs.rip, regs.rflags, regs.rax, regs.rcx = 0x1000, 2, leaf, subleaf
    vcpu.set_regs(regs)
    assert vcpu.run() == constants.EXIT_IO
    regs = vcpu.get_regs()
    # KVM completes the OUT on the next entry; moving RIP is enough to leave it behind.
    return tuple(r & 0xFFFF_FFFF for r in (regs.rax, regs.rbx, regs.rcx, regs.rdx))  # type: ignore[return-value]


@pytest.mark.needs_kvm
@pytest.mark.parametrize("text", ["host", "max", "host,-pv_eoi,-x2apic", "host,+realtime"])
def test_the_guest_reads_its_table(text: str) -> None:
    with Kvm() as kvm, GuestMemory(1 << 20) as memory, kvm.create_vm() as vm:
        for slot, region in enumerate(memory.regions):
            vm.set_user_memory_region(slot, region.gpa, region.size, region.hva)
        memory.write(0x1000, CPUID_THEN_OUT)
        vm.set_tss_addr(0xFFFBD000)
        vm.create_irqchip()
        pvm = host.backend() == "kvm_pvm"
        deadline = bool(kvm.check_extension(constants.CAP_TSC_DEADLINE_TIMER))
        for table in build(kvm.supported_cpuid(), text, 1, tsc_deadline=deadline):
            with vm.create_vcpu(0) as vcpu:
                vcpu.set_cpuid2(table)
                sregs = vcpu.get_sregs()
                sregs.cs.base = sregs.cs.selector = 0
                vcpu.set_sregs(sregs)
                for entry in table:
                    eax, ebx, ecx, edx = ask(vcpu, entry.function, entry.index)
                    wanted = (entry.eax, entry.ebx, entry.ecx, entry.edx)
                    if entry.function == 0xD:  # KVM fills in the sizes of what is enabled
                        assert eax == entry.eax
                    elif pvm and entry.function == 0x1:  # PVM: features are the host's
                        assert (eax, ebx) == wanted[:2]
                    elif pvm and entry.function == 0x7:
                        assert eax == entry.eax
                    else:
                        assert (eax, ebx, ecx, edx) == wanted, entry


@pytest.mark.needs_kvm
@pytest.mark.parametrize("cpus", [2, 4])
def test_kvm_takes_every_vcpu_s_table(cpus: int) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        for number, table in enumerate(build(kvm.supported_cpuid(), "max", cpus)):
            with vm.create_vcpu(number) as vcpu:
                vcpu.set_cpuid2(table)
                back = {(e.function, e.index): e for e in vcpu.get_cpuid2()}
                assert back[0xB, 1].edx == number
                assert back[0x1, 0].ebx >> 24 == number


@pytest.mark.needs_linux_kvm
@pytest.mark.parametrize("text", ["x86-64-v2", "x86-64-v3"])
def test_kvm_takes_a_baseline(text: str) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        table = build(kvm.supported_cpuid(), text)[0]
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(table)
            back = vcpu.get_cpuid2()
            assert [(e.function, e.index) for e in back[: len(table)]] == [
                (e.function, e.index) for e in table
            ]


def test_tables_share_what_is_the_same() -> None:
    tables = build(TABLES["amd_nested"](), "host", 64)
    assert len(tables) == 64
    shared = [sum(a is b for a, b in zip(tables[0], t, strict=True)) for t in tables[1:]]
    assert min(shared) >= len(tables[0]) - 5


def test_nothing_slow_is_imported() -> None:
    slow = ["dataclasses", "enum", "re", "typing", "inspect", "difflib", "json", "argparse"]
    code = (
        "import sys; before = set(sys.modules); import vmm.cpu; "
        f"print([m for m in {slow} if m in sys.modules and m not in before])"
    )
    out = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[]"


def test_the_hosts_name_goes_into_the_brand_leaves() -> None:
    from vmm.cpu import build, host_brand
    from vmm.kvm.cpuid import CpuidEntry

    supported = [
        CpuidEntry(0, eax=1),
        CpuidEntry(1, edx=1),
        CpuidEntry(0x8000_0000, eax=0x8000_0008),
    ]
    table = build(supported, "host", brand="A processor " + "x" * 60)[0]
    leaves = [e for e in table if 0x8000_0002 <= e.function <= 0x8000_0004]
    text = b"".join(
        register.to_bytes(4, "little") for e in leaves for register in (e.eax, e.ebx, e.ecx, e.edx)
    )
    assert text == b"A processor " + b"x" * 35 + b"\0"
    assert host_brand() == "" or host_brand().isprintable()
