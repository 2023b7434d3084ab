"""vmm/kvm/vcpu.py: capabilities and settings of one vCPU: MSR exits, TSC, kvmclock, translation."""

from __future__ import annotations

import errno

import pytest

from tests.support.guests import CODE, DATA, MMIO, Guest
from tests.support.host import backend
from vmm import layout
from vmm.errors import KvmError
from vmm.kvm import constants, ioctls
from vmm.kvm.ffi import ffi, new

pytestmark = pytest.mark.needs_kvm

UNKNOWN_MSR = 0x4F4D4D56
MSR_TSC, MSR_EFER, MSR_STAR, MSR_LSTAR = 0x10, 0xC0000080, 0xC0000081, 0xC0000082
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
USER_SPACE_MSR_UNKNOWN = 2
CAP_ENFORCE_PV_FEATURE_CPUID = 190
RDMSR = f"mov ${UNKNOWN_MSR}, %ecx; rdmsr; mov %eax, DATA; mov %edx, DATA+4; done 9"
WRMSR = f"mov ${UNKNOWN_MSR}, %ecx; mov $0x11223344, %eax; mov $0x55667788, %edx; wrmsr; done 9"
GP = {13: "done 13"}


# --- MSRs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [RDMSR, WRMSR])
def test_an_unknown_msr_is_the_guests_fault(source: str) -> None:
    with Guest(source, handlers=GP) as guest:
        assert guest.done() == 13


def test_an_unknown_msr_can_be_read_from_us() -> None:
    with Guest(RDMSR, handlers=GP) as guest:
        guest.vm.enable_cap(constants.CAP_X86_USER_SPACE_MSR, USER_SPACE_MSR_UNKNOWN)
        assert guest.run() == constants.EXIT_X86_RDMSR
        msr = guest.vcpu.kvm_run.msr
        assert (msr.index, msr.reason, msr.error) == (UNKNOWN_MSR, USER_SPACE_MSR_UNKNOWN, 0)
        msr.data = 0x8877665544332211
        assert guest.done() == 9
        assert guest.memory.read_u64(DATA) == 0x8877665544332211


def test_an_unknown_msr_can_be_written_to_us() -> None:
    with Guest(WRMSR, handlers=GP) as guest:
        guest.vm.enable_cap(constants.CAP_X86_USER_SPACE_MSR, USER_SPACE_MSR_UNKNOWN)
        assert guest.run() == constants.EXIT_X86_WRMSR
        msr = guest.vcpu.kvm_run.msr
        assert (msr.index, msr.data) == (UNKNOWN_MSR, 0x5566778811223344)
        assert guest.done() == 9


def test_we_may_refuse_it() -> None:
    with Guest(WRMSR, handlers=GP) as guest:
        guest.vm.enable_cap(constants.CAP_X86_USER_SPACE_MSR, USER_SPACE_MSR_UNKNOWN)
        assert guest.run() == constants.EXIT_X86_WRMSR
        guest.vcpu.kvm_run.msr.error = 1
        assert guest.done() == 13


def test_msrs_from_outside_are_msrs_inside() -> None:
    source = (
        f"mov ${MSR_LSTAR}, %ecx; rdmsr; mov %eax, DATA; mov %edx, DATA+4; inc %eax; wrmsr; done"
    )
    with Guest(source) as guest:
        assert guest.vcpu.set_msrs([(MSR_LSTAR, 0x123456789), (MSR_STAR, 5 << 32)]) == []
        guest.done()
        assert guest.memory.read_u64(DATA) == 0x123456789
        assert guest.vcpu.get_msrs([MSR_STAR, MSR_LSTAR]) == {
            MSR_STAR: 5 << 32,
            MSR_LSTAR: 0x12345678A,
        }


def test_msrs_that_are_refused_are_named_and_the_rest_set() -> None:
    with Guest("done") as guest:
        values = [(MSR_STAR, 1), (UNKNOWN_MSR, 2), (MSR_LSTAR, 3), (UNKNOWN_MSR + 1, 4)]
        assert guest.vcpu.set_msrs(values) == [UNKNOWN_MSR, UNKNOWN_MSR + 1]
        wanted = [UNKNOWN_MSR, MSR_STAR, UNKNOWN_MSR, MSR_LSTAR]
        assert guest.vcpu.get_msrs(wanted) == {MSR_STAR: 1, MSR_LSTAR: 3}
        assert guest.vcpu.set_msrs([]) == []
        assert guest.vcpu.get_msrs([]) == {}


def test_more_msrs_than_a_call_takes() -> None:
    with Guest("done") as guest:
        values = [(MSR_STAR, n) for n in range(600)] + [(UNKNOWN_MSR, 0), (MSR_LSTAR, 7)]
        assert guest.vcpu.set_msrs(values) == [UNKNOWN_MSR]
        assert guest.vcpu.get_msrs([MSR_STAR] * 600 + [MSR_LSTAR]) == {MSR_STAR: 599, MSR_LSTAR: 7}


# --- capabilities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("enforced", [False, True])
def test_enable_cap_on_a_vcpu(enforced: bool) -> None:
    """KVM_CAP_ENFORCE_PV_FEATURE_CPUID: MSRs of KVM features that CPUID does not show are gone."""
    source = f"mov ${MSR_KVM_SYSTEM_TIME_NEW}, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr; done 9"
    with Guest(source, handlers=GP) as guest:
        if not guest.kvm.check_extension(CAP_ENFORCE_PV_FEATURE_CPUID):
            pytest.skip("no KVM_CAP_ENFORCE_PV_FEATURE_CPUID")
        table = guest.kvm.supported_cpuid()
        next(entry for entry in table if entry.function == 0x40000001).eax = 0
        guest.vcpu.set_cpuid2(table)
        if enforced:
            guest.vcpu.enable_cap(CAP_ENFORCE_PV_FEATURE_CPUID, 1)
        assert guest.done() == (13 if enforced else 9)


def test_an_unknown_capability_is_refused() -> None:
    with Guest("done") as guest:
        for target in (guest.vcpu, guest.vm):
            with pytest.raises(KvmError, match=r"^KVM_ENABLE_CAP: .*EINVAL"):
                target.enable_cap(0x7FFFFFF0, 1)
        with pytest.raises(KvmError, match=r"^KVM_ENABLE_CAP: .*EINVAL"):
            guest.vm.enable_cap(constants.CAP_X86_USER_SPACE_MSR, 0, flags=1)


# --- time -----------------------------------------------------------------------------------------


def test_tsc_frequency() -> None:
    with Guest("done") as guest:
        khz = guest.vcpu.get_tsc_khz()
        assert 100_000 < khz < 20_000_000
        guest.vcpu.set_tsc_khz(khz)  # its own is always possible
        assert guest.vcpu.get_tsc_khz() == khz


def test_another_tsc_frequency_needs_scaling() -> None:
    with Guest("done") as guest:
        khz = guest.vcpu.get_tsc_khz() // 2
        if guest.kvm.check_extension(constants.CAP_TSC_CONTROL):
            guest.vcpu.set_tsc_khz(khz)
            assert guest.vcpu.get_tsc_khz() == khz
        else:
            with pytest.raises(KvmError, match=r"cannot scale the TSC") as caught:
                guest.vcpu.set_tsc_khz(khz)
            assert caught.value.errno == errno.EINVAL


def test_kvmclock_ctrl_is_for_guests_with_kvmclock() -> None:
    source = (
        f"mov ${MSR_KVM_SYSTEM_TIME_NEW}, %ecx; mov $DATA+1, %eax; xor %edx, %edx; wrmsr; done 9"
    )
    flag = DATA + 29  # struct pvclock_vcpu_time_info: flags
    with Guest(source + "; done 8") as guest:
        with pytest.raises(KvmError) as caught:
            guest.vcpu.kvmclock_ctrl()
        assert (caught.value.ioctl, caught.value.errno) == ("KVM_KVMCLOCK_CTRL", errno.EINVAL)
        assert guest.done() == 9
        assert not guest.memory.read_u8(flag) & 2  # PVCLOCK_GUEST_STOPPED
        guest.vcpu.kvmclock_ctrl()
        assert guest.done() == 8
        assert guest.memory.read_u8(flag) & 2
        assert guest.memory.read_u32(DATA + 24) != 0  # tsc_to_system_mul


def test_the_tsc_offset_is_an_attribute() -> None:
    """KVM_VCPU_TSC_OFFSET (Documentation/virt/kvm/devices/vcpu.rst, section 4)."""
    with Guest("done") as guest:
        value = ffi.new("uint64_t *")
        attr = new("kvm_device_attr")
        attr.group, attr.attr = 0, 0  # KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET
        attr.addr = int(ffi.cast("uintptr_t", value))
        fd = guest.vcpu.fd
        assert ioctls.ioctl_struct(fd, ioctls.HAS_DEVICE_ATTR, attr) == 0
        ioctls.ioctl_struct(fd, ioctls.GET_DEVICE_ATTR, attr)
        before = value[0]
        value[0] = (before + (1 << 40)) % (1 << 64)
        ioctls.ioctl_struct(fd, ioctls.SET_DEVICE_ATTR, attr)
        value[0] = 0
        ioctls.ioctl_struct(fd, ioctls.GET_DEVICE_ATTR, attr)
        moved = (value[0] - before) % (1 << 64)
        # PVM's guests have the host's TSC; hosts whose TSC is not stable correct the offset.
        assert moved == 0 if backend() == "kvm_pvm" else 1 << 39 < moved < 1 << 41
        attr.attr = 77
        with pytest.raises(KvmError, match=r"^KVM_HAS_DEVICE_ATTR: .*ENXIO"):
            ioctls.ioctl_struct(fd, ioctls.HAS_DEVICE_ATTR, attr)


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "protected"])
def test_without_paging_addresses_are_physical(mode: str) -> None:
    with Guest("done", mode) as guest:
        for address in (0, CODE, 0x123456, MMIO):
            assert guest.vcpu.translate(address) == address


def test_translation_through_page_tables() -> None:
    with Guest("done", "long") as guest:
        assert guest.vcpu.translate(CODE + 5) == CODE + 5
        assert guest.vcpu.translate(1 << 32) is None  # the tables end at 4 GiB
        # A second mapping of the first 2 MiB, at 1 GiB.
        guest.memory.write_u64(layout.PML4 + 0x3000, 0x83)
        assert guest.vcpu.translate(0x40000000 + DATA + 7) == DATA + 7
