"""vmm/kvm/cpuid.py: CPUID tables to and from struct kvm_cpuid2, and what the guest then sees."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.support.guests import DATA, Guest
from vmm.errors import KvmError
from vmm.kvm import CpuidEntry, Kvm, constants
from vmm.kvm.cpuid import MAX_ENTRIES, from_struct, to_struct
from vmm.kvm.ffi import new

needs_kvm = pytest.mark.needs_kvm
INDEXED = constants.CPUID_FLAG_SIGNIFCANT_INDEX
ENTRIES = [
    CpuidEntry(0, 0, 0, 0xD, 1, 2, 3),
    CpuidEntry(0xD, 1, INDEXED, 0xFFFFFFFF, 0x80000000, 0, 7),
    CpuidEntry(0x40000000),
    CpuidEntry(0x80000008, eax=0x3028),
]
CPUID = f"""
    cpuid
    mov ${DATA}, %esi
    mov %eax, (%rsi); mov %ebx, 4(%rsi); mov %ecx, 8(%rsi); mov %edx, 12(%rsi)
    done
"""


def test_an_entry_is_its_values() -> None:
    entry = CpuidEntry(7, 1, INDEXED, 1, 2, 3, 4)
    other = entry.copy()
    assert other == entry and other is not entry
    other.edx = 5
    assert other != entry and entry.edx == 4
    assert entry != 7
    assert repr(entry) == "CpuidEntry(0x7, 1, 1, 0x1, 0x2, 0x3, 0x4)"
    with pytest.raises(TypeError):
        hash(entry)


@pytest.mark.parametrize("count", range(len(ENTRIES) + 1))
def test_there_and_back(count: int) -> None:
    assert from_struct(to_struct(ENTRIES[:count])) == ENTRIES[:count]


def test_the_structure_has_a_count_and_ten_words_an_entry() -> None:
    from vmm.kvm.ffi import ffi

    data = bytes(ffi.buffer(to_struct(ENTRIES[1:2])))
    values = (0xD, 1, INDEXED, 0xFFFFFFFF, 0x80000000, 0, 7)
    assert data == struct.pack("<2I7I3I", 1, 0, *values, 0, 0, 0)


def test_slots_that_were_not_filled_are_not_entries() -> None:
    table = new("kvm_cpuid2", 8)
    table.nent = 8
    table.entries[0].eax = 1
    table.entries[2].function = 0x80000000
    assert [e.function for e in from_struct(table)] == [0, 0, 0x80000000]


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_a_value_of_more_than_32_bits_is_refused(value: int) -> None:
    with pytest.raises(OverflowError):
        to_struct([CpuidEntry(0, eax=value)])


@needs_kvm
def test_a_vcpu_gives_back_what_it_was_given() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        wanted = {(e.function, e.index): e for e in kvm.supported_cpuid()}
        vcpu.set_cpuid2(list(wanted.values()))
        got = {(e.function, e.index): e for e in vcpu.get_cpuid2()}
        assert got.keys() == wanted.keys()
        # KVM itself changes OSXSAVE, APIC, OSPKE and the XSAVE sizes with the vCPU's state.
        moving = {1, 7, 0xD}
        differing = {key[0] for key in got if got[key] != wanted[key]}
        assert differing <= moving


@needs_kvm
@pytest.mark.parametrize(("leaf", "subleaf"), [(0x40000100, 0), (0x40000101, 0), (0x40000101, 1)])
def test_the_guest_sees_the_table(leaf: int, subleaf: int) -> None:
    """Leaves for hypervisors: no processor has an opinion on those."""
    added = [
        CpuidEntry(0x40000100, 0, 0, 0x40000101, 0x11111111, 0x22222222, 0x33333333),
        CpuidEntry(0x40000101, 0, INDEXED, 1, 2, 3, 4),
        CpuidEntry(0x40000101, 1, INDEXED, 5, 6, 7, 0xFFFFFFFF),
    ]
    with Guest(CPUID, "long", rax=leaf, rcx=subleaf) as guest:
        guest.vcpu.set_cpuid2([*guest.kvm.supported_cpuid(), *added])
        guest.done()
        seen = struct.unpack("<4I", guest.memory.read(DATA, 16))
    wanted = next(e for e in added if (e.function, e.index) == (leaf, subleaf))
    assert seen == (wanted.eax, wanted.ebx, wanted.ecx, wanted.edx)


@needs_kvm
def test_a_feature_that_was_cleared_is_gone() -> None:
    """CX16, which every long-mode KVM supports. (PVM brings some others of its host's back.)"""
    cx16 = 1 << 13
    with Guest(CPUID, "long", rax=1, rcx=0) as guest:
        table = guest.kvm.supported_cpuid()
        leaf = next(entry for entry in table if entry.function == 1)
        assert leaf.ecx & cx16
        leaf.ecx &= ~cx16
        guest.vcpu.set_cpuid2(table)
        guest.done()
        seen = guest.memory.read_u32(DATA + 8)
        kept = next(entry for entry in guest.vcpu.get_cpuid2() if entry.function == 1)
    assert seen == kept.ecx
    assert not seen & cx16


@needs_kvm
def test_too_many_entries() -> None:
    table = [CpuidEntry(0x40000000 + n, eax=1) for n in range(MAX_ENTRIES + 1)]
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(table[:MAX_ENTRIES])
        assert vcpu.get_cpuid2() == table[:MAX_ENTRIES]
        with pytest.raises(KvmError, match=r"^KVM_SET_CPUID2: .*too many CPUID entries") as caught:
            vcpu.set_cpuid2(table)
    assert caught.value.errno == errno.E2BIG
