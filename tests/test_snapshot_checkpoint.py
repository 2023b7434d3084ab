"""vmm/snapshot/checkpoint.py: a machine goes back to a point, whoever has changed it since."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import statistics, tiny
from tests.support.bare import MIB, bare_machine, until
from tests.support.guests import DATA
from tests.test_kvm_vcpu_state import COUNTING, FLAG
from tests.test_snapshot_capture import counter, steps_are_right
from vmm import HostError, Machine, MachineConfig, StateError, UsageError, layout
from vmm.devices.device import Device
from vmm.machine import exits
from vmm.snapshot.translations import shadowed

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(180)]

START = {"rdi": 0, "rsi": 1}
PATTERN = 0x100000
"""Where guests and tests write patterns; two MiB of RAM are left then."""

ALIAS, HERE, THERE = 6 * MIB, 2 * MIB, 4 * MIB
ENTRY = layout.PML4 + 0x2000 + 8 * 3
"""The page directory's entry for ALIAS."""
MAPS = f"""
    mov ${ALIAS}, %rsi
    mov $DATA+16, %rdi
1:  incq DATA+8
    cmpb $0, {FLAG}
    je 1b
    cmpb $2, {FLAG}
    je 2f
    mov (%rdi), %rax            # have the entry point THERE
    mov %rax, {ENTRY}
2:  mov (%rsi), %rax
    mov %rax, DATA
3:  jmp 3b
"""
PAINTS = f"""
    mov $0x5a5a5a5a, %rax       # two pages in every three of a MiB
    mov ${PATTERN}, %rdi
1:  stosq
    add $4088, %rdi
    stosq
    add $8184, %rdi
    inc %rax
    cmp ${PATTERN + MIB - 16384}, %rdi
    jb 1b
    movb $1, DATA
2:  cmpb $0, {FLAG}
    je 2b
    done 3
"""


def ram(machine: Machine) -> list[bytes]:
    return [bytes(region.data) for region in machine.memory.regions]


def registers(machine: Machine) -> dict[str, int]:
    regs, sregs = machine.vcpus[0].get_regs(), machine.vcpus[0].get_sregs()
    names = ("rax", "rdi", "rsi", "rsp", "rip", "rflags")
    return {**{name: getattr(regs, name) for name in names}, "cr3": sregs.cr3, "cr0": sregs.cr0}


def running(machine: Machine) -> Machine:
    machine.start()
    until(lambda: counter(machine) > 0)
    return machine


# --- memory and vCPUs ---------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_guest_and_host_writes_are_undone_page_for_page(backing: str) -> None:
    with bare_machine(PAINTS, "user", backing=backing) as m:
        m.memory.write(PATTERN, random.Random(1).randbytes(MIB))
        m.checkpoint()
        before, regs = ram(m), registers(m)
        reader, writer = os.pipe()
        for turn in range(10):
            (m.start if turn == 0 else m.resume)()
            until(lambda: m.memory.read_u8(DATA) == 1, "the guest has painted")
            assert m.memory.read_u32(PATTERN) == 0x5A5A5A5A
            m.memory.write(PATTERN + MIB + turn * 4096 - 10, b"a program's, over two pages")
            os.write(writer, bytes(3 * 4096))
            os.readv(reader, [m.memory.view(PATTERN + 50000, 3 * 4096)])  # as devices do
            m.pause()
            assert ram(m) != before
            m.rollback()
            assert m.state == "paused"
            assert ram(m) == before
            assert registers(m) == regs
        os.close(reader)
        os.close(writer)
        m.memory.write_u8(FLAG, 1)
        m.resume()
        assert m.wait(60).status == 3


@pytest.mark.parametrize("mode", ["long", "user"])
def test_what_processors_know_of_page_tables_is_forgotten(mode: str) -> None:
    """A page that was mapped elsewhere since is at its place; KVM flushes TLBs, if it has not made
    tables of its own anew."""
    with bare_machine(MAPS, mode, memory=8 * MIB) as m:
        flags = m.memory.read_u64(ENTRY) & 0xFFF
        m.memory.write_u64(ENTRY, HERE | flags)
        m.memory.write_u64(DATA + 16, THERE | flags)
        m.memory.write_u64(HERE, 1)
        m.memory.write_u64(THERE, 2)
        m.start()
        until(lambda: m.memory.read_u64(DATA + 8) > 0)
        m.checkpoint()
        for turn in (1, 2, 1, 2, 2, 1, 2):
            m.memory.write_u8(FLAG, turn)
            until(lambda: m.memory.read_u64(DATA) != 0)
            assert m.memory.read_u64(DATA) == 3 - turn
            m.pause()
            before = statistics.counter(m, "remote_tlb_flush_requests")
            m.rollback()
            flushes = statistics.counter(m, "remote_tlb_flush_requests") - before
            assert flushes or shadowed()
            m.resume()


@pytest.mark.parametrize("mode", ["long", "user"])
def test_a_running_machine_goes_on_from_the_point(mode: str) -> None:
    """Its steps and its registers are of one moment, every time."""
    with bare_machine(COUNTING, mode, regs=START) as m:
        m.memory.write(DATA + 0x200, bytes(range(16)))  # for an SSE register
        running(m)
        m.checkpoint()
        assert m.state == "running"
        steps = counter(m)
        for _ in range(5):
            until(lambda: counter(m) > steps + 100)
            m.rollback()
            assert m.state == "running"
            until(lambda: counter(m) > steps)
        m.memory.write_u8(FLAG, 1)
        assert m.wait(60).status == 9
        steps_are_right(m, steps)


def test_two_processors() -> None:
    from tests.test_snapshot_capture import AP, AP_CODE, AP_COUNTER, WAKES_AP

    with bare_machine(WAKES_AP, cpus=2) as m:
        m.memory.write(AP_CODE, AP)
        running(m)
        m.pause()
        m.checkpoint()
        for _ in range(3):
            m.resume()
            m.memory.write_u8(FLAG, 1)
            until(lambda: m.memory.read_u32(AP_COUNTER) > 0, "the second processor runs")
            m.pause()
            m.rollback()
            assert m.memory.read_u32(AP_COUNTER) == 0
        m.memory.write_u8(FLAG, 1)
        m.memory.write_u8(FLAG + 1, 1)
        m.resume()
        assert m.wait(60).status == 5


def test_a_newer_checkpoint_takes_the_olders_place() -> None:
    with running(bare_machine(COUNTING, regs=START)) as m:
        m.pause()
        for turn in range(4):
            m.memory.write(PATTERN, bytes([turn]) * 5000)
            m.checkpoint()
            point = ram(m)
            m.resume()
            m.memory.fill(PATTERN + 3000, 5000, 0xFF)
            steps = counter(m)
            until(lambda: counter(m) > steps)  # noqa: B023
            m.pause()
            m.rollback()
            assert ram(m) == point


@pytest.mark.one_lane
def test_a_restored_machine_needs_no_copy_and_a_snapshot_does_not_disturb(tmp_path: Path) -> None:
    """It stays over the snapshot's file; one made meanwhile puts it over another."""
    with bare_machine(COUNTING, regs=START) as m:
        m.memory.write(PATTERN, random.Random(1).randbytes(MIB))
        m.snapshot(str(tmp_path / "one"))
    with running(Machine.restore(str(tmp_path / "one"))) as m:
        base = m.memory.base
        m.pause()
        m.memory.write(PATTERN + 10, b"before the point")
        m.checkpoint()
        assert m.memory.base is base
        point = ram(m)
        for turn in range(3):
            m.memory.write(PATTERN + 10, b"after the point.")
            m.memory.fill(PATTERN + turn * 4096, 9000, turn)
            m.rollback()
            assert ram(m) == point
        m.memory.write(PATTERN + 10, b"after the point.")
        m.snapshot(str(tmp_path / "two"), base=str(tmp_path / "one"), track=True)
        m.memory.write(PATTERN + 10, b"much after it...")
        m.rollback()
        assert ram(m) == point
        [copy_of_it] = m.clone()
        with copy_of_it:
            assert copy_of_it.memory.base is m.memory.base
            assert copy_of_it.memory.read(PATTERN, MIB) == m.memory.read(PATTERN, MIB)
        m.memory.write_u8(FLAG, 1)
        m.resume()
        assert m.wait(60).status == 9
    with Machine.restore(str(tmp_path / "two")) as m:
        assert m.memory.read(PATTERN + 10, 16) == b"after the point."


@pytest.mark.one_lane
def test_a_machine_restored_from_a_differential(tmp_path: Path) -> None:
    """Its memory is mapped from several files."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with bare_machine(COUNTING, regs=START) as m:
        m.memory.write(PATTERN, random.Random(1).randbytes(MIB))
        m.snapshot(one)
        m.memory.write(PATTERN + 5000, random.Random(2).randbytes(9000))
        m.snapshot(two, base=one)
        expected = m.memory.read(PATTERN, MIB)
    with running(Machine.restore(two)) as m:
        m.pause()
        m.checkpoint()
        point = ram(m)
        assert m.memory.read(PATTERN, MIB) == expected
        [its] = m.clone()
        with its:
            assert ram(its) == point
        m.memory.fill(PATTERN, MIB, 1)
        m.rollback()
        assert ram(m) == point


@pytest.mark.one_lane
def test_memory_another_process_hands_over_is_refused(tmp_path: Path) -> None:
    with bare_machine(COUNTING, regs=START) as m:
        m.snapshot(str(tmp_path / "one"))
    try:
        m = Machine.restore(str(tmp_path / "one"), pages="uffd")
    except HostError as err:
        pytest.skip(str(err))
    with m:
        for call in (m.checkpoint, m.clone):
            with pytest.raises(StateError, match=r"memory that another process hands over \(pages"):
                call()


# --- a machine that has stopped -------------------------------------------------------------------

FUZZED = f"""
    movb DATA, %al
    cmpb $0x42, %al
    je 1f
    out %al, $0xf4
1:  movb $1, {PATTERN}
    cmpb $0x42, DATA+1
    jne 2f
    ud2
2:  jmp 2b
"""


def test_a_guest_ends_or_crashes_again_and_again() -> None:
    """The loop of docs/clones.md: each input from the same point."""
    with bare_machine(FUZZED) as m:
        m.checkpoint()
        events: list[str] = []
        m.subscribe(lambda event: events.append(event.name))
        m.start()
        assert m.wait(60).status == 0
        for data, kind in ((b"\x07", exits.EXIT_PORT), (b"BB", exits.TRIPLE_FAULT)) * 3:
            m.rollback()
            assert (m.state, m.exit, m.memory.read_u8(PATTERN)) == ("paused", None, 0)
            m.memory.write(DATA, data)
            m.resume()
            ended = m.wait(60)
            assert ended.kind == kind
            assert ended.kind != exits.EXIT_PORT or ended.status == 7
        m.rollback()
        m.memory.write(DATA, b"B.")  # neither: it goes on
        m.resume()
        until(lambda: m.memory.read_u8(PATTERN) == 1)
        m.stop()
        m.rollback()
        m.memory.write(DATA, b"\x05")
        m.resume()
        assert m.wait(60).status == 5
    assert events.count("stopped") == 9


def test_it_may_end_at_that_moment() -> None:
    """A rollback that meets the guest's end undoes that too."""
    with bare_machine(FUZZED) as m:
        m.checkpoint()
        m.start()
        for _ in range(100):
            m.rollback()
            assert m.state in ("running", "paused", "stopped")  # it may have ended again
            if m.state == "paused":  # it had ended before
                m.resume()
        assert m.wait(60).status == 0


@pytest.mark.one_lane
def test_the_console_and_the_time_limit_work_after_the_end(tmp_path: Path) -> None:
    code = tiny.prints(b"ready\n") + tiny.exits(4)
    from vmm import MachineConfig

    config = MachineConfig(tiny.kernel(tmp_path, code), memory=16 * MIB, timeout=100)
    with Machine(config) as m:
        m.checkpoint()
        m.start()
        for _ in range(3):
            assert m.console.wait_for("ready", timeout=60) == "ready"
            assert m.wait(60).status == 4
            m.rollback()
            m.resume()
        assert m.wait(60).status == 4
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(MIB))
    return path


@pytest.mark.one_lane
def test_a_checkpoint_that_fails_leaves_the_former_or_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vmm.memory import point
    from vmm.snapshot import checkpoint

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with running(bare_machine(COUNTING, regs=START)) as m:
        m.pause()
        m.checkpoint()
        before = ram(m)
        m.memory.fill(PATTERN, 5000, 1)
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(checkpoint, "capture", full)
            m.checkpoint()
        m.rollback()
        assert ram(m) == before
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(point, "settle", full)
            m.checkpoint()
        with pytest.raises(StateError, match="there is no checkpoint"):
            m.rollback()
        m.checkpoint()
        m.memory.fill(PATTERN, 5000, 1)
        m.rollback()
        assert ram(m) == before


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.one_lane
def test_a_disk_without_overlay_is_refused(image: Path) -> None:
    with bare_machine(COUNTING, drives=[str(image)]) as m:
        with pytest.raises(StateError, match=r"checkpoint: blk0: .*disk.img is written to; .*snap"):
            m.checkpoint()
        with pytest.raises(StateError, match="there is no checkpoint"):
            m.rollback()
    with bare_machine(COUNTING, drives=[f"{image},readonly"]) as m:
        m.checkpoint()


@pytest.mark.one_lane
def test_what_another_process_serves_is_refused(tmp_path: Path) -> None:
    """It writes to guest memory by itself, and its state is not ours."""
    with running(bare_machine(COUNTING, regs=START, shares=[f"{tmp_path},tag=a"])) as m:
        for call in (m.checkpoint, m.clone):
            with pytest.raises(StateError, match="served by another process"):
                call()
            assert m.state == "running"
            assert all(region.kind == "memfd" for region in m.memory.regions)


@pytest.mark.one_lane
def test_wrong_uses() -> None:
    with bare_machine(COUNTING) as m:
        with pytest.raises(UsageError, match="disks='both' is not one of rollback, keep"):
            m.checkpoint(disks="both")
        with pytest.raises(StateError, match="rollback: there is no checkpoint; call checkpoint"):
            m.rollback()
        m.start()
        m.checkpoint()
        m.stop()
        with pytest.raises(StateError, match="checkpoint: the machine is stopped, not created"):
            m.checkpoint()
        m.rollback()  # that of before is still there
        assert m.state == "paused"
    with pytest.raises(StateError, match="checkpoint: the machine is closed"):
        m.checkpoint()
    with pytest.raises(StateError, match="rollback: the machine is closed"):
        m.rollback()


class Calls(Device):
    """A register that calls a function in the vCPU's thread."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__("calls")
        self.function = function
        self.raised: list[str] = []

    def write(self, offset: int, size: int, value: int) -> None:
        try:
            self.function()
        except StateError as err:
            self.raised.append(str(err))


@pytest.mark.parametrize("call", ["checkpoint", "rollback"])
def test_a_vcpus_thread_cannot_wait_for_itself(call: str) -> None:
    with bare_machine("out %al, $0x80\ndone 1") as m:
        m.checkpoint()
        device = Calls(getattr(m, call))
        m.platform.pio.add(0x80, 1, device)
        m.start()
        assert m.wait(60).status == 1
        assert device.raised == [
            f"{call}: called in a vCPU's own thread, which cannot wait for itself; call it in "
            "another"
        ]


# --- nothing is left ------------------------------------------------------------------------------


def mappings() -> list[str]:
    """Of guest memory over a base."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd" in line]


@pytest.mark.one_lane
def test_nothing_is_left(image: Path) -> None:
    gc.collect()  # views of earlier tests' memory keep its mappings
    threads = threading.active_count()
    before, maps = tiny.descriptors(), mappings()
    with running(bare_machine(COUNTING, regs=START, drives=[f"{image},snapshot"])) as m:
        for _ in range(3):
            m.checkpoint()
            m.rollback()
        during = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            m.checkpoint()
            m.rollback()
        assert len(os.listdir("/proc/self/fd")) == during
    assert tiny.opened_since(before) == []
    assert mappings() == maps
    assert threading.active_count() <= threads


@pytest.mark.one_lane
def test_a_rollback_and_the_close_of_another_thread(tmp_path: Path) -> None:
    failed: list[object] = []
    for _ in range(8):
        m = Machine(MachineConfig(tiny.kernel(tmp_path, tiny.COUNTING), memory=16 * MIB))
        m.start()
        m.checkpoint()

        def go_back(m: Machine = m, failed: list[object] = failed) -> None:
            try:
                while True:
                    m.rollback()
            except StateError as err:
                if "closed" not in str(err):
                    failed.append(err)
            except BaseException as err:
                failed.append(err)

        threads = [threading.Thread(target=go_back) for _ in range(2)]
        for thread in threads:
            thread.start()
        m.close()
        for thread in threads:
            thread.join(30)
        failed += [thread for thread in threads if thread.is_alive()]
        assert (failed, m.state) == ([], "closed")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vcpu")]
