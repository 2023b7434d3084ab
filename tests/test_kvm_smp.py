"""Several vCPUs: one starts another by INIT and SIPI in the kernel's local APICs, and they talk."""

from __future__ import annotations

import contextlib
import threading

import pytest

from tests.support.guests import DATA, LIMIT, Guest, assemble
from vmm.kvm import Vcpu, constants
from vmm.kvm.ffi import ffi

pytestmark = pytest.mark.needs_kvm

AP_PAGE = 0x10
"""Number of the page that the second processor starts at; the SIPI's vector."""
ICR_LOW, ICR_HIGH = "LAPIC+0x300", "LAPIC+0x310"
START = f"""
    enable_apic
    poke {ICR_HIGH}, 0x01000000     # to APIC id 1
    poke {ICR_LOW}, 0x4500          # INIT
    poke {ICR_HIGH}, 0x01000000
    poke {ICR_LOW}, 0x46{AP_PAGE:02x}          # start-up
"""


class Runner(threading.Thread):
    """Runs a vCPU of `guest` to its next exit, on a thread of its own."""

    def __init__(self, guest: Guest, vcpu: Vcpu) -> None:
        super().__init__()
        self.reason: int | None = None
        self._guest = guest
        self._vcpu = vcpu
        self.start()

    def run(self) -> None:
        self.reason = self._guest.run(LIMIT, self._vcpu)

    def result(self) -> int | None:
        self.join()
        return self.reason


def second(guest: Guest, source: str) -> Vcpu:
    """Another vCPU, whose code is at AP_PAGE, in real mode as a SIPI leaves it."""
    vcpu = guest.vm.create_vcpu(1)
    vcpu.set_cpuid2(guest.kvm.supported_cpuid())
    guest.memory.write(AP_PAGE << 12, assemble(source, "real"))
    return vcpu


def test_init_and_sipi_start_the_second() -> None:
    with Guest(f"{START}; done 1", "long") as guest, second(guest, "done 7") as vcpu:
        assert vcpu.get_mp_state() == constants.MP_STATE_UNINITIALIZED
        runner = Runner(guest, vcpu)
        assert guest.done() == 1
        assert runner.result() == constants.EXIT_IO
        run = vcpu.kvm_run
        assert vcpu.run_map[run.io.data_offset] == 7
        sregs = vcpu.get_sregs()
        assert (sregs.cs.selector, sregs.cs.base) == (AP_PAGE << 8, AP_PAGE << 12)
        assert vcpu.get_mp_state() == constants.MP_STATE_RUNNABLE


def test_two_vcpus_share_memory() -> None:
    """Each waits for the other's word."""
    first = f"{START}; 1: pause; cmpl $5, {DATA}; jne 1b; movl $6, {DATA + 4}; done 1"
    other = f"movl $5, {DATA}; 1: pause; cmpl $6, {DATA + 4}; jne 1b; done 7"
    with Guest(first, "long") as guest, second(guest, other) as vcpu:
        runner = Runner(guest, vcpu)
        assert guest.done() == 1
        assert runner.result() == constants.EXIT_IO


def test_a_vcpu_that_nobody_starts_waits() -> None:
    with Guest("done 1", "long") as guest, second(guest, "done 7") as vcpu:
        with pytest.raises(AssertionError, match=r"no exit in 0\.1 s"):
            guest.run(0.1, vcpu)
        assert vcpu.get_mp_state() == constants.MP_STATE_UNINITIALIZED
        assert guest.done() == 1


def test_an_interrupt_from_one_to_the_other() -> None:
    """An IPI from vCPU 1, by its own local APIC, to the handler of vCPU 0."""
    waiting = f"{START}; sti; 1: hlt; jmp 1b"
    # The second processor goes to 32-bit mode to reach its local APIC.
    sending = """
        lgdtl %cs:0xf0          # offsets are within this page, as CS and IP are
        mov $1, %eax
        mov %eax, %cr0
        ljmpl $0x08, $0x10100
        .org 0xf0
        .word 0x3f
        .long 0x500
        .org 0x100
        .code32
        mov $0x18, %ax
        mov %ax, %ds
        movl $0x1ff, 0xfee000f0
        movl $0, 0xfee00310
        movl $0x4041, 0xfee00300
        done 7
    """
    with (
        Guest(waiting, "long", handlers={0x41: "done 2"}) as guest,
        second(guest, sending) as vcpu,
    ):
        runner = Runner(guest, vcpu)
        assert guest.done() == 2
        assert runner.result() == constants.EXIT_IO


def test_apic_ids_are_vcpu_numbers() -> None:
    with Guest("mov $LAPIC+0x20, %eax; mov (%rax), %eax; mov %eax, DATA; done") as guest:
        assert guest.done() == 0
        assert guest.memory.read_u32(DATA) >> 24 == 0
        with guest.vm.create_vcpu(5) as vcpu:
            assert bytes(ffi.buffer(vcpu.get_lapic().regs))[0x20:0x24] == b"\0\0\0\5"


def test_sixteen_vcpus() -> None:
    """Whatever KVM_CAP_NR_VCPUS recommends."""
    with Guest("done 9") as guest, contextlib.ExitStack() as stack:
        for number in range(1, 16):
            stack.enter_context(guest.vm.create_vcpu(number))
        assert guest.done() == 9
