"""vmm/kvm/vm.py: the VM's own calls: chips' state, timer, clock, addresses, devices."""

from __future__ import annotations

import errno
import os
import time

import pytest

from vmm import layout
from vmm.errors import KvmError
from vmm.kvm import Kvm, constants, vm_state
from vmm.kvm.ffi import ffi, new

pytestmark = pytest.mark.needs_kvm

SECOND = 10**9
DEV_TYPE_VFIO = 4
CREATE_DEVICE_TEST = 1
PICS = (constants.IRQCHIP_PIC_MASTER, constants.IRQCHIP_PIC_SLAVE)


def as_bytes(struct: object) -> bytes:
    return bytes(ffi.buffer(struct))


# --- interrupt controllers and timer --------------------------------------------------------------


@pytest.mark.parametrize("chip", PICS)
def test_pic_state(chip: int) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        state = vm.get_irqchip(chip)
        assert state.chip_id == chip
        state.chip.pic.imr = 0xA5
        state.chip.pic.irq_base = 0x28
        vm.set_irqchip(state)
        again = vm.get_irqchip(chip)
        assert (again.chip.pic.imr, again.chip.pic.irq_base) == (0xA5, 0x28)
        assert as_bytes(again) == as_bytes(state)
        other = vm.get_irqchip(PICS[1 - PICS.index(chip)])
        assert other.chip.pic.irq_base != 0x28


def test_ioapic_state() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        state = vm.get_irqchip(constants.IRQCHIP_IOAPIC)
        assert state.chip.ioapic.base_address == layout.IOAPIC
        assert all(entry & 1 << 16 for entry in state.chip.ioapic.redirtbl)  # masked
        for pin in range(layout.IOAPIC_PINS):
            state.chip.ioapic.redirtbl[pin] = 1 << 16 | 0x30 + pin
        vm.set_irqchip(state)
        again = vm.get_irqchip(constants.IRQCHIP_IOAPIC)
        assert as_bytes(again) == as_bytes(state)


def test_a_chip_there_is_not() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        with pytest.raises(KvmError, match=r"^KVM_GET_IRQCHIP: .*ENXIO"):
            vm.get_irqchip(constants.IRQCHIP_IOAPIC)
        vm.create_irqchip()
        with pytest.raises(KvmError, match=r"^KVM_GET_IRQCHIP: .*EINVAL"):
            vm.get_irqchip(7)


@pytest.mark.parametrize("flags", [0, constants.PIT_SPEAKER_DUMMY])
def test_pit_state(flags: int) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2(flags)
        state = vm.get_pit2()
        state.channels[2].count = 0x4A9
        state.channels[2].mode = 3
        state.channels[2].rw_mode = 3
        vm.set_pit2(state)
        again = vm.get_pit2().channels[2]
        assert (again.count, again.mode, again.rw_mode) == (0x4A9, 3, 3)


def test_a_pit_is_made_once() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        with pytest.raises(KvmError, match=r"^KVM_CREATE_PIT2: .*EEXIST"):
            vm.create_pit2()


# --- the clock ------------------------------------------------------------------------------------


def test_the_clock_goes() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        before = vm.get_clock().clock
        time.sleep(0.02)
        assert before + 0.01 * SECOND < vm.get_clock().clock < before + 3600 * SECOND


def test_the_clock_goes_on_from_where_it_is_set() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        data = new("kvm_clock_data")
        data.clock = 12345 * SECOND
        vm.set_clock(data)
        clock = vm.get_clock()
        assert 12345 * SECOND <= clock.clock < (12345 + 600) * SECOND
        if clock.flags & constants.CLOCK_REALTIME:
            assert abs(clock.realtime - time.time_ns()) < 600 * SECOND
        if clock.flags & constants.CLOCK_HOST_TSC:
            assert clock.host_tsc > 0


# --- addresses and devices ------------------------------------------------------------------------


def test_addresses_that_intel_needs_are_taken() -> None:
    """Each guest of these tests sets both; so here just that other addresses do as well."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.set_identity_map_addr(0xFEFFC000)
        vm.set_tss_addr(0xFEFFD000)
        vm.set_tss_addr(0x10000)
        with vm.create_vcpu(0), pytest.raises(KvmError, match="EINVAL") as caught:
            vm.set_identity_map_addr(0xFEFFC000)  # too late
        assert caught.value.ioctl == "KVM_SET_IDENTITY_MAP_ADDR"


def test_create_device() -> None:
    before = os.listdir("/proc/self/fd")
    with Kvm() as kvm, kvm.create_vm() as vm:
        try:
            vm.create_device(DEV_TYPE_VFIO, CREATE_DEVICE_TEST)
        except KvmError as err:
            assert (err.ioctl, err.errno) == ("KVM_CREATE_DEVICE", errno.ENODEV)
        else:
            os.close(vm.create_device(DEV_TYPE_VFIO))
        with pytest.raises(KvmError, match=r"^KVM_CREATE_DEVICE: .*ENODEV"):
            vm.create_device(999)
    assert os.listdir("/proc/self/fd") == before


def test_capabilities_of_a_vm() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        assert vm.check_extension(constants.CAP_NR_MEMSLOTS) > 100
        assert vm.check_extension(0x7FFFFFF0) == 0


# --- all of it, saved and restored ----------------------------------------------------------------


def test_vm_state_there_and_back() -> None:
    with Kvm() as kvm, kvm.create_vm() as one, kvm.create_vm() as other:
        for vm in (one, other):
            vm.create_irqchip()
            vm.create_pit2()
        ioapic = one.get_irqchip(constants.IRQCHIP_IOAPIC)
        ioapic.chip.ioapic.redirtbl[7] = 0x41
        one.set_irqchip(ioapic)
        pic = one.get_irqchip(constants.IRQCHIP_PIC_SLAVE)
        pic.chip.pic.imr = 0x5A
        one.set_irqchip(pic)
        pit = one.get_pit2()
        pit.channels[0].count = 0x1234
        pit.channels[0].mode = 2
        one.set_pit2(pit)
        clock = new("kvm_clock_data")
        clock.clock = 777 * SECOND
        one.set_clock(clock)

        state = vm_state.save(one)
        assert isinstance(state["clock"], int)
        vm_state.restore(other, state)
        again = vm_state.save(other)

        assert again["irqchips"] == state["irqchips"]
        channel = other.get_pit2().channels[0]
        assert (channel.count, channel.mode) == (0x1234, 2)
        assert state["clock"] <= again["clock"] < state["clock"] + 600 * SECOND


def test_time_does_not_pass_while_it_is_saved() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        state = vm_state.save(vm)
        time.sleep(0.2)
        before = vm.get_clock().clock
        vm_state.restore(vm, state)
        assert vm.get_clock().clock < before
