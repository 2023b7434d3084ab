"""Ends of a guest that are nobody's wish: KVM_EXIT_INTERNAL_ERROR with the instruction's bytes."""

from __future__ import annotations

import pytest

from tests.support.guests import CODE, DATA, MMIO, Guest, assemble
from tests.support.host import backend
from vmm.errors import KvmError
from vmm.kvm import constants

pytestmark = pytest.mark.needs_kvm

BYTES = constants.INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES

NOT_INTERPRETED = {  # by PVM, whose CPL0 code is KVM's x86 emulator's
    "int3": "int3",
    "int n": "int $0x80",
    "cmpxchg16b": "cmpxchg16b DATA",
    "popcnt": "popcnt %eax, %ebx",
    "crc32": "crc32l %eax, %ebx",
    "clac": "clac",
    "stac": "stac",
    "invpcid": "invpcid DATA, %rax",
    "rdtscp": "rdtscp",
    "verw": "verw %ax",
    "lar": "lar %ax, %ebx",
    "lsl": "lsl %ax, %ebx",
    "xsave": "xsave DATA",
    "xrstor": "xrstor DATA",
    "xgetbv": "xgetbv",
    "ldmxcsr": "ldmxcsr DATA",
    "MMX": "paddb %mm0, %mm1",
    "SSE": "paddb %xmm0, %xmm1",
    "AVX": "vpxor %ymm0, %ymm1, %ymm2",
    "BMI": "andn %eax, %ebx, %ecx",
    "monitor": "monitor",
}


def failure(guest: Guest) -> bytes:
    """Run to an emulation failure: the bytes of the instruction, checked against memory."""
    assert guest.run() == constants.EXIT_INTERNAL_ERROR, guest.where()
    failed = guest.vcpu.kvm_run.emulation_failure
    assert failed.suberror == constants.INTERNAL_ERROR_EMULATION
    assert failed.flags & BYTES
    size = failed.insn_size
    assert 0 < size <= 15
    data = bytes(failed.insn_bytes)[:size]
    assert data == guest.memory.read(guest.get("rip"), size)
    return data


@pytest.mark.native_only
@pytest.mark.parametrize("name", NOT_INTERPRETED)
def test_what_pvm_cannot_interpret(name: str) -> None:
    source = NOT_INTERPRETED[name]
    with Guest(source) as guest:
        code = assemble(source, "long")
        assert failure(guest).startswith(code)
        assert guest.get("rip") == CODE


@pytest.mark.parametrize("asked", [False, True])
def test_an_instruction_kvm_cannot_do_on_mmio(asked: bool) -> None:
    """Where the processor runs CPL0 too, KVM still emulates what touches a device's memory."""
    source = f"mov ${MMIO}, %edi; aesenc (%rdi), %xmm0; done 9"
    with Guest(source) as guest:
        if asked:
            guest.vm.enable_cap(constants.CAP_EXIT_ON_EMULATION_FAILURE, 1)
        assert failure(guest)[:5] == bytes.fromhex("660f38dc07")


def test_at_cpl_3_it_is_the_guests_fault() -> None:
    """KVM gives user code #UD unless asked to exit; PVM exits always."""
    source = f"mov ${MMIO}, %edi; aesenc (%rdi), %xmm0; done 9"
    with Guest(source, "user", handlers={6: "done 6"}) as guest:
        if backend() == "kvm_pvm":
            assert failure(guest)[:5] == bytes.fromhex("660f38dc07")
        else:
            assert guest.done() == 6


def test_at_cpl_3_it_exits_when_asked() -> None:
    source = f"mov ${MMIO}, %edi; aesenc (%rdi), %xmm0; done 9"
    with Guest(source, "user", handlers={6: "done 6"}) as guest:
        guest.vm.enable_cap(constants.CAP_EXIT_ON_EMULATION_FAILURE, 1)
        assert failure(guest)[:5] == bytes.fromhex("660f38dc07")


def test_code_outside_memory() -> None:
    """Nothing to fetch there: an internal error or a guest exception, never a hang."""
    with Guest(f"mov ${MMIO}, %eax; jmp *%rax") as guest:
        assert guest.run() in (constants.EXIT_INTERNAL_ERROR, constants.EXIT_SHUTDOWN)
        assert guest.get("rip") == MMIO


def test_a_failed_entry_or_its_refusal() -> None:
    """Long mode without paging: KVM_SET_SREGS refuses it, or the processor does at KVM_RUN."""
    with Guest("done", "long") as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.cr4 &= ~(1 << 5)  # PAE
        try:
            guest.vcpu.set_sregs(sregs)
        except KvmError as err:
            assert err.ioctl == "KVM_SET_SREGS"
            return
        assert guest.run() in (constants.EXIT_FAIL_ENTRY, constants.EXIT_SHUTDOWN)


def test_the_data_page_is_ours_to_use() -> None:
    with Guest("movq $7, DATA; done 9") as guest:
        assert guest.done() == 9
        assert guest.memory.read_u64(DATA) == 7
