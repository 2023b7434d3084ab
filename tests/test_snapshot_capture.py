"""vmm/snapshot/capture.py: a machine's state into another machine, which goes on from there."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.bare import MIB, DriverOn, Twin, bare_machine, until
from tests.support.guests import DATA
from tests.support.virtio_driver import BUFFERS, SplitRing
from tests.support.virtio_pci import VECTOR_BASE, MachineDriver
from tests.test_kvm_vcpu_state import COUNTING, FLAG, after
from vmm import Machine, MachineConfig, StateError, layout
from vmm.devices.power import GED_GENERATION, GED_SELECTOR
from vmm.errors import SnapshotError
from vmm.snapshot.capture import SCHEMA, apply, capture, quiesced
from vmm.virtio import spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.pci import NOTIFY
from vmm.virtio.queue import Chain, VirtQueue

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(180)]


class Keeper(VirtioDevice):
    """Keeps each request until it is told to answer; answers what it read."""

    ID, QUEUES = 999, (16, 16)

    def __init__(self) -> None:
        super().__init__("keeper")
        self.kept: list[tuple[int, VirtQueue, Chain]] = []
        self.at_once = False
        self._idle = threading.Condition()

    def request(self, index: int, chain: Chain) -> int | None:
        if self.at_once:
            return chain.write(chain.read())
        queue = self.slots[index].queue
        assert queue is not None
        self.kept.append((index, queue, chain))
        return None

    def answer(self) -> None:
        index, queue, chain = self.kept[0]
        self.finish(index, queue, chain, chain.write(chain.read()))
        with self._idle:
            del self.kept[0]
            self._idle.notify_all()

    def drain(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not self.kept)

    def stopped(self) -> None:
        self.kept.clear()


def counter(machine: Machine) -> int:
    return machine.memory.read_u32(DATA)


def steps_are_right(machine: Machine, at_least: int) -> None:
    """Every step the COUNTING guest made led where it should."""
    steps = machine.memory.read_u64(DATA + 8)
    assert steps >= at_least
    assert machine.memory.read_u32(DATA) == steps % (1 << 32)
    assert machine.memory.read_u64(DATA + 16) == after(steps, 1)
    assert machine.memory.read(DATA + 0x210, 16) == bytes(range(16))


# --- vCPUs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["long", "user"])
def test_a_machine_goes_on_in_another(mode: str) -> None:
    with bare_machine(COUNTING, mode, regs={"rdi": 0, "rsi": 1}) as m:
        m.memory.write(DATA + 0x200, bytes(range(16)))
        m.start()
        until(lambda: counter(m) > 0)
        m.pause()
        steps = counter(m)
        twin = Twin(m)
        m.resume()
        with twin.machine() as again:
            assert again.state == "created"
            again.start()
            until(lambda: counter(again) > steps)
            for each in (m, again):
                each.memory.write_u8(FLAG, 1)
                assert each.wait(60).status == 9
                steps_are_right(each, steps)


AP_CODE = 0x10000
AP_COUNTER = DATA + 0x20
# In real mode at 0x10000: 1: inc dword [AP_COUNTER]; jmp 1b, with DS at 0
AP = b"\x31\xc0\x8e\xd8" + b"\x66\xff\x06" + struct.pack("<H", AP_COUNTER) + b"\xeb\xf9"
WAKES_AP = f"""
    enable_apic
1:  incl DATA
    cmpb $0, {FLAG}
    je 1b
    poke LAPIC+0x310, 0x1000000
    poke LAPIC+0x300, 0x4500        # INIT
    poke LAPIC+0x310, 0x1000000
    poke LAPIC+0x300, 0x4610        # SIPI: start at 0x10000
2:  incl DATA
    cmpb $0, {FLAG + 1}
    je 2b
    done 5
"""


def test_a_processor_that_waits_for_its_start_waits_in_the_twin_and_runs_in_its_twin() -> None:
    with bare_machine(WAKES_AP, cpus=2) as m:
        m.memory.write(AP_CODE, AP)
        m.start()
        until(lambda: counter(m) > 0)
        m.pause()
        first = Twin(m)
    with first.machine(cpus=2) as m:
        m.start()
        m.memory.write_u8(FLAG, 1)
        until(lambda: m.memory.read_u32(AP_COUNTER) > 0)
        m.pause()
        second = Twin(m)
    with second.machine(cpus=2) as m:
        before = m.memory.read_u32(AP_COUNTER)
        m.start()
        until(lambda: m.memory.read_u32(AP_COUNTER) > before)
        m.memory.write_u8(FLAG + 1, 1)
        assert m.wait(60).status == 5


READS_TSC = f"""
1:  rdtsc
    mov %eax, DATA
    mov %edx, DATA+4
    cmpb $0, {FLAG}
    je 1b
    done 3
"""


def has_own_tsc() -> bool:
    """Whether a guest's TSC can be another than the host's (kvm_pvm leaves it alone)."""
    with bare_machine(HALTED) as m:
        vcpu = m.vcpus[0]
        offset = vcpu.get_tsc_offset()
        if offset is not None:
            vcpu.set_tsc_offset(offset - 10**6)
            return vcpu.get_tsc_offset() == (offset - 10**6) % (1 << 64)
        return True


@pytest.mark.parametrize("elapse", [True, False])
def test_clocks_step_or_go_on(elapse: bool) -> None:
    """A minute passes between the two, by the host's clock."""
    with bare_machine(READS_TSC) as m:
        m.start()
        until(lambda: m.memory.read_u64(DATA) > 0)
        m.pause()
        twin = Twin(m)
        khz = m.vcpus[0].get_tsc_khz()
    state = twin.state
    state["vm"]["realtime"] -= 60 * 10**9
    with Machine(MachineConfig(memory=4 * MIB)) as again:
        for gpa, data in twin.ram:
            again.memory.write(gpa, data)
        apply(again, state, elapse=elapse)
        passed = (int(again.vm.get_clock().clock) - state["vm"]["clock"]) / 1e9
        assert (60 if elapse else 0) <= passed < (600 if elapse else 60)
        if has_own_tsc():
            tsc = again.vcpus[0].get_msrs([0x10])[0x10] - state["tsc"]["value"]
            assert abs(tsc / khz / 1000 - passed) < 30
        again.memory.write_u64(DATA, 0)
        again.start()
        until(lambda: again.memory.read_u64(DATA) >= state["tsc"]["value"])
        again.memory.write_u8(FLAG, 1)
        assert again.wait(60).status == 3


def test_back_in_the_same_machine() -> None:
    """What a rollback does: memory and state of a moment before, and once more."""
    with bare_machine(COUNTING, regs={"rdi": 0, "rsi": 1}) as m:
        m.memory.write(DATA + 0x200, bytes(range(16)))
        m.start()
        until(lambda: counter(m) > 0)
        m.pause()
        twin = Twin(m)
        tsc, steps = twin.state["tsc"]["value"], counter(m)
        vcpu, own = m.vcpus[0], has_own_tsc()
        own = own and vcpu.get_tsc_offset() is not None
        for _ in range(3):
            m.resume()
            until(lambda: counter(m) > steps)
            m.pause()
            if own:  # so far ahead that no slow host gets there
                vcpu.set_tsc_offset((vcpu.get_tsc_offset() or 0) + 10**15)
            for gpa, data in twin.ram:
                m.memory.write(gpa, data)
            apply(m, twin.state, elapse=False, renew=False)
            assert counter(m) == steps
            if own:
                assert tsc <= vcpu.get_msrs([0x10])[0x10] < tsc + 10**14
        m.resume()
        m.memory.write_u8(FLAG, 1)
        assert m.wait(60).status == 9
        steps_are_right(m, steps)


# --- devices --------------------------------------------------------------------------------------

HALTED = "1: hlt; jmp 1b"


@pytest.fixture
def kept() -> Iterator[tuple[Machine, DriverOn, Keeper]]:
    """A machine with a device that keeps requests, and its driver."""
    device = Keeper()
    with bare_machine(HALTED, devices=[lambda: device]) as m, DriverOn(m) as driver:
        m.start()
        yield m, driver, device


def test_requests_under_way_are_completed(kept: tuple[Machine, DriverOn, Keeper]) -> None:
    m, driver, device = kept
    driver.memory.write(BUFFERS, b"hello")
    driver.rings[0].add([(BUFFERS, 5, False), (BUFFERS + 64, 5, True)])
    driver.kick()
    until(lambda: bool(device.kept))
    m.pause()
    timer = threading.Timer(0.05, device.answer)
    timer.start()
    twin = Twin(m)
    timer.join()
    assert not device.kept
    again = Keeper()
    with twin.machine(devices=[lambda: again]) as copy:
        assert copy.memory.read(BUFFERS + 64, 5) == b"hello"
        copy.start()
        assert len(driver.rings[0].used()) == 1


def test_a_queue_goes_on_in_the_copy(kept: tuple[Machine, DriverOn, Keeper]) -> None:
    """What was made available before, and what is after, each once; in the machine as well."""
    m, driver, device = kept
    device.at_once = True
    ring = driver.rings[1]
    assert isinstance(ring, SplitRing)
    driver.memory.write(BUFFERS, b"0123456789")
    for at in range(3):
        ring.add([(BUFFERS + at, 1, False), (BUFFERS + 64 + at, 1, True)])
        driver.kick(1)
    until(lambda: driver.memory.read(BUFFERS + 64, 3) == b"012")
    m.pause()
    with quiesced(m):
        ring.add([(BUFFERS + 3, 1, False), (BUFFERS + 67, 1, True)])
        driver.kick(1)
        twin = Twin(m)
        assert driver.memory.read(BUFFERS + 67, 1) == b"\0"
    until(lambda: driver.memory.read(BUFFERS + 67, 1) == b"3")
    again = Keeper()
    again.at_once = True
    with twin.machine(devices=[lambda: again]) as copy:
        assert copy.memory.read(BUFFERS + 64, 4) == b"012\0"
        copy.start()
        until(lambda: copy.memory.read(BUFFERS + 64, 4) == b"0123")
        until(lambda: copy.memory.read_u16(ring.device + 2) == 4)


WAITS = """
    enable_apic
    poke IOAPIC, 0x30               # pin 16: edge, vector 0x41
    poke IOAPIC+0x10, 0x41
    movl $1, DATA
    sti
1:  hlt
    jmp 1b
"""


def test_an_interrupt_raised_while_paused_is_not_lost() -> None:
    device = Keeper()
    machine = bare_machine(WAITS, handlers={0x41: "done 6"}, devices=[lambda: device])
    with machine as m, DriverOn(m) as driver:
        m.start()
        until(lambda: m.memory.read_u32(DATA) == 1)
        driver.rings[0].add([(BUFFERS, 5, False), (BUFFERS + 64, 5, True)])
        driver.kick()
        until(lambda: bool(device.kept))
        m.pause()
        device.answer()
        twin = Twin(m)
        with twin.machine(devices=[Keeper]) as copy:
            copy.start()
            assert copy.wait(60).status == 6
        m.resume()
        assert m.wait(60).status == 6


VECTOR = VECTOR_BASE + 1  # of queue 0
POLLS_LAPIC = f"""
    enable_apic
    movl $1, DATA
1:  mov LAPIC+{0x200 + 0x10 * (VECTOR >> 5):#x}, %eax      # requested
    test ${1 << (VECTOR & 31):#x}, %eax
    jz 1b
    done 7
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_messages_over_pci(when: str) -> None:
    """MSI-X, its routes and the place of the notify addresses; an answer that was given while the
    machine was paused is told in the copy, and so is one to a request made there."""
    device = Keeper()
    machine = bare_machine(POLLS_LAPIC, devices=[lambda: device], transport="pci")
    with machine as m, MachineDriver(m, device) as driver:
        ring = driver.rings[0]
        if when == "before":
            ring.add([(BUFFERS, 1, False), (BUFFERS + 64, 1, True)])
            driver.kick()
            until(lambda: bool(device.kept))
        m.start()
        until(lambda: m.memory.read_u32(DATA) == 1)
        m.pause()
        if when == "before":
            device.answer()
        twin = Twin(m)
        place = driver.bus.bar(4)
    again = Keeper()
    again.at_once = True
    with twin.machine(devices=[lambda: again], transport="pci") as copy:
        transport: Any = copy.platform.virtio.transports[0]  # type: ignore[union-attr]
        assert transport.function.bars[4].base == place
        assert transport.msix.enabled and transport.device.status & spec.DRIVER_OK
        copy.start()
        if when == "after":
            copy.memory.write(BUFFERS, b"x")
            ring.memory = copy.memory
            ring.add([(BUFFERS, 1, False), (BUFFERS + 64, 1, True)])
            copy.platform.mmio.write(place + NOTIFY, 2, 0)
            until(lambda: copy.memory.read(BUFFERS + 64, 1) == b"x")
        assert copy.wait(60).status == 7


def test_legacy_devices() -> None:
    with bare_machine(HALTED) as m:
        pio = m.platform.pio
        pio.write(layout.PORT_UART + 7, 1, 0x5A)
        pio.write(layout.PORT_RTC, 1, 0x40)
        pio.write(layout.PORT_RTC + 1, 1, 0x77)
        pio.write(layout.PORT_PIT + 3, 1, 0x34)
        pio.write(layout.PORT_PIT, 1, 0x99)
        m.start()
        m.pause()
        twin = Twin(m)
    with twin.machine() as copy:
        pio = copy.platform.pio
        assert pio.read(layout.PORT_UART + 7, 1) == 0x5A
        pio.write(layout.PORT_RTC, 1, 0x40)
        assert pio.read(layout.PORT_RTC + 1, 1) == 0x77
        assert copy.platform.pit.created
        assert copy.vm.get_pit2().channels[0].mode == 2
    with bare_machine(HALTED) as m:
        plain = Twin(m)
        m.platform.pit.create()
        state = m.vm.get_pit2()
        state.channels[0].mode = 3
        m.vm.set_pit2(state)
        apply(m, plain.state)
        assert m.vm.get_pit2().channels[0].mode != 3


def test_the_guest_is_told_of_a_new_generation() -> None:
    with bare_machine(HALTED) as m:
        m.platform.vmgenid = True
        m.memory.write(layout.VMGENID, bytes(range(16)))
        twin = Twin(m)
    with twin.machine() as first, twin.machine() as second:
        ids = {bytes(range(16))}
        for each in (first, second):
            ids.add(each.memory.read(layout.VMGENID, 16))
            assert each.platform.pio.read(layout.PORT_ACPI + GED_SELECTOR, 4) == GED_GENERATION
        assert len(ids) == 3
        apply(first, twin.state, renew=False)
        assert first.platform.pio.read(layout.PORT_ACPI + GED_SELECTOR, 4) == 0


# --- refusals -------------------------------------------------------------------------------------


def test_only_while_it_is_still() -> None:
    with bare_machine(HALTED) as m:
        state = capture(m)
        m.start()
        with pytest.raises(StateError, match="snapshot: the machine is running, not created"):
            capture(m)
        with pytest.raises(StateError, match="restore: the machine is running"):
            apply(m, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 2}, "the snapshot has cpus 1, this machine 2"),
        ({"memory": 8 * MIB}, "the snapshot has memory 4194304, this machine 8388608"),
        ({"rng": True}, r"the snapshot has devices \[\], this machine \['rng'\]"),
        ({"transport": "pci"}, "the snapshot has transport mmio, this machine pci"),
    ],
)
def test_the_state_of_another_machine(options: dict[str, Any], message: str) -> None:
    with bare_machine(HALTED) as m:
        state = capture(m)
    with (
        Machine(MachineConfig(**{"memory": 4 * MIB, **options})) as other,
        pytest.raises(SnapshotError, match=message),
    ):
        apply(other, state)


def test_a_newer_schema() -> None:
    with bare_machine(HALTED) as m:
        state = {**capture(m), "schema": SCHEMA + 1}
        with pytest.raises(SnapshotError, match=f"schema {SCHEMA + 1}, newer than {SCHEMA}"):
            apply(m, state)


def test_an_msr_this_host_does_not_have() -> None:
    with bare_machine(HALTED) as m:
        state = capture(m)
        state["vcpus"][0]["msrs"][0x4F4D4D56] = 1
        with pytest.raises(SnapshotError, match="MSRs 0x4f4d4d56 of vCPU 0"):
            apply(m, state)
