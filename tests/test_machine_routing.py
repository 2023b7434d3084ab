"""vmm/machine/routing.py: messages beside the irqchip's own routes."""

from __future__ import annotations

import os
import struct

import pytest

from tests.support.guests import Guest
from vmm import layout
from vmm.errors import UsageError
from vmm.kvm import Kvm, constants
from vmm.kvm.ffi import ffi
from vmm.machine.routing import Routing, irqchip_routes

pytestmark = pytest.mark.needs_kvm

PIN = 18
"""Of the IOAPIC alone."""
LISTENING = f"enable_apic; poke IOAPIC, {0x10 + 2 * PIN}; poke IOAPIC+0x10, 0x41; done 1; hlt"


def requested(guest: Guest) -> set[int]:
    """Vectors that wait in the local APIC's IRR."""
    page = bytes(ffi.buffer(guest.vcpu.get_lapic().regs))
    words = [struct.unpack_from("<I", page, 0x200 + 0x10 * n)[0] for n in range(8)]
    return {32 * n + bit for n, word in enumerate(words) for bit in range(32) if word >> bit & 1}


def pulse(guest: Guest, gsi: int) -> None:
    guest.vm.irq_line(gsi, 1)
    guest.vm.irq_line(gsi, 0)


def test_messages_and_lines() -> None:
    """One more message leaves all that was there: lines to either chip, and other messages."""
    with Guest(LISTENING) as guest:
        assert guest.done() == 1
        routing = Routing(guest.vm)
        gsis = [routing.allocate() for _ in range(3)]
        assert gsis == [24, 25, 26]
        fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in gsis]
        try:
            want = set()
            for number, (gsi, fd) in enumerate(zip(gsis, fds, strict=True)):
                routing.set_message(gsi, layout.LAPIC, 0x50 + number)
                guest.vm.irqfd(fd, gsi)
                os.eventfd_write(fd, 1)
                want.add(0x50 + number)
            assert requested(guest) == want
            routing.set_message(gsis[1], layout.LAPIC, 0x61)  # under its irqfd
            os.eventfd_write(fds[1], 1)
            assert requested(guest) == want | {0x61}
            pulse(guest, PIN)
            assert requested(guest) == want | {0x61, 0x41}
            pulse(guest, 5)
            assert guest.vm.get_irqchip(constants.IRQCHIP_PIC_MASTER).chip.pic.irr & 1 << 5
            pulse(guest, 12)
            assert guest.vm.get_irqchip(constants.IRQCHIP_PIC_SLAVE).chip.pic.irr & 1 << 4
        finally:
            for fd in fds:
                os.close(fd)


def test_changes_kept_back() -> None:
    """Irqfds made meanwhile have their routes afterwards."""
    with Guest(LISTENING) as guest:
        assert guest.done() == 1
        routing = Routing(guest.vm)
        routing.hold()
        fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3)]
        try:
            for number, fd in enumerate(fds):
                gsi = routing.allocate()
                routing.set_message(gsi, layout.LAPIC, 0x50 + number)
                guest.vm.irqfd(fd, gsi)
            routing.release()
            for fd in fds:
                os.eventfd_write(fd, 1)
            assert requested(guest) == {0x50, 0x51, 0x52}
            routing.set_message(routing.allocate(), layout.LAPIC, 0x60)
            pulse(guest, PIN)
            assert requested(guest) == {0x50, 0x51, 0x52, 0x41}
        finally:
            for fd in fds:
                os.close(fd)


@pytest.mark.parametrize("pin", range(layout.IOAPIC_PINS))
def test_the_irqchips_routes_are_kvms_own(pin: int) -> None:
    """Each line reaches the same pins before and after KVM has our table."""

    def reached(ours: bool) -> tuple[int, int, int]:
        with Kvm() as kvm, kvm.create_vm() as vm:
            vm.create_irqchip()
            if ours:
                vm.set_gsi_routing(irqchip_routes())
            vm.irq_line(pin, 1)
            master = vm.get_irqchip(constants.IRQCHIP_PIC_MASTER).chip.pic.irr
            slave = vm.get_irqchip(constants.IRQCHIP_PIC_SLAVE).chip.pic.irr
            return master, slave, vm.get_irqchip(constants.IRQCHIP_IOAPIC).chip.ioapic.irr

    before = reached(False)
    assert reached(True) == before
    assert any(before)


def test_the_table_is_full_in_the_end() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        routing = Routing(vm)
        limit = vm.check_extension(constants.CAP_IRQ_ROUTING)
        for _ in range(layout.IOAPIC_PINS, limit):
            gsi = routing.allocate()
        with pytest.raises(UsageError, match=f"more interrupt vectors than KVM can route .{limit}"):
            routing.allocate()
        routing.set_message(gsi, layout.LAPIC, 0x40)
