"""vmm.faults.machine: power cuts, clocks, vCPUs and memory, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.bare import until
from tests.support.bounded import within
from tests.support.disk_guest import DiskRequests
from tests.support.tiny import COUNTER
from tests.test_virtio_vhost_user import qcow2
from vmm import Machine, MachineConfig, StateError, UsageError
from vmm.events import Panicked
from vmm.faults import FaultEvent
from vmm.kvm import constants
from vmm.machine import exits
from vmm.virtio import blk

__all__ = ["qcow2"]
pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

MIB = 1 << 20
SECTOR = 512

Make = Callable[..., Machine]


@pytest.fixture
def machine(tmp_path: Path) -> Make:
    """Makes machines that run the code given; the test closes them (`with`)."""

    def make(code: bytes = tiny.SPIN, **options: object) -> Machine:
        values: dict[str, object] = {"memory": 32 * MIB, **options}
        return Machine(MachineConfig(tiny.kernel(tmp_path, code), **values))  # type: ignore[arg-type]

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


# --- power ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["none", "all", "some"])
def test_power_cut(machine: Make, disk: Path, keep: str) -> None:
    with machine(drives=[str(disk)], fault_seed=5) as m:
        m.start()
        m.faults.volatile()
        guest = DiskRequests(m, 0)
        for sector in range(8):
            assert guest.put(sector, b"a" * SECTOR) == blk.S_OK
        assert guest.flush() == blk.S_OK
        for sector in range(4, 12):
            assert guest.put(sector, b"b" * SECTOR) == blk.S_OK
        [cut] = m.faults.power_cut(keep)
        assert (m.state, m.exit and m.exit.kind) == ("stopped", exits.STOPPED)
        assert cut.lost + cut.kept == 8
        with pytest.raises(StateError, match="power_cut: the machine is stopped, not running"):
            m.faults.power_cut()
        [event] = [each for each in m.faults.log if each.kind == "power cut"]
        assert event in m.event_log
        assert event.details == {"lost": cut.lost, "kept": cut.kept, "torn": 0}
    content = [disk.read_bytes()[at : at + 1] for at in range(0, 12 * SECTOR, SECTOR)]
    if keep == "none":
        assert content == [b"a"] * 8 + [b"\0"] * 4
    elif keep == "all":
        assert content == [b"a"] * 4 + [b"b"] * 8
    else:
        assert content[:4] == [b"a"] * 4
        assert content[4:].count(b"b") == cut.kept
        assert 0 < cut.kept < 8
    with machine(drives=[str(disk)]) as m:  # nobody has it any more
        m.start()
        assert DiskRequests(m, 0).get(0) == b"a" * SECTOR


def test_images_of_all_disks_at_one_moment(machine: Make, disk: Path, tmp_path: Path) -> None:
    """What is written to one after the other must not be in the second alone."""
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    with machine(drives=[str(disk), str(other)]) as m:
        m.start()
        m.faults.volatile()
        first, second = DiskRequests(m, 0), DiskRequests(m, 1, area=8 * MIB)
        over = threading.Event()
        written = [0]

        def write() -> None:
            number = 0
            while not over.is_set():
                number += 1
                for guest in (first, second):
                    assert guest.put(0, number.to_bytes(4, "little") * (SECTOR // 4)) == blk.S_OK
                written[0] = number

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(10):
                before = written[0]
                while written[0] == before and writer.is_alive():
                    time.sleep(0.001)
                cuts = m.faults.power_cut_images(str(tmp_path), keep="all", torn=0)
                assert len(cuts) == 2
                numbers = [
                    int.from_bytes((tmp_path / f"disk{at}.img").read_bytes()[:4], "little")
                    for at in (0, 1)
                ]
                assert before < numbers[1] <= numbers[0] <= numbers[1] + 1
        finally:
            over.set()
            writer.join(60)


def test_power_cut_with_requests_under_way(machine: Make, disk: Path) -> None:
    with machine(drives=[str(disk)]) as m:
        m.start()
        m.faults.volatile()
        guest = DiskRequests(m, 0)
        m.faults.disk(0).latency(100_000)
        for sector in range(10):
            guest.submit(blk.T_OUT, sector, out=b"x" * SECTOR)
        while m.faults.active[0].count < 10:  # a thread of the device's takes them
            time.sleep(0.001)
        m.faults.power_cut()
    assert disk.read_bytes() == bytes(MIB)


@pytest.mark.parametrize("when", ["running", "paused"])
def test_close_while_requests_wait(machine: Make, disk: Path, when: str) -> None:
    before = tiny.descriptors()
    threads = threading.active_count()
    with machine(drives=[str(disk)]) as m:
        m.start()
        guest = DiskRequests(m, 0)
        m.faults.disk(0).gone(silent=True)
        m.faults.disk(0).latency(100_000)
        for sector in range(10):
            guest.submit(blk.T_IN, sector, into=SECTOR)
        if when == "paused":
            m.pause()
            m.faults.disk(0).fail()
            m.resume()
            m.pause()
    assert m.faults.active == ()
    with pytest.raises(StateError, match="faults of blk0: the machine is closed"):
        m.faults.disk(0).fail()
    assert tiny.opened_since(before) == []
    assert threading.active_count() == threads


def test_faults_are_events(machine: Make, disk: Path) -> None:
    with machine(drives=[str(disk)]) as m:
        m.start()
        heard: list[str] = []
        m.subscribe(lambda event: heard.append(str(event)), FaultEvent)
        with m.faults.disk(0).fail(on="write", nth=1):
            assert DiskRequests(m, 0).put(3, bytes(SECTOR)) == blk.S_IOERR
        assert heard == [
            "fault: blk0 fail set: on=write, errno=EIO, nth=1",
            "fault: blk0 fail struck: request=1, what=write, sector=3",
            "fault: blk0 fail cleared: struck=1",
        ]
        assert [each for each in m.event_log if isinstance(each, FaultEvent)] == m.faults.log
        assert m.faults.log[1].to_dict()["device"] == "blk0"


def test_the_seed(machine: Make, disk: Path) -> None:
    found = []
    for seed in (3, 3, 4):
        with machine(drives=[str(disk)], fault_seed=seed) as m:
            m.start()
            guest = DiskRequests(m, 0)
            with m.faults.disk(0).fail(on="read", probability=0.5) as fault:
                for sector in range(40):
                    guest.request(blk.T_IN, sector, into=SECTOR)
            m.faults.seed(seed)
            with m.faults.disk(0).fail(on="read", probability=0.5) as again:
                for sector in range(40):
                    guest.request(blk.T_IN, sector, into=SECTOR)
            assert list(fault.log) == list(again.log)
            found.append(list(fault.log))
    assert found[0] == found[1] != found[2]


def test_checkpoints_of_a_disk_with_faults(machine: Make, disk: Path, tmp_path: Path) -> None:
    """They are of the image below; what it holds then is safe from power cuts."""
    with machine(drives=[f"{disk},snapshot"]) as m:
        m.start()
        guest = DiskRequests(m, 0)
        m.faults.volatile()
        m.faults.disk(0).latency(0.001)
        assert guest.put(1, b"a" * SECTOR) == blk.S_OK
        m.checkpoint()
        m.faults.disk(0).fail(on="read", nth=1)
        for byte in (b"b", b"c"):
            assert guest.put(1, byte * SECTOR) == blk.S_OK
            assert m.faults.disk(0).unflushed == 1
            m.rollback()
            guest = DiskRequests(m, 0)  # the rings are what they were
            assert m.faults.disk(0).unflushed == 0
            m.faults.disk(0).power_cut_image(str(tmp_path / "cut"), keep="none")
            assert (tmp_path / "cut").read_bytes()[SECTOR : 2 * SECTOR] == b"a" * SECTOR
        assert guest.request(blk.T_IN, 1, into=SECTOR) == blk.S_IOERR
        assert guest.get(1) == b"a" * SECTOR
        m.faults.clear()
        m.faults.disk(0).durable()
        with m.faults.disk(0).drop():  # on another image than at first
            assert guest.put(2, b"x" * SECTOR) == blk.S_OK
        assert guest.put(3, b"x" * SECTOR) == blk.S_OK
        assert guest.get(2, 2 * SECTOR) == bytes(SECTOR) + b"x" * SECTOR
        m.rollback()
        guest = DiskRequests(m, 0)
        assert guest.get(1, 3 * SECTOR) == b"a" * SECTOR + bytes(2 * SECTOR)


def test_events_are_plain_data(machine: Make, disk: Path) -> None:
    with machine(drives=[str(disk)], nets=["lan=plain"]) as m:
        m.faults.disk(0).fail(on=["read", "write"], sectors=range(3, 5), nth=(1, 4))
        m.faults.net(0).loss(0.5, match=len)
        told = [event.to_dict()["details"] for event in m.faults.log]
        assert json.loads(json.dumps(told)) == [
            {"on": ["read", "write"], "errno": "EIO", "sectors": [3, 4], "nth": [1, 4]},
            {"probability": 0.5, "match": "len"},
        ]


def test_a_power_cut_from_a_listener(machine: Make, disk: Path) -> None:
    """In a vCPU's thread, which would wait for itself."""
    told: list[BaseException] = []
    with machine(tiny.PANIC + tiny.SPIN, drives=[str(disk)], on_panic="pause") as m:
        m.faults.volatile()

        def cut(event: object) -> None:
            try:
                m.faults.power_cut()
            except StateError as err:
                told.append(err)

        m.subscribe(cut, Panicked)
        m.start()
        while not told:
            time.sleep(0.001)
        assert "call it in another" in str(told[0])
        m.faults.power_cut()


# --- clocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["created", "running", "paused"])
def test_clock_jump(machine: Make, state: str) -> None:
    with machine() as m:
        if state != "created":
            m.start()
        if state == "paused":
            m.pause()
        before, rtc = m.vm.get_clock().clock, m.platform.rtc.save()["offset"]
        m.faults.clock_jump(5000)
        assert before + 5000e9 <= m.vm.get_clock().clock < before + 5600e9
        assert m.platform.rtc.save()["offset"] == rtc + 5000  # type: ignore[operator]
        m.faults.clock_jump(-3000.5, rtc=False)
        assert before + 1999e9 <= m.vm.get_clock().clock < before + 2600e9
        m.faults.clock_jump(-100, kvmclock=False)
        assert m.platform.rtc.save()["offset"] == rtc + 4900  # type: ignore[operator]
        assert [event.details["by"] for event in m.faults.log] == [5000, -3000.5, -100]
        with pytest.raises(UsageError, match=r"-100000 s is before kvmclock began, \d+.\d+ s ago"):
            m.faults.clock_jump(-100_000)
        with pytest.raises(UsageError, match="clock_jump: 'x' is not seconds, a century at most"):
            m.faults.clock_jump("x")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="inf is not seconds"):
            m.faults.clock_jump(float("inf"))
    with pytest.raises(StateError, match="clock_jump: the machine is closed"):
        m.faults.clock_jump(1)


# --- vCPUs ----------------------------------------------------------------------------------------


def two_that_count(machine: Make) -> Machine:
    """Two vCPUs that count, each in a place of its own."""
    m = machine(tiny.COUNTING + tiny.counting(COUNTER + 4), cpus=2)
    first, second = m.vcpus
    sregs = first.get_sregs()
    sregs.apic_base = second.get_sregs().apic_base
    second.set_sregs(sregs)
    regs = first.get_regs()
    regs.rip = tiny.ENTRY + len(tiny.COUNTING)
    second.set_regs(regs)
    second.set_mp_state(constants.MP_STATE_RUNNABLE)
    m.start()
    return m


def counts(m: Machine) -> tuple[int, int]:
    return m.memory.read_u32(COUNTER), m.memory.read_u32(COUNTER + 4)


def goes_on(m: Machine, number: int) -> None:
    """vCPU `number` counts on."""
    before = counts(m)[number]
    while counts(m)[number] == before:
        time.sleep(0.001)


def test_a_vcpu_stalls_while_the_other_goes_on(machine: Make) -> None:
    with two_that_count(machine) as m:
        goes_on(m, 0)
        goes_on(m, 1)
        with m.faults.stall(1) as fault:
            stalled = counts(m)[1]
            goes_on(m, 0)
            with m.faults.stall(1):
                pass
            m.pause()
            m.resume()
            goes_on(m, 0)
            assert counts(m)[1] == stalled
            assert m.faults.active == (fault,)
        goes_on(m, 1)
        with m.faults.stall(0), m.faults.stall(1):
            before = counts(m)
            time.sleep(0.02)
            assert counts(m) == before
        goes_on(m, 0)
        goes_on(m, 1)


def test_a_vcpu_stalls_while_nobody_reads_its_console(machine: Make, tmp_path: Path) -> None:
    """It waits for the reader, so it runs no guest code; nor does it once there is one."""
    # mov dx, 0x3f8; 1: out dx, al; inc dword [COUNTER]; jmp 1b
    code = b"\x66\xba\xf8\x03\xee\xff\x05" + COUNTER.to_bytes(4, "little") + b"\xeb\xf7"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with machine(code, console=f"file:{fifo}") as m:

            def stands_still() -> bool:
                before = counts(m)[0]
                time.sleep(0.2)
                return counts(m)[0] == before > 0

            m.start()
            until(stands_still)
            calls: list[object] = []
            within("stall", lambda: calls.append(m.faults.stall(0)))
            before = counts(m)[0]
            while counts(m)[0] == before and os.read(reader, 1 << 16):
                time.sleep(0.05)
                if not select.select([reader], [], [], 0.5)[0]:
                    break
            assert counts(m)[0] == before
            m.faults.clear()
            goes_on(m, 0)
            until(stands_still)
            m.pause()
    finally:
        os.close(reader)


def test_a_stall_ends_by_itself(machine: Make) -> None:
    with two_that_count(machine) as m:
        fault = m.faults.stall(0, 0.05)
        goes_on(m, 0)
        while fault.active:  # it is, before the vCPU goes on, but for a moment
            time.sleep(0.001)
        assert [event.what for event in m.faults.log] == ["set", "struck", "cleared"]


@pytest.mark.parametrize("end", ["stop", "close", "clear while paused"])
def test_the_end_of_a_machine_with_a_stalled_vcpu(machine: Make, end: str) -> None:
    with two_that_count(machine) as m:
        fault = m.faults.stall(1)
        if end == "stop":
            m.stop()
        elif end == "clear while paused":
            m.pause()
            before = counts(m)
            fault.clear()
            time.sleep(0.02)
            assert counts(m) == before
            m.resume()
            goes_on(m, 1)


def test_wrong_stalls(machine: Make) -> None:
    with machine(cpus=2) as m:
        with pytest.raises(StateError, match="stall: the machine is created, not running"):
            m.faults.stall(0)
        for vcpu in (-1, 2, "0"):
            with pytest.raises(UsageError, match="is not one of 2, from 0 on"):
                m.faults.stall(vcpu)  # type: ignore[arg-type]
        m.start()
        with pytest.raises(UsageError, match="duration=-1 is not seconds"):
            m.faults.stall(0, -1)
        assert m.faults.active == ()


# --- memory ---------------------------------------------------------------------------------------


def test_memory_pressure(machine: Make) -> None:
    with machine(balloon=2 * MIB) as m:
        assert m.balloon.wanted == 2 * MIB
        with m.faults.memory_pressure(8 * MIB):
            assert m.balloon.wanted == 10 * MIB
            with m.faults.memory_pressure(4 * MIB) as more:
                assert m.balloon.wanted == 14 * MIB
        assert not more.active
        assert m.balloon.wanted == 2 * MIB
        fault = m.faults.memory_pressure(MIB, duration=0)
        while fault.active:
            time.sleep(0.001)
        assert m.balloon.wanted == 2 * MIB
        for size in (0, -1, 31 * MIB, 1.5):
            with pytest.raises(UsageError, match="is not bytes, up to the 31457280 there are"):
                m.faults.memory_pressure(size)  # type: ignore[arg-type]


# --- wrong use ------------------------------------------------------------------------------------


def test_what_a_machine_does_not_have(machine: Make, disk: Path) -> None:
    with machine() as m:
        with pytest.raises(UsageError, match=r"faults.disk\(0\): there is no such; .* has none"):
            m.faults.disk(0)
        with pytest.raises(UsageError, match="power_cut: the machine has no drives"):
            m.faults.power_cut()
        with pytest.raises(StateError, match="this machine has no balloon"):
            m.faults.memory_pressure(MIB)
    with machine(drives=[f"{disk},readonly"]) as m:
        with pytest.raises(UsageError, match=r"disk\(1\): there is no such; .* has numbers 0"):
            m.faults.disk(1)
        with pytest.raises(UsageError, match="the disk is readonly: nothing is written"):
            m.faults.disk(0).volatile()
        assert m.faults.disk(0) is m.faults.disk(0)
    with machine(drives=[str(disk)]) as m:
        m.start()
        with pytest.raises(StateError, match=r"disk\(0\).unflushed: nobody knows what a power cut"):
            m.faults.power_cut()
        assert m.state == "running"


@pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None, reason="no qemu-storage-daemon here"
)
def test_a_disk_that_another_process_serves(machine: Make, qcow2: Callable[..., str]) -> None:
    with machine(drives=[f"{qcow2(MIB)},format=qcow2"]) as m:
        with pytest.raises(StateError, match="or with serial=, has faults"):
            m.faults.disk(0)
        with pytest.raises(StateError, match="qemu-storage-daemon serves it"):
            m.faults.volatile()


def test_without_faults_nothing_of_them_is_loaded(disk: Path) -> None:
    code = (
        "import sys; from vmm import Machine, MachineConfig\n"
        f"with Machine(MachineConfig(memory=2 << 20, drives=[{str(disk)!r}])) as m:\n"
        "    print([name for name in sys.modules if name.startswith('vmm.faults')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=tiny.environment()
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_seed_that_is_none() -> None:
    with pytest.raises(UsageError, match="fault_seed='x' is not a whole number"):
        MachineConfig(fault_seed="x")  # type: ignore[arg-type]


def test_a_fault_meets_a_queue_that_is_never_empty(machine: Make, disk: Path) -> None:
    """Its thread is at work all the time, and must see that there is a fault now."""
    with machine(drives=[str(disk)]) as m:
        m.start()
        guest = DiskRequests(m, 0)
        over = threading.Event()
        failed = threading.Event()

        def load() -> None:
            for _ in range(8):
                guest.submit(blk.T_IN, 1, into=SECTOR)
            while not over.is_set():
                guest.answered()
                guest.submit(blk.T_IN, 1, into=SECTOR)
                if any(guest.status(place) == blk.S_IOERR for place in range(16)):
                    failed.set()

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for _ in range(20):
                failed.clear()
                with m.faults.disk(0).fail(on="read"):
                    assert failed.wait(60)
        finally:
            over.set()
            thread.join(60)
