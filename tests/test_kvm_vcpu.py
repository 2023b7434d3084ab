"""vmm/kvm/vcpu.py: what ends KVM_RUN from outside, interrupts, and registers by mapping."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests import CODE, DATA, LIMIT, STACK, Guest, Io, assemble
from vmm.errors import KvmError
from vmm.kvm import Kvm, constants
from vmm.kvm.ffi import ffi

pytestmark = pytest.mark.needs_kvm

IRET = {"real": "iret", "long": "iretq", "user": "iretq"}


# --- being interrupted ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["long", "user"])
def test_immediate_exit(mode: str) -> None:
    with Guest("done 9", mode) as guest:
        guest.vcpu.kvm_run.immediate_exit = 1
        for _ in range(3):
            with pytest.raises(KvmError, match=r"^KVM_RUN: .*EINTR") as caught:
                guest.vcpu.run()
            assert caught.value.errno == errno.EINTR
        assert guest.get("rip") == CODE
        guest.vcpu.kvm_run.immediate_exit = 0
        assert guest.done() == 9


@pytest.mark.parametrize(
    ("mode", "source"), [("long", "1: jmp 1b"), ("user", "1: jmp 1b"), ("long", "hlt")]
)
def test_a_signal_ends_kvm_run_and_stays_pending(mode: str, source: str) -> None:
    """Blocked in the thread, not in KVM_RUN: no handler, and none is lost."""
    number = signal.SIGRTMIN + 4
    outcome: list[object] = []
    with Guest(source, mode) as guest:

        def runner() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
            guest.vcpu.set_signal_mask(signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {number})
            try:
                outcome.append(guest.vcpu.run())
            except KvmError as err:
                outcome.append(err.errno)
            outcome.append(signal.sigtimedwait({number}, 0) is not None)
            outcome.append(signal.sigtimedwait({number}, 0) is not None)

        thread = threading.Thread(target=runner)
        thread.start()
        time.sleep(0.05)  # likely in KVM_RUN by now; if not, the test holds all the same
        signal.pthread_kill(thread.ident or 0, number)
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert outcome == [errno.EINTR, True, False]


def test_a_blocked_signal_does_not_end_kvm_run() -> None:
    number = signal.SIGRTMIN + 4
    with Guest("1: in $0x80, %al; test %al, %al; jz 1b; done 9", "long") as guest:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        try:
            guest.vcpu.set_signal_mask({number})
            signal.pthread_kill(threading.get_ident(), number)
            assert guest.vcpu.run() == constants.EXIT_IO
            guest.vcpu.set_signal_mask(())
            with pytest.raises(KvmError) as caught:
                guest.vcpu.run()
            assert caught.value.errno == errno.EINTR
        finally:
            assert signal.sigtimedwait({number}, 0) is not None
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_kvm_run_holds_no_gil() -> None:
    """A thread of ours makes progress while a guest is in KVM_RUN and never comes out."""
    with Guest("mov $0, %eax; 1: inc %eax; movb %al, DATA; jmp 1b", "long") as guest:
        seen = threading.Event()

        def look() -> None:
            while not guest.memory.read_u8(DATA):
                time.sleep(0.001)
            seen.set()
            guest.vcpu.kvm_run.immediate_exit = 1
            signal.pthread_kill(main, number)

        main, number = threading.get_ident(), signal.SIGRTMIN + 4
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        guest.vcpu.set_signal_mask(old)
        thread = threading.Thread(target=look)
        thread.start()
        try:
            with pytest.raises(KvmError) as caught:
                guest.vcpu.run()
        finally:
            thread.join()
            signal.sigtimedwait({number}, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        assert caught.value.errno == errno.EINTR and seen.is_set()


# --- interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "long", "user"])
def test_nmi(mode: str) -> None:
    source = f"done 1; 1: pause; cmpb $7, {DATA}; jne 1b; done 3"
    handler = f"done 2; movb $7, {DATA}; {IRET[mode]}"
    with Guest(source, mode, handlers={2: handler}) as guest:
        assert guest.done() == 1
        guest.vcpu.nmi()
        assert [guest.done(), guest.done()] == [2, 3]


@pytest.mark.parametrize("mode", ["real", "long"])
def test_interrupt_without_an_irqchip(mode: str) -> None:
    source = f"done 1; sti; 1: pause; cmpb $7, {DATA}; jne 1b; done 3"
    handler = f"done 2; movb $7, {DATA}; {IRET[mode]}"
    with Guest(source, mode, irqchip=False, handlers={0x30: handler}) as guest:
        run = guest.vcpu.kvm_run
        assert guest.done() == 1
        assert not run.if_flag and not run.ready_for_interrupt_injection
        run.request_interrupt_window = 1
        assert guest.run() == constants.EXIT_IRQ_WINDOW_OPEN
        run.request_interrupt_window = 0
        assert run.if_flag and run.ready_for_interrupt_injection
        guest.vcpu.interrupt(0x30)
        assert [guest.done(), guest.done()] == [2, 3]


def test_interrupt_with_an_irqchip_is_refused() -> None:
    with Guest("done", "long") as guest, pytest.raises(KvmError) as caught:
        guest.vcpu.interrupt(0x30)
    assert (caught.value.ioctl, caught.value.errno) == ("KVM_INTERRUPT", errno.ENXIO)


def test_a_vector_above_255_is_refused() -> None:
    with Guest("done", "long", irqchip=False) as guest, pytest.raises(KvmError) as caught:
        guest.vcpu.interrupt(256)
    assert caught.value.errno == errno.EINVAL


# --- registers shared by mapping ------------------------------------------------------------------


def as_bytes(struct: Any) -> bytes:
    """The bytes of a structure within another."""
    return bytes(ffi.buffer(ffi.addressof(struct)))


@pytest.mark.parametrize("mode", ["real", "long", "user"])
def test_sync_regs_are_there_after_an_exit(mode: str) -> None:
    source = "mov $7, %ecx; mov $5, %edx; done 9"
    with Guest(source, mode) as guest:
        run = guest.vcpu.kvm_run
        run.kvm_valid_regs = constants.SYNC_X86_REGS | constants.SYNC_X86_SREGS
        assert guest.done() == 9
        assert (run.s.regs.regs.rcx, run.s.regs.regs.rdx) == (7, 5)
        regs, sregs = guest.vcpu.get_regs(), guest.vcpu.get_sregs()
        assert as_bytes(run.s.regs.regs) == bytes(ffi.buffer(regs))
        # Without interrupt_bitmap, whose pending vector may move into the local APIC.
        size = ffi.offsetof("struct kvm_sregs", "interrupt_bitmap")
        assert as_bytes(run.s.regs.sregs)[:size] == bytes(ffi.buffer(sregs))[:size]


@pytest.mark.parametrize("mode", ["real", "long", "user"])
def test_dirty_sync_regs_are_taken(mode: str) -> None:
    with Guest("1: mov %cl, %al; out %al, $0x80; jmp 1b", mode) as guest:
        run = guest.vcpu.kvm_run
        run.kvm_valid_regs = constants.SYNC_X86_REGS
        guest.io()
        for value in (5, 200, 0):
            run.s.regs.regs.rcx = value
            run.kvm_dirty_regs = constants.SYNC_X86_REGS
            assert guest.io() == Io(0x80, 1, bytes((value,)))
            assert run.kvm_dirty_regs == 0
        run.s.regs.regs.rcx = 77  # not marked: not taken
        assert guest.io().data == b"\0"


def test_dirty_sync_sregs_are_taken() -> None:
    with Guest("1: mov %cr2, %rax; out %al, $0x80; jmp 1b", "long") as guest:
        run = guest.vcpu.kvm_run
        run.kvm_valid_regs = constants.SYNC_X86_SREGS
        assert guest.io().data == b"\0"
        run.s.regs.sregs.cr2 = 0x42
        run.kvm_dirty_regs = constants.SYNC_X86_SREGS
        assert guest.io().data == b"\x42"


def test_sync_events() -> None:
    """An NMI by way of the mapping."""
    with Guest("done 1; 1: pause; jmp 1b", "long", handlers={2: "done 2"}) as guest:
        run = guest.vcpu.kvm_run
        run.kvm_valid_regs = constants.SYNC_X86_EVENTS
        assert guest.done() == 1
        run.s.regs.events.nmi.pending = 1
        run.s.regs.events.flags = constants.VCPUEVENT_VALID_NMI_PENDING
        run.kvm_dirty_regs = constants.SYNC_X86_EVENTS
        assert guest.done() == 2


def test_an_unknown_sync_bit_is_refused() -> None:
    with Guest("done", "long") as guest:
        guest.vcpu.kvm_run.kvm_valid_regs = 1 << 40
        with pytest.raises(KvmError) as caught:
            guest.run()
        assert caught.value.errno == errno.EINVAL


# --- the descriptor -------------------------------------------------------------------------------


def test_numbers_and_their_limits() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        with vm.create_vcpu(3) as vcpu:
            assert vcpu.number == 3
            with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU: .*a vCPU of this number exists"):
                vm.create_vcpu(3)
        with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU: .*more vCPUs than") as caught:
            vm.create_vcpu(kvm.check_extension(constants.CAP_MAX_VCPU_ID))
        assert caught.value.errno == errno.EINVAL


def test_closing_leaves_nothing() -> None:
    before = os.listdir("/proc/self/fd")
    with Kvm() as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        assert vcpu.kvm_run.immediate_exit == 0
        vcpu.close()
        vcpu.close()
        assert vcpu.kvm_run is None
    assert os.listdir("/proc/self/fd") == before
    assert "kvm-vcpu" not in Path("/proc/self/maps").read_text()


def test_the_guests_here_start_as_they_say() -> None:
    with Guest("mov %esp, %eax; out %eax, $0x80", "protected") as guest:
        assert guest.io().data == STACK.to_bytes(4, "little")
    assert assemble("done 9", "long") == bytes.fromhex("b009 e6f4")
