"""vmm/kvm/vcpu.py: the exits of KVM_RUN that a guest's instructions cause, in every mode."""

from __future__ import annotations

import errno
import mmap

import pytest

from tests.support.guests import DATA, MMIO, MODES, Guest, Io, Mmio
from vmm.errors import KvmError
from vmm.kvm import constants
from vmm.kvm.ffi import ffi

pytestmark = pytest.mark.needs_kvm

PORT = 0x300
SIZES = {1: "%al", 2: "%ax", 4: "%eax"}
VALUE = 0x8877665544332211


# --- ports ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_out(mode: str, size: int) -> None:
    source = f"mov $0x44332211, %eax; mov ${PORT}, %dx; out {SIZES[size]}, %dx"
    with Guest(source, mode) as guest:
        assert guest.io() == Io(PORT, size, bytes.fromhex("11223344")[:size])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_in_sets_just_its_part_of_eax(mode: str, size: int) -> None:
    source = f"mov $0xcccccccc, %eax; mov ${PORT}, %dx; in %dx, {SIZES[size]}; out %eax, %dx"
    with Guest(source, mode) as guest:
        assert guest.io() == Io(PORT, size, None)
        guest.answer_io(bytes.fromhex("11223344")[:size])
        assert guest.io().data == bytes.fromhex("11223344")[:size] + b"\xcc" * (4 - size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "letter"), [(1, "b"), (2, "w"), (4, "l")])
def test_string_output_comes_in_order(mode: str, size: int, letter: str) -> None:
    """As one exit with a count or as one an item: that is the back end's choice."""
    data = bytes(range(size * 5))
    source = f"cld; mov ${DATA}, %esi; mov $5, %ecx; mov ${PORT}, %dx; rep outs{letter}; done 9"
    with Guest(source, mode) as guest:
        guest.memory.write(DATA, data)
        seen = b""
        while (access := guest.io()).port == PORT:
            assert access.size == size and access.data is not None
            assert len(access.data) == size * access.times
            seen += access.data
        assert (seen, access.data) == (data, b"\x09")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "letter"), [(1, "b"), (2, "w"), (4, "l")])
def test_string_input_goes_to_memory(mode: str, size: int, letter: str) -> None:
    data = bytes(range(1, size * 5 + 1))
    source = f"cld; mov ${DATA}, %edi; mov $5, %ecx; mov ${PORT}, %dx; rep ins{letter}; done 9"
    with Guest(source, mode) as guest:
        left = data
        while (access := guest.io()).port == PORT:
            part = access.size * access.times
            guest.answer_io(left[:part])
            left = left[part:]
        assert left == b"" and access.data == b"\x09"
        assert guest.memory.read(DATA, len(data) + 1) == data + b"\0"


def test_string_output_downwards() -> None:
    source = f"std; mov ${DATA + 2}, %esi; mov $3, %ecx; mov ${PORT}, %dx; rep outsb; done 9"
    with Guest(source, "long") as guest:
        guest.memory.write(DATA, b"abc")
        seen = b""
        while (access := guest.io()).port == PORT:
            seen += access.data or b""
        assert seen == b"cba"


def test_string_output_over_a_page_limit() -> None:
    source = f"cld; mov ${DATA + 4094}, %esi; mov $4, %ecx; mov ${PORT}, %dx; rep outsb; done 9"
    with Guest(source, "long") as guest:
        guest.memory.write(DATA + 4094, b"abcd")
        seen = b""
        while (access := guest.io()).port == PORT:
            seen += access.data or b""
        assert seen == b"abcd"


# --- memory-mapped --------------------------------------------------------------------------------

LOADS = {1: "mov (%edi), %al", 2: "mov (%edi), %ax", 4: "mov (%edi), %eax"}
STORES = {1: "mov %al, (%edi)", 2: "mov %ax, (%edi)", 4: "mov %eax, (%edi)"}


@pytest.mark.parametrize("mode", ["protected", "long", "user"])
@pytest.mark.parametrize("size", STORES)
def test_mmio_write(mode: str, size: int) -> None:
    source = f"mov $0x44332211, %eax; mov ${MMIO}, %edi; {STORES[size]}; done 9"
    with Guest(source, mode) as guest:
        assert guest.mmio() == Mmio(MMIO, size, bytes.fromhex("11223344")[:size])
        assert guest.done() == 9


@pytest.mark.parametrize("mode", ["protected", "long", "user"])
@pytest.mark.parametrize("size", LOADS)
def test_mmio_read(mode: str, size: int) -> None:
    source = f"mov $0xcccccccc, %eax; mov ${MMIO}, %edi; {LOADS[size]}; out %eax, $0x80"
    with Guest(source, mode) as guest:
        assert guest.mmio() == Mmio(MMIO, size, None)
        guest.answer_mmio(bytes.fromhex("11223344")[:size])
        assert guest.io().data == bytes.fromhex("11223344")[:size] + b"\xcc" * (4 - size)


@pytest.mark.parametrize("mode", ["long", "user"])
def test_mmio_of_eight_bytes(mode: str) -> None:
    source = f"mov ${MMIO}, %edi; mov (%rdi), %rax; mov %rax, 8(%rdi); done 9"
    with Guest(source, mode) as guest:
        assert guest.mmio() == Mmio(MMIO, 8, None)
        guest.answer_mmio(VALUE.to_bytes(8, "little"))
        assert guest.mmio() == Mmio(MMIO + 8, 8, VALUE.to_bytes(8, "little"))
        assert guest.done() == 9


@pytest.mark.parametrize("mode", ["long", "user"])
def test_mmio_of_sixteen_bytes_is_two_exits(mode: str) -> None:
    source = f"mov ${MMIO}, %edi; movdqu {DATA}, %xmm0; movdqu %xmm0, (%rdi); done 9"
    with Guest(source, mode) as guest:
        guest.memory.write(DATA, bytes(range(16)))
        assert guest.mmio() == Mmio(MMIO, 8, bytes(range(8)))
        assert guest.mmio() == Mmio(MMIO + 8, 8, bytes(range(8, 16)))
        assert guest.done() == 9


@pytest.mark.parametrize("mode", ["long", "user"])
def test_a_read_that_starts_in_memory_and_ends_outside(mode: str) -> None:
    """Only the part outside exits; KVM joins it with the rest."""
    with Guest(f"mov ${0x200000 - 4}, %edi; mov (%rdi), %rax; done 9", mode) as guest:
        guest.memory.write_u32(0x200000 - 4, 0x44332211)
        assert guest.mmio() == Mmio(0x200000, 4, None)
        guest.answer_mmio(b"\x55\x66\x77\x88")
        assert guest.done() == 9
        assert guest.get("rax") == VALUE & ~0xFF | 9  # `done` sets AL


def test_a_read_modify_write_is_a_read_and_a_write() -> None:
    with Guest(f"mov ${MMIO}, %edi; addl $5, (%rdi); done 9", "long") as guest:
        assert guest.mmio() == Mmio(MMIO, 4, None)
        guest.answer_mmio(b"\x0a\0\0\0")
        assert guest.mmio() == Mmio(MMIO, 4, b"\x0f\0\0\0")


# --- user mode ------------------------------------------------------------------------------------


def test_user_mode_is_cpl_3_and_back_at_cpl_0_by_a_fault() -> None:
    source = "mov %cs, %eax; out %al, $0x80; ud2"
    handlers = {6: "mov %cs, %eax; out %al, $0x81; addq $2, (%rsp); iretq"}
    with Guest(source + "; mov %cs, %eax; out %al, $0x82", "user", handlers=handlers) as guest:
        levels = [
            (access.port, access.data[0] & 3)
            for access in (guest.io(), guest.io(), guest.io())
            if access.data
        ]
    assert levels == [(0x80, 3), (0x81, 0), (0x82, 3)]


def test_a_user_page_fault_tells_its_address_and_cause() -> None:
    source = "movabs $0x8000000000, %rdi; mov %al, (%rdi)"  # 512 GiB: not mapped
    handlers = {14: f"mov %cr2, %rax; mov %rax, {DATA}; pop %rax; mov %rax, {DATA + 8}; done 9"}
    with Guest(source, "user", handlers=handlers) as guest:
        assert guest.done() == 9
        assert guest.memory.read_u64(DATA) == 0x8000000000
        assert guest.memory.read_u64(DATA + 8) == 2 | 4  # a write, by user code


# --- halting, and ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_hlt_comes_out_without_an_irqchip(mode: str) -> None:
    with Guest("hlt; done 9", mode, irqchip=False) as guest:
        assert guest.run() == constants.EXIT_HLT
        assert guest.done() == 9


@pytest.mark.parametrize("mode", ["protected", "long", "user"])
def test_triple_fault(mode: str) -> None:
    with Guest("ud2", mode) as guest:
        assert guest.run() == constants.EXIT_SHUTDOWN


def test_memory_of_ours_that_is_not_accessible() -> None:
    """At CPL3: PVM's emulator, which does CPL0, makes it an MMIO exit."""
    with Guest(f"mov %al, {0x100000}; done 9", "user", map_memory=False) as guest:
        region = guest.memory.regions[0]
        guest.vm.set_user_memory_region(0, 0, 0x100000, region.hva)
        hole = mmap.mmap(-1, 0x1000, prot=mmap.PROT_READ)
        hva = int(ffi.cast("uintptr_t", ffi.from_buffer(hole)))
        guest.vm.set_user_memory_region(1, 0x100000, 0x1000, hva)
        with pytest.raises(KvmError, match=r"KVM_RUN: .*host memory is not accessible") as caught:
            guest.run()
        assert caught.value.errno == errno.EFAULT


def test_a_port_access_is_complete_only_when_it_runs_again() -> None:
    """What `immediate_exit` is for: the state can be saved then."""
    with Guest("in $0x80, %al; done 9", "long", rax=0) as guest:
        assert guest.io() == Io(0x80, 1, None)
        guest.answer_io(b"\x55")
        assert guest.get("rax") & 0xFF == 0
        guest.vcpu.kvm_run.immediate_exit = 1
        with pytest.raises(KvmError) as caught:
            guest.vcpu.run()
        assert caught.value.errno == errno.EINTR
        assert guest.get("rax") & 0xFF == 0x55
        guest.vcpu.kvm_run.immediate_exit = 0
        assert guest.done() == 9
