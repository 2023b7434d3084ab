"""What a machine says when its vCPU cannot go on, from real exits."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import Machine, MachineConfig, errors, report
from vmm.kvm import constants
from vmm.kvm.ffi import ffi
from vmm.machine import exits, failure

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(60)]

MIB = 1 << 20


def made(directory: Path, code: bytes) -> Machine:
    return Machine(MachineConfig(tiny.kernel(directory, code), memory=16 * MIB))


def test_the_back_end_is_the_loaded_module() -> None:
    name = failure.backend()
    assert name == "" or Path("/sys/module", name).is_dir()


def test_an_unexpected_exit_is_called_by_its_name(tmp_path: Path) -> None:
    with made(tmp_path, b"\x90" * 4 + tiny.HALT) as m:
        m.vcpus[0].set_guest_debug(constants.GUESTDBG_ENABLE | constants.GUESTDBG_SINGLESTEP)
        m.start()
        ended = m.wait(60)
    assert (ended.kind, ended.status) == (exits.INTERNAL_ERROR, errors.EXIT_EMULATION)
    assert ended.message == "unexpected exit KVM_EXIT_DEBUG"
    first = ended.report.splitlines()[0]
    assert first.startswith("vCPU 0: unexpected exit KVM_EXIT_DEBUG at 0x10000")
    assert "a single step that was asked for" in first
    assert "internal error" not in ended.report
    assert "what to do: take the guest debug flags off" in ended.report


@pytest.mark.needs_linux_kvm
def test_host_memory_that_cannot_be_accessed(tmp_path: Path) -> None:
    """(PVM's interpreter takes such an address for a device's.)"""
    load = b"\xa1" + (0x4000_0000).to_bytes(4, "little")  # mov eax, [0x40000000]
    hole = mmap.mmap(-1, MIB, prot=0, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = ffi.from_buffer(hole, require_writable=False)
    with made(tmp_path, load + tiny.exits(3)) as m:
        m.vm.set_user_memory_region(7, 0x4000_0000, MIB, int(ffi.cast("uintptr_t", buffer)))
        m.start()
        ended = m.wait(60)
    ffi.release(buffer)
    hole.close()
    assert ended.kind == exits.INTERNAL_ERROR
    assert ended.message == "unexpected exit KVM_EXIT_MEMORY_FAULT"
    assert "at 0x100000 (32-bit protected mode, CPL 0): the host's memory under" in ended.report
    assert "what to do: see that the host is not out of memory" in ended.report


def test_an_exit_without_a_name_has_its_number() -> None:
    zero = dict.fromkeys((*report._GENERAL, "rip", "rflags"), 0)
    text = report.format_failure(
        report.INTERNAL_ERROR, zero, {"cr0": 0}, b"", "kvm_amd", 3, exit_name="number 99"
    )
    assert text.startswith("vCPU 3: unexpected exit number 99 at 0x0 (real mode, CPL 0): this mon")
    assert "what to do: please report it" in text


def test_a_triple_fault(tmp_path: Path) -> None:
    with made(tmp_path, tiny.TRIPLE_FAULT) as m:
        m.start()
        ended = m.wait(60)
    assert ended.kind == exits.TRIPLE_FAULT
    assert ended.report.startswith("vCPU 0: triple fault at ")


def test_code_is_read_as_far_as_it_is_mapped(tmp_path: Path) -> None:
    with made(tmp_path, bytes(range(48)) + tiny.HALT) as m:
        vcpu = m.vcpus[0]
        assert failure.code_at(vcpu, m.memory, tiny.ENTRY) == bytes(range(48))
        end = 16 * MIB
        assert len(failure.code_at(vcpu, m.memory, end - 5)) == 5
        assert failure.code_at(vcpu, m.memory, end) == b""
        assert failure.code_at(vcpu, m.memory, (1 << 64) - 1) == b""


@pytest.mark.native_only
def test_an_emulation_failure_has_the_instruction_kvm_names(tmp_path: Path) -> None:
    with made(tmp_path, tiny.POPCNT + tiny.HALT) as m:
        m.start()
        ended = m.wait(60)
    assert (ended.kind, ended.status) == (exits.EMULATION_FAILURE, errors.EXIT_EMULATION)
    assert "KVM cannot emulate `popcnt eax, eax`" in ended.report
    assert "kvm_pvm, which interprets guest kernel code" in ended.report
