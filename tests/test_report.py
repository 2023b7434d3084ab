"""vmm.report: every kind of failure, with and without a decoder, and those of a real KVM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import host
from vmm import report
from vmm.kvm import Kvm, constants
from vmm.memory import GuestMemory

ROOT = Path(__file__).resolve().parents[1]
POPCNT = bytes.fromhex("f30fb8c1")
KERNEL_CODE = POPCNT + bytes.fromhex("90 488b042500100000 c3")

LONG = {"cr0": 0x80050033, "cr2": 0xDEAD, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD01}
LONG |= {"cs.selector": 0x10, "cs.base": 0, "cs.l": 1, "cs.db": 0, "ss.selector": 0x18, "ss.dpl": 0}
USER = LONG | {"cs.selector": 0x33, "ss.selector": 0x2B, "ss.dpl": 3}
COMPAT = USER | {"cs.l": 0, "cs.db": 1}
PROTECTED = {"cr0": 0x11, "efer": 0, "cs.selector": 8, "cs.base": 0x1000, "cs.db": 1, "ss.dpl": 0}
REAL = {"cr0": 0x10, "efer": 0, "cs.selector": 0x900, "cs.base": 0x9000}
RESET = {"cr0": 0x60000010, "efer": 0, "cs.selector": 0xF000, "cs.base": 0xFFFF0000}
RIP = 0xFFFFFFFF81000123
REGS = {"rip": RIP, "rflags": 0x10246, "rax": 5, "rsp": 0xFFFFC90000003E50, "r15": 0xF}


@pytest.mark.parametrize(
    ("regs", "sregs", "expected", "linear"),
    [
        (REGS, LONG, ("64-bit mode", 64, 0), RIP),
        (REGS, USER, ("64-bit mode", 64, 3), RIP),
        ({"rip": 0x1000}, COMPAT, ("32-bit compatibility mode", 32, 3), 0x1000),
        ({"rip": 0x20}, PROTECTED, ("32-bit protected mode", 32, 0), 0x1020),
        ({"rip": 0x20}, PROTECTED | {"cs.db": 0}, ("16-bit protected mode", 16, 0), 0x1020),
        ({"rip": 0x20, "rflags": 1 << 17}, PROTECTED, ("virtual-8086 mode", 16, 3), 0x1020),
        ({"rip": 0x20}, REAL, ("real mode", 16, 0), 0x9020),
        ({"rip": 0xFFF0}, RESET, ("real mode", 16, 0), 0xFFFFFFF0),
        ({}, {}, ("real mode", 16, 0), 0),
    ],
)
def test_mode(
    regs: dict[str, int], sregs: dict[str, int], expected: tuple[str, int, int], linear: int
) -> None:
    assert report.mode(regs, sregs) == expected
    assert report.linear_rip(regs, sregs) == linear


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], b""),
        ([1], b""),
        ([0, 0x90C1B80FF304, 0], b""),
        ([1, 0xC1B80FF304, 0], POPCNT),
        ([1, 0xC1B80FF304, 0, 0x1234, 0x5678], POPCNT),
        ([1, 0x07060504030201_0F, 0x0F0E0D0C0B0A0908], bytes(range(1, 16))),
        ([1, 0x07060504030201_FF, 0x0F0E0D0C0B0A0908], bytes(range(1, 16))),
    ],
)
def test_instruction_bytes(data: list[int], expected: bytes) -> None:
    assert report.instruction_bytes(data) == expected


CASES = [
    # cause, sregs, code, backend, keywords; what must be there, and what must not
    (
        (report.EMULATION_FAILURE, LONG, KERNEL_CODE, "kvm_pvm", {"insn": KERNEL_CODE[:13]}),
        [
            "vCPU 1: emulation failure at 0xffffffff81000123 (64-bit mode, CPL 0): "
            "KVM cannot emulate `popcnt eax, ecx`",
            "=> ffffffff81000123  f3 0f b8 c1",
            "   ffffffff81000128  48 8b 04 25 00 10 00 00         mov rax, [0x1000]",
            "why: this host's KVM is kvm_pvm, which interprets guest kernel code, and popcnt is",
            "what to do: stock Linux cannot run here",
            "`vmm doctor`",
        ],
        [],
    ),
    (
        (report.EMULATION_FAILURE, LONG, KERNEL_CODE, "kvm_intel", {}),
        ["`popcnt eax, ecx`", "what to do: use plain loads and stores"],
        ["kvm_pvm", "stock Linux"],
    ),
    (
        (report.EMULATION_FAILURE, USER, KERNEL_CODE, "kvm_pvm", {}),
        ["CPL 3", "what to do: use plain loads and stores"],
        ["stock Linux"],
    ),
    (
        (report.EMULATION_FAILURE, LONG, b"", "kvm_amd", {}),
        ["code: none, RIP is outside guest memory", "there is no guest memory at 0xffffffff81000"],
        ["why:", "=>"],
    ),
    (
        (report.EMULATION_FAILURE, LONG, b"", "kvm_amd", {"insn": POPCNT}),
        ["`popcnt eax, ecx`", "=> ffffffff81000123"],
        ["outside guest memory"],
    ),
    (
        (report.EMULATION_FAILURE, LONG, bytes(48), "kvm_amd", {}),
        ["the code is all zeros", "check the kernel's load address and entry point"],
        [],
    ),
    (
        (report.EMULATION_FAILURE, LONG, b"\x06" * 20, "kvm_amd", {}),
        ["(no valid instruction)"],
        ["push"],
    ),
    (
        (report.EMULATION_FAILURE, PROTECTED, b"\x06\xc3", "kvm_amd", {}),
        ["32-bit protected mode", "`push es`"],
        [],
    ),
    (
        (report.TRIPLE_FAULT, LONG, KERNEL_CODE, "kvm_intel", {}),
        ["vCPU 1: triple fault at", "cr2  000000000000dead", "see cr2"],
        ["AMD-V", "kvm_pvm"],
    ),
    (
        (report.TRIPLE_FAULT, LONG, KERNEL_CODE, "kvm_pvm", {}),
        ["why: perhaps this host's KVM: under kvm_pvm, SYSCALL"],
        [],
    ),
    (
        (report.FAIL_ENTRY, LONG, KERNEL_CODE, "kvm_intel", {"reason": 0x80000021}),
        ["entry refused by the processor at", "reason 0x80000021, invalid guest state", "dmesg"],
        [],
    ),
    (
        (report.FAIL_ENTRY, LONG, KERNEL_CODE, "kvm_amd", {"reason": (1 << 64) - 1}),
        ["reason 0xffffffffffffffff, invalid guest state"],
        [],
    ),
    (
        (report.FAIL_ENTRY, LONG, KERNEL_CODE, "kvm_amd", {"reason": 0x1234}),
        ["reason 0x1234, see the processor's manual"],
        [],
    ),
    (
        (report.INTERNAL_ERROR, LONG, b"", "kvm_intel", {"suberror": 3, "data": [0xB0E, 1]}),
        ["KVM internal error 3", "could not be delivered", "data 0xb0e 0x1", "IDT"],
        [],
    ),
    (
        (report.INTERNAL_ERROR, LONG, b"", "kvm_intel", {"suberror": 99}),
        ["KVM internal error 99", "unknown to this version"],
        ["data"],
    ),
]


@pytest.mark.parametrize(("given", "there", "absent"), CASES)
def test_report(given: tuple, there: list[str], absent: list[str]) -> None:
    pytest.importorskip("iced_x86")
    cause, sregs, code, backend, keywords = given
    text = report.format_failure(cause, REGS, sregs, code, backend, 1, **keywords)
    for part in there:
        assert part in text
    for part in absent:
        assert part not in text
    lines = text.splitlines()
    assert text.endswith("\n") and lines[0].startswith("vCPU 1: ")
    assert lines[-1].startswith("  what to do: ")
    assert "rip  ffffffff81000123  rflags 00010246 [PF ZF IF RF]" in text
    assert "rsp  ffffc90000003e50" in text and "r15  000000000000000f" in text


def test_state_that_amd_v_lost_is_not_shown_as_the_guest_s() -> None:
    text = report.format_failure(
        report.TRIPLE_FAULT, {"rip": 0xFFF0, "rflags": 2}, RESET, b"\xf4", "kvm_amd", 0
    )
    assert "AMD-V does not keep the state before" in text
    assert "=>" not in text and "earlyprintk" in text


@pytest.mark.parametrize("size", range(0, 17))
def test_any_bytes_can_be_decoded(size: int) -> None:
    for seed in range(16):
        code = os.urandom(size)
        for sregs in (LONG, COMPAT, PROTECTED, REAL):
            text = report.format_failure(
                report.EMULATION_FAILURE, REGS, sregs, code, "kvm_amd", 0, insn=code[:seed]
            )
            assert text.splitlines()[-1].startswith("  what to do: ")


def test_without_a_decoder_the_bytes_are_shown() -> None:
    """A Python without site-packages: iced-x86 is really not there."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from vmm import report\n"
        "slow = {'iced_x86', 'cffi', 'dataclasses', 're', 'typing'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        f"print(report.format_failure('emulation-failure', {REGS!r}, {LONG!r}, "
        f"bytes.fromhex('{KERNEL_CODE.hex()}'), 'kvm_pvm', 0), end='')\n"
    )
    text = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "pip install 'vmm-kvm[full]'" in text
    assert "=> ffffffff81000123  f3 0f b8 c1 90 48 8b 04 25 00 10 00 00 c3" in text
    assert "KVM cannot emulate the instruction f3 0f b8 c1" in text
    assert "what to do: stock Linux cannot run here" in text


# --- the real thing -------------------------------------------------------------------------------


def run_guest(code: bytes, *, protected: bool) -> tuple[int, str]:
    """Run `code` at 0x1000 with an empty IDT: the exit's reason, and the report."""
    with Kvm() as kvm, GuestMemory(1 << 20) as memory, kvm.create_vm() as vm:
        for slot, region in enumerate(memory.regions):
            vm.set_user_memory_region(slot, region.gpa, region.size, region.hva)
        memory.write(0x1000, code)
        vm.set_tss_addr(0xFFFBD000)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            sregs.idt.limit = 0
            if protected:
                sregs.cr0 |= 1
                for name in ("cs", "ss", "ds", "es"):
                    segment = getattr(sregs, name)
                    segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, 8
                    segment.type = 11 if name == "cs" else 3
                    segment.s = segment.db = segment.g = segment.present = 1
            vcpu.set_sregs(sregs)
            regs = vcpu.get_regs()
            regs.rip, regs.rflags, regs.rcx = 0x1000, 2, 0xFF
            vcpu.set_regs(regs)
            reason = vcpu.run()
            general, system = report.registers(vcpu.get_regs(), vcpu.get_sregs())
            insn = b""
            cause = report.TRIPLE_FAULT
            if reason == constants.EXIT_INTERNAL_ERROR:
                internal = vcpu.kvm_run.internal
                assert internal.suberror == constants.INTERNAL_ERROR_EMULATION
                insn = report.instruction_bytes(list(internal.data)[: internal.ndata])
                cause = report.EMULATION_FAILURE
            at = report.linear_rip(general, system)
            found = memory.read(at, report.CODE_BYTES) if memory.contains(at, 48) else b""
            text = report.format_failure(
                cause, general, system, found, host.backend() or "", 0, insn=insn
            )
            return reason, text


@pytest.mark.native_only
@pytest.mark.needs_kvm
def test_popcnt_under_pvm() -> None:
    pytest.importorskip("iced_x86")
    reason, text = run_guest(POPCNT + b"\xf4", protected=False)
    assert reason == constants.EXIT_INTERNAL_ERROR
    assert "emulation failure at 0x1000 (real mode, CPL 0): KVM cannot emulate `popcnt" in text
    assert "popcnt is not known to its interpreter" in text
    assert "rcx  00000000000000ff" in text


@pytest.mark.needs_kvm
def test_triple_fault() -> None:
    reason, text = run_guest(b"\x0f\x0b", protected=True)
    assert reason == constants.EXIT_SHUTDOWN
    assert "triple fault at" in text
    if host.backend() == "kvm_amd":
        assert "AMD-V does not keep" in text
    else:
        assert "triple fault at 0x1000 (32-bit protected mode, CPL 0)" in text
        assert "=> 0000000000001000  0f 0b" in text


# --- whose fault it is ---------------------------------------------------------------------------


def why(cause: str, code: bytes, **sregs: int) -> str:
    """The report's line of that name, under kvm_pvm, in 64-bit kernel code."""
    system = {"cr0": 1, "efer": 0x500, "cs.l": 1, "ss.dpl": 0, **sregs}
    text = report.format_failure(cause, {"rip": 0x100000}, system, code, "kvm_pvm", 0)
    return "".join(line for line in text.splitlines() if "why:" in line or "what to do:" in line)


def test_the_back_end_is_not_blamed_for_a_guests_own_failure() -> None:
    """A kernel that fails before it has set up SYSCALL, in zeroes, or in another mode's code."""
    assert "kvm_pvm" not in why(report.TRIPLE_FAULT, b"\x0f\x0b")
    assert "kvm_pvm" in why(report.TRIPLE_FAULT, b"\x0f\x0b", efer=0x501)
    zeroes = why(report.EMULATION_FAILURE, bytes(48))
    assert "all zeros" in zeroes
    assert "pvm" not in zeroes and "stock Linux" not in zeroes
    assert "kvm_pvm" in why(report.EMULATION_FAILURE, b"\xf3\x0f\xb8\xc0" + b"\x90" * 20)
    pytest.importorskip("iced_x86")
    other = why(report.EMULATION_FAILURE, b"\x06\x1e\x0e" + b"\x90" * 20)  # push es, ds, cs
    assert "no instruction in this mode" in other
    assert "pvm" not in other and "stock Linux" not in other
