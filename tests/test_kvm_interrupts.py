"""vmm/kvm/vm.py: lines, messages, irqfds and routes reach a guest's interrupt handler."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.guests import DATA, Guest, assemble
from tests.support.host import backend
from vmm import layout
from vmm.errors import KvmError
from vmm.kvm import Kvm, constants
from vmm.kvm.ffi import ffi

pytestmark = pytest.mark.needs_kvm

PIN = 18
"""Past the 16 that the PIC would deliver too."""
GSI_MSI = 40
VECTOR = 0x41
LEVEL = 1 << 15
COUNT = f"""
    incl {DATA}
    push %rax
    eoi
    pop %rax
    iretq
"""


def listening(pin: int = PIN, entry: int = VECTOR, then: str = "sti; 1: hlt; jmp 1b") -> str:
    """A guest with its local APIC on and an IOAPIC pin open; it says 1 and then waits."""
    low = 0x10 + 2 * pin
    return f"enable_apic; poke IOAPIC, {low}; poke IOAPIC+0x10, {entry}; done 1; {then}"


SAYING = {VECTOR: "eoi; done 2; iretq"}
POLLING = f"""
    xor %ebx, %ebx
    to_user 0x3202
2:  pause
    mov {DATA}, %al
    cmp %bl, %al
    je 2b
    mov %al, %bl
    out %al, $0xf4
    jmp 2b
"""
"""At CPL3, interrupts on: says how many there have been, whenever that changes."""


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def resample() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def soon(action: Callable[[], object]) -> threading.Thread:
    """Do it from another thread, most likely while the guest is in KVM_RUN; sound if it is not."""
    timer = threading.Timer(0.02, action)
    timer.start()
    return timer


def requested(guest: Guest) -> set[int]:
    """Vectors that wait in the local APIC's IRR."""
    page = bytes(ffi.buffer(guest.vcpu.get_lapic().regs))
    words = [struct.unpack_from("<I", page, 0x200 + 0x10 * n)[0] for n in range(8)]
    return {32 * n + bit for n, word in enumerate(words) for bit in range(32) if word >> bit & 1}


# --- lines ----------------------------------------------------------------------------------------


def test_an_edge_wakes_a_halted_guest() -> None:
    with Guest(listening(), handlers=SAYING) as guest:
        assert guest.done() == 1

        def pulse() -> None:
            guest.vm.irq_line(PIN, 1)
            guest.vm.irq_line(PIN, 0)

        for _ in range(3):
            soon(pulse)
            assert guest.done() == 2


def test_a_level_comes_again_until_it_is_taken_away() -> None:
    handlers = {VECTOR: "done 2; eoi; done 3; iretq"}
    with Guest(listening(entry=VECTOR | LEVEL), handlers=handlers) as guest:
        assert guest.done() == 1
        guest.vm.irq_line(PIN, 1)
        assert [guest.done(), guest.done()] == [2, 3]
        assert [guest.done(), guest.done()] == [2, 3]
        guest.vm.irq_line(PIN, 0)
        assert requested(guest) <= {VECTOR}


def test_the_pic_in_real_mode() -> None:
    """As a boot loader has it: vectors 0x20 up, through LINT0 of the local APIC."""
    source = """
        mov $0x11, %al; out %al, $0x20      # ICW1: edge, cascade, ICW4 follows
        mov $0x20, %al; out %al, $0x21      # ICW2: the first vector
        mov $4, %al;    out %al, $0x21
        mov $1, %al;    out %al, $0x21
        mov $0xfd, %al; out %al, $0x21      # all masked but IRQ 1
        done 1
        sti
    1:  hlt
        jmp 1b
    """
    handlers = {0x21: "mov $0x20, %al; out %al, $0x20; done 2; iret"}
    with Guest(source, "real", handlers=handlers) as guest:
        assert guest.done() == 1
        for _ in range(2):
            guest.vm.irq_line(1, 1)
            guest.vm.irq_line(1, 0)
            assert guest.done() == 2


def test_the_pit_ticks() -> None:
    """Channel 0 at about 1 kHz; three ticks, however long they take."""
    source = f"""
        mov $0x11, %al; out %al, $0x20
        mov $0x20, %al; out %al, $0x21
        mov $4, %al;    out %al, $0x21
        mov $1, %al;    out %al, $0x21
        mov $0xfe, %al; out %al, $0x21
        mov $0x34, %al; out %al, $0x43      # channel 0, both bytes, rate generator
        mov $0xa9, %al; out %al, $0x40
        mov $0x04, %al; out %al, $0x40
        sti
    1:  hlt
        cmpb $3, {DATA}
        jb 1b
        done 9
    """
    handlers = {0x20: f"mov $0x20, %al; out %al, $0x20; incb {DATA}; iret"}
    with Guest(source, "real", handlers=handlers, pit=True) as guest:
        assert guest.done() == 9


# --- messages -------------------------------------------------------------------------------------


def test_a_message_wakes_a_halted_guest() -> None:
    with Guest(listening(), handlers=SAYING) as guest:
        assert guest.done() == 1
        taken: list[int] = []
        sender = soon(lambda: taken.append(guest.vm.signal_msi(layout.LAPIC, VECTOR)))
        assert guest.done() == 2
        sender.join()  # the guest may be through before the call has returned
        assert taken == [1]


def test_messages_reach_user_mode_through_a_handler() -> None:
    source = listening(then=POLLING)
    with Guest(source, handlers={VECTOR: COUNT}) as guest:
        assert guest.done() == 1
        for number in (1, 2, 3):
            soon(lambda: guest.vm.signal_msi(layout.LAPIC, VECTOR))
            assert guest.done() == number


def test_a_message_to_nobody_is_told() -> None:
    with Guest(listening(), handlers=SAYING) as guest:
        assert guest.done() == 1
        assert guest.vm.signal_msi(layout.LAPIC | 5 << 12, VECTOR) == 0
        assert requested(guest) == set()


def test_the_upper_half_of_an_address_is_for_x2apic_ids() -> None:
    with Guest(listening(), handlers=SAYING) as guest:
        assert guest.done() == 1
        guest.vm.signal_msi(1 << 40 | layout.LAPIC, VECTOR)
        assert requested(guest) == {VECTOR}


# --- routes ---------------------------------------------------------------------------------------


def test_a_route_moves_a_gsi_to_another_pin() -> None:
    with Guest(listening(pin=20), handlers=SAYING) as guest:
        assert guest.done() == 1
        guest.vm.set_gsi_routing([(5, constants.IRQ_ROUTING_IRQCHIP, constants.IRQCHIP_IOAPIC, 20)])
        guest.vm.irq_line(PIN, 1)  # a GSI without a route is nothing
        assert requested(guest) == set()
        guest.vm.irq_line(5, 1)
        assert guest.done() == 2


def test_one_gsi_may_go_to_two_chips() -> None:
    """As PC interrupts do: PIC and IOAPIC."""
    with Guest(listening(pin=5), handlers=SAYING) as guest:
        assert guest.done() == 1
        guest.vm.set_gsi_routing(
            [
                (5, constants.IRQ_ROUTING_IRQCHIP, constants.IRQCHIP_IOAPIC, 5),
                (5, constants.IRQ_ROUTING_IRQCHIP, constants.IRQCHIP_PIC_MASTER, 5),
            ]
        )
        guest.vm.irq_line(5, 1)
        assert requested(guest) == {VECTOR}
        assert guest.vm.get_irqchip(constants.IRQCHIP_PIC_MASTER).chip.pic.irr & 1 << 5


@pytest.mark.parametrize(
    "route",
    [
        (5, constants.IRQ_ROUTING_IRQCHIP, constants.IRQCHIP_IOAPIC, 99),
        (5, constants.IRQ_ROUTING_IRQCHIP, 7, 0),
        (5, 77, 0, 0),
        (5000, constants.IRQ_ROUTING_MSI, layout.LAPIC, VECTOR),
    ],
)
def test_a_route_that_is_refused(route: tuple[int, int, int, int]) -> None:
    with Guest("done") as guest, pytest.raises(KvmError, match=r"KVM_SET_GSI_ROUTING: .*EINVAL"):
        guest.vm.set_gsi_routing([route])


def test_no_routes_at_all() -> None:
    with Guest(listening(), handlers=SAYING) as guest:
        assert guest.done() == 1
        guest.vm.set_gsi_routing([])
        guest.vm.irq_line(PIN, 1)
        assert requested(guest) == set()


# --- irqfds ---------------------------------------------------------------------------------------


def test_an_irqfd_wakes_a_halted_guest(event: int) -> None:
    with Guest(listening(), handlers=SAYING) as guest:
        guest.vm.irqfd(event, PIN)
        assert guest.done() == 1
        for _ in range(3):
            soon(lambda: os.eventfd_write(event, 1))
            assert guest.done() == 2


def test_an_irqfd_reaches_user_mode_through_a_handler(event: int) -> None:
    source = listening(then=POLLING)
    with Guest(source, handlers={VECTOR: COUNT}) as guest:
        guest.vm.irqfd(event, PIN)
        assert guest.done() == 1
        for number in (1, 2, 3):
            soon(lambda: os.eventfd_write(event, 1))
            assert guest.done() == number


def test_an_irqfd_by_message(event: int) -> None:
    """What MSI-X of a virtio device is; the route may change under the irqfd."""
    handlers = {VECTOR: "eoi; done 2; iretq", VECTOR + 1: "eoi; done 3; iretq"}
    with Guest(listening(), handlers=handlers) as guest:
        guest.vm.set_gsi_routing([(GSI_MSI, constants.IRQ_ROUTING_MSI, layout.LAPIC, VECTOR)])
        guest.vm.irqfd(event, GSI_MSI)
        assert guest.done() == 1
        soon(lambda: os.eventfd_write(event, 1))
        assert guest.done() == 2
        guest.vm.set_gsi_routing([(GSI_MSI, constants.IRQ_ROUTING_MSI, layout.LAPIC, VECTOR + 1)])
        soon(lambda: os.eventfd_write(event, 1))
        assert guest.done() == 3


def test_a_level_irqfd_tells_the_guests_eoi(event: int, resample: int) -> None:
    handlers = {VECTOR: "done 2; eoi; done 3; iretq"}
    with Guest(listening(entry=VECTOR | LEVEL), handlers=handlers) as guest:
        guest.vm.irqfd(event, PIN, resample_fd=resample)
        assert guest.done() == 1
        for _ in range(2):
            soon(lambda: os.eventfd_write(event, 1))
            assert guest.done() == 2
            if backend() != "kvm_pvm":  # which ends an interrupt as it delivers it
                with pytest.raises(BlockingIOError):
                    os.eventfd_read(resample)
            assert guest.done() == 3
            assert os.eventfd_read(resample) == 1
        assert requested(guest) == set()  # the EOI took the line down


def test_an_irqfd_that_was_removed_is_silent(event: int) -> None:
    with Guest(listening(), handlers=SAYING) as guest:
        guest.vm.irqfd(event, PIN)
        assert guest.done() == 1
        guest.vm.irqfd(event, PIN, deassign=True)
        os.eventfd_write(event, 1)
        assert requested(guest) == set()
        guest.vm.irqfd(event, PIN)  # and it can be bound again: what waits in it counts
        assert guest.done() == 2


def test_an_eventfd_is_bound_once(event: int) -> None:
    with Guest("done") as guest:
        guest.vm.irqfd(event, PIN)
        with pytest.raises(KvmError, match="the eventfd is bound to a GSI already") as caught:
            guest.vm.irqfd(event, PIN + 1)
    assert (caught.value.ioctl, caught.value.errno) == ("KVM_IRQFD", errno.EBUSY)


def test_an_irqfd_without_an_irqchip_is_refused(event: int) -> None:
    with Guest("done", irqchip=False) as guest, pytest.raises(KvmError, match=r"KVM_IRQFD: "):
        guest.vm.irqfd(event, PIN, resample_fd=event)


# --- making the chips -----------------------------------------------------------------------------


def test_an_irqchip_is_made_once_and_before_vcpus() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        with pytest.raises(KvmError, match="has an irqchip, or vCPUs, already"):
            vm.create_irqchip()
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0):
        with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP") as caught:
            vm.create_irqchip()
        assert caught.value.errno in (errno.EEXIST, errno.EINVAL)


def test_split_irqchip_has_a_local_apic_and_leaves_the_rest(event: int) -> None:
    """KVM_CAP_SPLIT_IRQCHIP: level-triggered messages of ours come back as EXIT_IOAPIC_EOI."""
    with Guest(listening(), handlers=SAYING, irqchip=False, split_irqchip=True) as guest:
        level = VECTOR | LEVEL | 1 << 14
        guest.vm.set_gsi_routing([(PIN, constants.IRQ_ROUTING_MSI, layout.LAPIC, level)])
        guest.vm.irqfd(event, PIN)
        # There is no IOAPIC in the kernel: the guest's accesses come out.
        assert guest.mmio().addr == layout.IOAPIC
        assert guest.mmio().addr == layout.IOAPIC + 0x10
        assert guest.done() == 1
        os.eventfd_write(event, 1)
        # The guest's `done` may come before (PVM's emulator looks up once in 1,024 instructions).
        reasons = {guest.run(): 0, guest.run(): 1}
        assert reasons.keys() == {constants.EXIT_IO, constants.EXIT_IOAPIC_EOI}
        if reasons[constants.EXIT_IOAPIC_EOI] == 1:
            assert guest.vcpu.kvm_run.eoi.vector == VECTOR


def test_the_handlers_here_are_where_the_gates_point() -> None:
    code = assemble("done 1", "long", ("done 2", "done 3"))
    assert code[0x400:0x404] == bytes.fromhex("b002 e6f4")
    assert code[0x480:0x484] == bytes.fromhex("b003 e6f4")
