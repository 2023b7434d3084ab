"""vmm/kvm/vcpu.py: each part of a vCPU's state, there and back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.guests import DATA, MODES, Guest
from vmm.errors import KvmError
from vmm.kvm import Kvm, Vcpu, constants
from vmm.kvm.ffi import ffi

pytestmark = pytest.mark.needs_kvm

MSR_STAR = 0xC0000081
MOVING = {0x10, 0x3B, 0x40000010, 0x40000020}
"""MSRs that are time: IA32_TSC, IA32_TSC_ADJUST, HV_X64_MSR_VP_RUNTIME, _TIME_REF_COUNT."""
XMM0, XSTATE_BV, XSTATE_SSE = 160, 512, 2
"""Offsets in an XSAVE area and a bit there (Intel SDM volume 1, 13.4)."""


def as_bytes(struct: Any) -> bytes:
    return bytes(ffi.buffer(struct))


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    """A vCPU at reset, with a local APIC and the host's processor model."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as made:
            made.set_cpuid2(kvm.supported_cpuid())
            yield made


def test_regs(vcpu: Vcpu) -> None:
    regs = vcpu.get_regs()
    names = [name for name, _ in ffi.typeof("struct kvm_regs").fields]
    assert len(names) == 18
    for position, name in enumerate(names):
        setattr(regs, name, 0x1111_2222_3333_0000 + position)
    regs.rip, regs.rflags = 0x1234, 0x202
    vcpu.set_regs(regs)
    assert as_bytes(vcpu.get_regs()) == as_bytes(regs)


@pytest.mark.parametrize("mode", MODES)
def test_sregs(mode: str) -> None:
    with Guest("done", mode) as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.cr2 = 0x1234
        sregs.gs.base = 0x5000
        guest.vcpu.set_sregs(sregs)
        assert as_bytes(guest.vcpu.get_sregs()) == as_bytes(sregs)
        guest.done()


@pytest.mark.parametrize("mode", MODES)
def test_sregs2(mode: str) -> None:
    with Guest("done", mode) as guest:
        if not guest.kvm.check_extension(constants.CAP_SREGS2):
            pytest.skip("no KVM_CAP_SREGS2")
        sregs = guest.vcpu.get_sregs2()
        sregs.cr2 = 0x1234
        guest.vcpu.set_sregs2(sregs)
        assert as_bytes(guest.vcpu.get_sregs2()) == as_bytes(sregs)
        # The two agree on all they share.
        shared = ffi.offsetof("struct kvm_sregs", "interrupt_bitmap")
        assert as_bytes(guest.vcpu.get_sregs())[:shared] == as_bytes(sregs)[:shared]
        guest.done()


def test_segments_are_what_the_guest_loads() -> None:
    with Guest("mov $0x18, %ax; mov %ax, %fs; done", "protected") as guest:
        guest.done()
        segment = guest.vcpu.get_sregs().fs
        assert (segment.selector, segment.base, segment.limit) == (0x18, 0, 0xFFFFFFFF)
        assert (segment.type, segment.s, segment.present, segment.g) == (3, 1, 1, 1)


def test_fpu(vcpu: Vcpu) -> None:
    fpu = vcpu.get_fpu()
    fpu.fcw = 0x27F
    for n in range(16):
        ffi.buffer(fpu.xmm[n])[:] = bytes((n,)) * 16
    for n in range(8):
        ffi.buffer(fpu.fpr[n])[:10] = bytes((0x80 + n,)) * 10
    vcpu.set_fpu(fpu)
    again = vcpu.get_fpu()
    assert again.fcw == 0x27F
    assert as_bytes(again.xmm) == as_bytes(fpu.xmm)
    assert as_bytes(again.fpr) == as_bytes(fpu.fpr)


def test_fpu_and_xsave_are_the_same_registers(vcpu: Vcpu) -> None:
    area = vcpu.get_xsave()
    assert len(area) >= 4096
    area[XMM0 : XMM0 + 16] = bytes(range(16))
    area[XSTATE_BV] |= XSTATE_SSE
    vcpu.set_xsave(area)
    assert as_bytes(vcpu.get_fpu().xmm)[:16] == bytes(range(16))
    assert vcpu.get_xsave()[XMM0 : XMM0 + 16] == bytes(range(16))


def test_xsave2_holds_what_xsave_does(vcpu: Vcpu) -> None:
    if not vcpu.vm.check_extension(constants.CAP_XSAVE2):
        pytest.skip("no KVM_CAP_XSAVE2 (Linux 5.17)")
    area = vcpu.get_xsave2()
    assert len(area) == max(vcpu.vm.check_extension(constants.CAP_XSAVE2), 4096)
    assert area[:4096] == vcpu.get_xsave()[:4096]
    vcpu.set_xsave(area)
    assert vcpu.get_xsave2() == area


def test_sse_registers_reach_the_guest_and_come_back() -> None:
    source = "movdqu %xmm3, DATA; movdqu DATA+16, %xmm4; done 9"
    with Guest(source, "user") as guest:
        guest.memory.write(DATA + 16, bytes(range(16, 32)))
        area = guest.vcpu.get_xsave()
        area[XMM0 + 48 : XMM0 + 64] = bytes(range(16))
        area[XSTATE_BV] |= XSTATE_SSE
        guest.vcpu.set_xsave(area)
        assert guest.done() == 9
        assert guest.memory.read(DATA, 16) == bytes(range(16))
        assert as_bytes(guest.vcpu.get_fpu().xmm[4]) == bytes(range(16, 32))


def test_xcrs(vcpu: Vcpu) -> None:
    xcrs = vcpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr) == (1, 0)
    assert xcrs.xcrs[0].value & 1  # x87 cannot be off
    leaf = next((e for e in vcpu.get_cpuid2() if (e.function, e.index) == (0xD, 0)), None)
    if leaf is None or not leaf.eax & 2:
        pytest.skip("this KVM gives its guests no XSAVE")
    xcrs.xcrs[0].value = 3
    vcpu.set_xcrs(xcrs)
    assert vcpu.get_xcrs().xcrs[0].value == 3
    xcrs.xcrs[0].value = 2  # SSE without x87
    with pytest.raises(KvmError, match=r"^KVM_SET_XCRS: .*EINVAL"):
        vcpu.set_xcrs(xcrs)


def test_debugregs(vcpu: Vcpu) -> None:
    state = vcpu.get_debugregs()
    assert state.dr6 == 0xFFFF0FF0 and state.dr7 == 0x400
    for n in range(4):
        state.db[n] = 0x1000 * (n + 1)
    state.dr7 = 0x401
    vcpu.set_debugregs(state)
    assert as_bytes(vcpu.get_debugregs()) == as_bytes(state)


def test_lapic(vcpu: Vcpu) -> None:
    state = vcpu.get_lapic()
    page = ffi.buffer(state.regs)
    assert len(page) == 1024
    assert struct.unpack_from("<I", page, 0x20)[0] == 0  # id
    struct.pack_into("<I", page, 0x80, 0x20)  # TPR
    struct.pack_into("<I", page, 0xF0, 0x1FF)  # SVR: on
    struct.pack_into("<I", page, 0x350, 0x10041)  # LINT0, masked
    vcpu.set_lapic(state)
    again = ffi.buffer(vcpu.get_lapic().regs)
    assert [struct.unpack_from("<I", again, at)[0] for at in (0x80, 0xF0, 0x350)] == [
        0x20,
        0x1FF,
        0x10041,
    ]
    assert vcpu.get_sregs().cr8 == 2  # the same register


def test_a_lapic_there_is_not() -> None:
    with Guest("done", irqchip=False) as guest:
        with pytest.raises(KvmError, match=r"^KVM_GET_LAPIC: .*EINVAL"):
            guest.vcpu.get_lapic()
        with pytest.raises(KvmError, match=r"^KVM_SET_LAPIC: .*EINVAL"):
            guest.vcpu.set_lapic(ffi.new("struct kvm_lapic_state *"))


def test_vcpu_events(vcpu: Vcpu) -> None:
    events = vcpu.get_vcpu_events()
    assert not events.nmi.pending and not events.exception.injected
    events.nmi.pending = 1
    events.nmi.masked = 1
    events.flags |= constants.VCPUEVENT_VALID_NMI_PENDING
    vcpu.set_vcpu_events(events)
    again = vcpu.get_vcpu_events()
    assert (again.nmi.pending, again.nmi.masked) == (1, 1)


@pytest.mark.parametrize("state", range(4))
def test_mp_state(vcpu: Vcpu, state: int) -> None:
    assert vcpu.get_mp_state() == constants.MP_STATE_RUNNABLE  # the first; others wait for SIPI
    vcpu.set_mp_state(state)
    assert vcpu.get_mp_state() == state


def test_a_sipi_that_was_received_starts_the_vcpu(vcpu: Vcpu) -> None:
    vcpu.set_mp_state(constants.MP_STATE_SIPI_RECEIVED)
    assert vcpu.get_mp_state() == constants.MP_STATE_RUNNABLE
    assert vcpu.get_sregs().cs.base == vcpu.get_regs().rip == 0


def test_other_vcpus_wait_for_sipi(vcpu: Vcpu) -> None:
    with vcpu.vm.create_vcpu(1) as second:
        assert second.get_mp_state() == constants.MP_STATE_UNINITIALIZED
    with pytest.raises(KvmError, match=r"^KVM_SET_MP_STATE: .*EINVAL"):
        vcpu.set_mp_state(99)


def test_every_msr_of_the_list_can_be_set_to_what_it_is(vcpu: Vcpu) -> None:
    values = vcpu.get_msrs(vcpu.vm.kvm.msr_index_list())
    assert MSR_STAR in values
    assert vcpu.set_msrs(values.items()) == []
    again = vcpu.get_msrs(list(values))
    differing = {index for index in values if again[index] != values[index]}
    assert differing <= MOVING


def test_the_tsc_offset() -> None:
    """As KVM_VCPU_TSC_OFFSET says; kvm_pvm takes it and leaves the TSC alone."""
    with Guest("done") as guest:
        vcpu = guest.vcpu
        offset = vcpu.get_tsc_offset()
        if offset is None:
            pytest.skip("KVM before Linux 5.16")
        before = vcpu.get_msrs([0x10])[0x10]
        vcpu.set_tsc_offset(offset + 10**15)
        after = vcpu.get_tsc_offset()
        assert after is not None
        by = (after - offset) % (1 << 64)
        # On a host whose TSC is not stable KVM itself moves it a little meanwhile.
        moved = abs(by - 10**15) < 10**13
        assert moved or by == 0
        assert (vcpu.get_msrs([0x10])[0x10] >= before + 9 * 10**14) == moved


def test_nested_state() -> None:
    """Of a guest without guests of its own; what is given back is taken."""
    with Guest("done") as guest:
        state = guest.vcpu.get_nested_state()
        assert bool(state) == bool(guest.vm.check_extension(constants.CAP_NESTED_STATE))
        if state:
            guest.vcpu.set_nested_state(state)
            assert guest.vcpu.get_nested_state() == state
        else:
            with pytest.raises(KvmError, match="KVM_SET_NESTED_STATE"):
                guest.vcpu.set_nested_state(bytes(128))
