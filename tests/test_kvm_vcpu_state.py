"""vmm/kvm/vcpu_state.py and vm_state.py: all of a guest's state, into another VM.

A guest is stopped midway, its state put into another VM with the same memory, and that guest goes
on: a count and a number that depends on every step before show that no step is lost.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.guests import DATA, LIMIT, Guest
from vmm.doctor import guest as doctor
from vmm.errors import KvmError
from vmm.kvm import constants, vcpu_state, vm_state
from vmm.kvm.ffi import new

pytestmark = pytest.mark.needs_kvm

MOVING = {0x10, 0x3B, 0x40000010, 0x40000020}
"""MSRs that are time: IA32_TSC, IA32_TSC_ADJUST, HV_X64_MSR_VP_RUNTIME, _TIME_REF_COUNT."""
MSR_STAR, MSR_FS_BASE, MSR_KERNEL_GS_BASE = 0xC0000081, 0xC0000100, 0xC0000102

A, C = 6364136223846793005, 1442695040888963407  # a linear congruential generator modulo 2**64
FLAG = DATA + 0x100
COUNTING = f"""
    movabs ${A}, %r8
    movabs ${C}, %r9
    movdqu DATA+0x200, %xmm7
1:  imul %r8, %rsi
    add %r9, %rsi
    inc %rdi
    incl DATA
    cmpb $0, {FLAG}
    je 1b
    mov %rdi, DATA+8
    mov %rsi, DATA+16
    movdqu %xmm7, DATA+0x210
    done 9
"""
"""Steps until FLAG is set, then tells how many there were (from RDI on) and where they led."""


def after(steps: int, value: int) -> int:
    """The generator's value after `steps` from `value`, in as many steps as that has bits."""
    scale, offset = A, C
    while steps:
        if steps & 1:
            value = (value * scale + offset) % (1 << 64)
        scale, offset = scale * scale % (1 << 64), (offset * scale + offset) % (1 << 64)
        steps >>= 1
    return value


def run_a_while(guest: Guest) -> None:
    """Run for a little, and stop wherever it is."""
    with doctor._Limit(guest.vcpu, 0.05) as deadline:
        while not deadline.passed:
            try:
                reason = guest.vcpu.run()
            except KvmError as err:
                assert err.errno == errno.EINTR
            else:
                assert reason == constants.EXIT_INTR, guest.where()


def run_until(guest: Guest, condition: Callable[[], bool]) -> None:
    """Run on and on until `condition` holds between two stretches, for at most LIMIT seconds."""
    deadline = time.monotonic() + LIMIT
    run_a_while(guest)
    while not condition():
        assert time.monotonic() < deadline, guest.where()
        run_a_while(guest)


def twin_of(guest: Guest) -> tuple[Guest, dict[str, Any]]:
    """Another VM with the guest's memory and state, and that state."""
    guest.complete()
    state = {
        "vcpu": vcpu_state.save(guest.vcpu, guest.kvm.msr_index_list()),
        "vm": vm_state.save(guest.vm),
    }
    twin = Guest(b"", "real", pit=True)
    twin.memory.write(0, guest.memory.read(0, guest.memory.size))
    vm_state.restore(twin.vm, state["vm"])
    assert vcpu_state.restore(twin.vcpu, state["vcpu"]) == []
    return twin, state


@pytest.mark.parametrize("mode", ["long", "user"])
def test_a_guest_goes_on_in_another_vm(mode: str) -> None:
    with Guest(COUNTING, mode, pit=True, rdi=0, rsi=1) as guest:
        guest.memory.write(DATA + 0x200, bytes(range(16)))
        run_until(guest, lambda: guest.get("rdi") > 0)
        count = guest.get("rdi")
        twin, _ = twin_of(guest)
        with twin:
            run_until(twin, lambda: twin.get("rdi") > count)
            for each in (twin, guest):
                each.memory.write_u8(FLAG, 1)
                assert each.done() == 9
                steps = each.memory.read_u64(DATA + 8)
                assert steps >= count
                assert each.memory.read_u32(DATA) == steps % (1 << 32)
                assert each.memory.read_u64(DATA + 16) == after(steps, 1)
                assert each.memory.read(DATA + 0x210, 16) == bytes(range(16))


def test_a_twins_state_is_the_same() -> None:
    with Guest(
        "mov $5, %rbx; mov %rbx, %cr2; mov $DATA, %eax; mov %rax, %dr1; done 9", pit=True
    ) as g:
        g.vcpu.set_msrs([(MSR_STAR, 1 << 40), (MSR_FS_BASE, 0x7000), (MSR_KERNEL_GS_BASE, 0x8000)])
        assert g.done() == 9
        twin, state = twin_of(g)
        with twin:
            again = vcpu_state.save(twin.vcpu, twin.kvm.msr_index_list())
            again_vm = vm_state.save(twin.vm)
    first = state["vcpu"]
    for msr in first["msrs"].keys() | again["msrs"].keys():
        assert msr in MOVING or again["msrs"].get(msr) == first["msrs"].get(msr), hex(msr)
    for name in first.keys() - {"msrs"}:
        assert again[name] == first[name], name
    assert again_vm["irqchips"] == state["vm"]["irqchips"]


def test_state_is_plain_data() -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(plain(key) and plain(item) for key, item in value.items())
        if isinstance(value, list | tuple):
            return all(plain(item) for item in value)
        return type(value) in (int, bytes, str)

    with Guest("done", pit=True) as guest:
        guest.done()
        assert plain(vcpu_state.save(guest.vcpu, guest.kvm.msr_index_list()))
        assert plain(vm_state.save(guest.vm))


def test_an_answer_that_was_given_is_in_the_state() -> None:
    """KVM_RUN with immediate_exit completes a port access, so that it can be saved."""
    with Guest("in $0x80, %al; mov %al, DATA; done 9", pit=True, rax=0) as guest:
        guest.io()
        guest.answer_io(b"\x42")
        twin, _ = twin_of(guest)
        with twin:
            assert twin.done() == 9
            assert twin.memory.read_u8(DATA) == 0x42


def test_a_pending_nmi_goes_along() -> None:
    with Guest("done 1; 1: pause; jmp 1b", handlers={2: "done 2"}, pit=True) as guest:
        assert guest.done() == 1
        guest.vcpu.nmi()
        twin, _ = twin_of(guest)
        with twin:
            assert twin.done() == 2


def test_a_pending_interrupt_goes_along() -> None:
    """In the local APIC's request register, while the guest has interrupts off."""
    source = "enable_apic; done 1; sti; 1: hlt; jmp 1b"
    with Guest(source, handlers={0x41: "eoi; done 2; iretq"}, pit=True) as guest:
        assert guest.done() == 1
        assert guest.vm.signal_msi(0xFEE00000, 0x41) == 1
        twin, _ = twin_of(guest)
        with twin:
            assert twin.done() == 2


def test_a_level_that_is_up_goes_along() -> None:
    pin_18 = "poke IOAPIC, 0x34; poke IOAPIC+0x10, 0x8041"
    source = f"enable_apic; {pin_18}; done 1; sti; 1: hlt; jmp 1b"
    with Guest(source, handlers={0x41: "done 2; eoi; iretq"}, pit=True) as guest:
        assert guest.done() == 1
        guest.vm.irq_line(18, 1)
        twin, _ = twin_of(guest)
        with twin:
            assert [twin.done(), twin.done()] == [2, 2]
            twin.vm.irq_line(18, 0)


def test_a_halted_guest_is_halted_and_wakes_in_its_twin() -> None:
    source = "enable_apic; done 1; sti; hlt; done 3; 1: hlt; jmp 1b"
    with Guest(source, handlers={0x41: "eoi; done 2; iretq"}, pit=True) as guest:
        assert guest.done() == 1
        run_until(guest, lambda: guest.vcpu.get_mp_state() == constants.MP_STATE_HALTED)
        twin, _ = twin_of(guest)
        with twin:
            run_a_while(twin)
            assert twin.vcpu.get_mp_state() == constants.MP_STATE_HALTED
            threading.Timer(0.02, lambda: twin.vm.signal_msi(0xFEE00000, 0x41)).start()
            assert [twin.done(), twin.done()] == [2, 3]


def test_a_running_timer_runs_on() -> None:
    """The local APIC's, periodic: ticks before, ticks after."""
    source = """
        enable_apic
        poke LAPIC+0x3e0, 3             # divide by 16
        poke LAPIC+0x320, 0x20041       # LVT timer: periodic, vector 0x41
        poke LAPIC+0x380, 100000        # initial count: 1.6 ms of KVM's 1 GHz bus
        sti
    1:  hlt
        jmp 1b
    """
    handler = "push %rax; eoi; pop %rax; incl DATA; cmpb $0, DATA+0x100; je 1f; done 9; 1: iretq"
    with Guest(source, handlers={0x41: handler}, pit=True) as guest:
        run_until(guest, lambda: guest.memory.read_u32(DATA) > 0)
        ticks = guest.memory.read_u32(DATA)
        twin, _ = twin_of(guest)
        with twin:
            twin.memory.write_u8(FLAG, 1)
            assert twin.done(LIMIT) == 9
            assert twin.memory.read_u32(DATA) == ticks + 1


def test_the_time_stamp_counter_does_not_go_back() -> None:
    source = "1: rdtsc; mov %eax, DATA; mov %edx, DATA+4; done 9; jmp 1b"
    with Guest(source, pit=True) as guest:
        guest.done()
        before = guest.memory.read_u64(DATA)
        twin, _ = twin_of(guest)
        with twin:
            twin.done()
            assert twin.memory.read_u64(DATA) > before


def test_the_guests_clock_goes_on() -> None:
    """kvmclock: system_time of struct pvclock_vcpu_time_info, which KVM writes anew."""
    msr = 0x4B564D01  # MSR_KVM_SYSTEM_TIME_NEW
    source = f"mov ${msr}, %ecx; mov $DATA+1, %eax; xor %edx, %edx; wrmsr; done 1; done 2"
    with Guest(source, pit=True) as guest:
        clock = new("kvm_clock_data")
        clock.clock = 777 * 10**9
        guest.vm.set_clock(clock)
        assert guest.done() == 1
        twin, state = twin_of(guest)
        with twin:
            twin.memory.fill(DATA, 32)
            assert twin.done() == 2
            now = twin.memory.read_u64(DATA + 16)
            assert 777 * 10**9 <= state["vm"]["clock"] <= now < 1377 * 10**9


def test_another_tsc_frequency_is_refused_where_it_cannot_be_had() -> None:
    with Guest("done", pit=True) as guest:
        guest.done()
        state = vcpu_state.save(guest.vcpu, guest.kvm.msr_index_list())
        state["tsc_khz"] //= 2
        with Guest(b"", "real", pit=True) as twin:
            if twin.kvm.check_extension(constants.CAP_TSC_CONTROL):
                vcpu_state.restore(twin.vcpu, state)
                assert twin.vcpu.get_tsc_khz() == state["tsc_khz"]
            else:
                with pytest.raises(KvmError, match="cannot scale the TSC"):
                    vcpu_state.restore(twin.vcpu, state)


def test_an_msr_that_kvm_refuses_is_named() -> None:
    with Guest("done", pit=True) as guest:
        guest.done()
        state = vcpu_state.save(guest.vcpu, guest.kvm.msr_index_list())
        state["msrs"] = {0x4F4D4D56: 1, **state["msrs"], MSR_STAR: 77}
        with Guest(b"", "real", pit=True) as twin:
            assert vcpu_state.restore(twin.vcpu, state) == [0x4F4D4D56]
            assert twin.vcpu.get_msrs([MSR_STAR]) == {MSR_STAR: 77}


def test_the_generator_here_is_right() -> None:
    value = 1
    for steps in range(20):
        assert after(steps, 1) == value
        value = (value * A + C) % (1 << 64)
