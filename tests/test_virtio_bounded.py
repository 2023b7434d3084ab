"""Whatever its guest asks a device for, a machine pauses, is kept and ends without waiting for it.

Each request here would take minutes: all of memory a thousand times over, or as many system calls
as a request can name.
"""

from __future__ import annotations

import os
import socket as socket_module
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support import bounded, tiny
from tests.support.bare import DriverOn, bare_machine, until
from tests.support.virtio_driver import table
from vmm import Machine, MachineConfig
from vmm.layout import GIB, MIB
from vmm.net.pcap import FifoCapture
from vmm.virtio import blk, mmio
from vmm.virtio.vsock_packet import HEADER

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane]

MEMORY = 2 * GIB
WITHIN = 15.0
"""Seconds that a call has here: it takes milliseconds, or minutes."""
NUMBERS = 48 * MIB
"""Where page numbers for the balloon are; every second page from 64 MiB on."""


class Greedy(DriverOn):
    """A driver whose queues are full of requests without end."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.area = number * MIB
        self.table = self.area + 0xC0000
        super().__init__(machine, number, size=256)  # type: ignore[arg-type]

    def fill(self, queue: int, buffers: list[tuple[int, int, bool]]) -> None:
        """Make as many chains of `buffers` available as the queue has entries."""
        ring, memory = self.rings[queue], self.memory
        rows = table(buffers)
        memory.write(self.table, rows)
        size = min(self.size, len(ring.free))  # type: ignore[attr-defined]
        for slot in range(size):
            memory.write(ring.desc + 16 * slot, struct.pack("<QIHH", self.table, len(rows), 4, 0))
            memory.write_u16(ring.driver + 4 + 2 * slot, slot)
        memory.write_u16(ring.driver + 2, size)
        self.kick(queue)


def console(driver: Greedy) -> None:
    driver.fill(1, [(64 * MIB, 1 * GIB, False)] * 1023)


def port(driver: Greedy) -> None:
    driver.memory.write(driver.area + 0xB0000, struct.pack("<IHH", 1, 3, 1))
    driver.rings[3].add([(driver.area + 0xB0000, 8, False)])
    driver.kick(3)
    driver.fill(5, [(64 * MIB, 1 * GIB, False)] * 1023)


def disk(kind: int) -> Callable[[Greedy], None]:
    def ask(driver: Greedy) -> None:
        header = driver.area + 0xB0000
        driver.memory.write(header, struct.pack("<IIQ", kind, 0, 0))
        data = [(64 * MIB, MIB, kind == blk.T_IN)] * 1022
        driver.fill(0, [(header, 16, False), *data, (header + 64, 1, True)])

    return ask


def zeroes(driver: Greedy) -> None:
    header = driver.area + 0xB0000
    ranges = struct.pack("<QII", 0, GIB // 512, 0) * blk.RANGES
    driver.memory.write(header, struct.pack("<IIQ", blk.T_WRITE_ZEROES, 0, 0) + ranges)
    driver.fill(0, [(header, 16, False), (header + 16, len(ranges), False), (header - 1, 1, True)])


def balloon(driver: Greedy) -> None:
    count = 1 << 18
    pages = struct.pack(f"<{count}I", *range(0x4000, 0x4000 + 2 * count, 2))
    driver.memory.write(NUMBERS, pages)
    driver.fill(0, [(NUMBERS, len(pages), False)])


def reported(driver: Greedy) -> None:
    driver.fill(3, [(64 * MIB, 1 * GIB, True)] * 1023)


def entropy(driver: Greedy) -> None:
    driver.fill(0, [(64 * MIB, 1 * GIB, True)] * 1023)


def socket(driver: Greedy) -> None:
    driver.memory.write(driver.area + 0xB0000, HEADER.pack(9, 2, 1, 1, 0, 1, 5, 0, 0, 0))
    driver.fill(1, [(driver.area + 0xB0000, HEADER.size, False), (64 * MIB, GIB, False)])


def card(driver: Greedy) -> None:
    driver.fill(0, [(64 * MIB, 1, True), *[(64 * MIB, 1 * GIB, True)] * 1022])
    driver.fill(1, [(64 * MIB, 1, False)] * 1023)


CASES: dict[str, tuple[str, Callable[[Greedy], None]]] = {
    "console": ("console", console),
    "port": ("console", port),
    "blk-in": ("blk0", disk(blk.T_IN)),
    "blk-out": ("blk0", disk(blk.T_OUT)),
    "blk-zeroes": ("blk0", zeroes),
    "balloon": ("balloon", balloon),
    "reported": ("balloon", reported),
    "rng": ("rng", entropy),
    "vsock": ("vsock", socket),
    "net": ("net0", card),
}
ALL = ("console", "blk-in", "balloon", "rng", "vsock", "net")


within = partial(bounded.within, seconds=WITHIN)


def machine_with_all(path: Path) -> Machine:
    image = path / "disk.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(GIB)
    return bare_machine(
        "1: jmp 1b",
        memory=MEMORY,
        console="hvc,none",
        ports=[f"name=log,file={path}/log"],
        drives=[f"{image},snapshot"],
        nets=["lan=bounded"],
        rng=True,
        balloon=0,
        vsock=f"cid=9,path={path}/vsock",
    )


def number_of(machine: Machine, name: str) -> int:
    virtio = machine.platform.virtio
    assert virtio is not None
    names = [transport.device.name for transport in virtio.transports]
    return next(number for number, each in enumerate(names) if each.startswith(name))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("cases", [*((name,) for name in CASES), ALL], ids="+".join)
def test_nobody_waits_for_the_guest(cases: tuple[str, ...], tmp_path: Path) -> None:
    machine = machine_with_all(tmp_path)
    drivers: list[Greedy] = []
    try:
        machine.start()
        for case in cases:
            name, ask = CASES[case]
            drivers.append(Greedy(machine, number_of(machine, name)))
            ask(drivers[-1])
        for _ in range(2):
            within("pause", machine.pause)
            within("checkpoint", machine.checkpoint)
            within("resume", machine.resume)
        within("rollback", machine.rollback)
        within("checkpoint of a running machine", machine.checkpoint)
        for driver in drivers:
            within("queue enabled again", lambda driver=driver: driver.write(mmio.QUEUE_READY, 1))
            within("reset", lambda driver=driver: driver.write(mmio.STATUS, 0))
        for driver, case in zip(drivers, cases, strict=True):
            driver.start()
            CASES[case][1](driver)
        resets = [
            threading.Thread(target=driver.write, args=(mmio.STATUS, 0)) for driver in drivers
        ]
        for reset in resets:
            reset.start()
        within("stop", machine.stop)
        within("close", machine.close)
        for reset in resets:
            reset.join(WITHIN)
            assert not reset.is_alive()
        assert machine.exit is not None
        assert machine.exit.kind == "stopped"
    finally:
        within("close", machine.close)


def test_a_guest_cannot_fill_the_loop(tmp_path: Path) -> None:
    """The loop is slower than the guest: it is asked for each thing once."""
    machine = machine_with_all(tmp_path)
    try:
        machine.start()
        virtio = machine.platform.virtio
        assert virtio is not None
        loop = virtio.loop.loop
        drivers = {name: Greedy(machine, number_of(machine, name)) for name in ("console", "vsock")}
        slow = threading.Event()
        loop.call_soon_threadsafe(slow.wait)
        for driver in drivers.values():
            for _ in range(200):
                driver.write(mmio.QUEUE_SEL, 0)
                driver.write(mmio.QUEUE_RESET, 1)
                for queue in range(3):
                    driver.device.notify(queue)
                driver.start()
        waiting = len(loop._ready)  # type: ignore[attr-defined]
        slow.set()
        assert waiting < 20
        # A queue that is served in turns, and kicked all the time.
        driver = drivers["console"]
        console(driver)
        position = machine.console.position
        most = 0
        for _ in range(300):
            driver.kick(1)
            time.sleep(0.001)
            most = max(most, len(loop._ready))  # type: ignore[attr-defined]
        assert most < 20
        assert machine.console.position > position
        # The last driver is there for all that: a port's program reaches it, a guest's connects.
        driver.start()
        driver.memory.write(driver.area + 0xB0000, b"said")
        driver.rings[1].add([(driver.area + 0xB0000, 4, False)])
        driver.kick(1)
        until(lambda: machine.console.bytes().endswith(b"said"))
        with socket_module.socket(socket_module.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(f"{tmp_path}/vsock")
            client.sendall(b"CONNECT nonsense\n")
            assert client.recv(1) == b""  # it was heard
    finally:
        machine.close()


@pytest.mark.timeout(120)
def test_a_console_that_nobody_reads_holds_up_no_pause(tmp_path: Path) -> None:
    """A vCPU waits for a reader that takes nothing for now. No byte is lost, none comes twice."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    prints = b"\x66\xba\xf8\x03\xee\xfe\xc0\xeb\xfb"  # out dx, al; inc al; once more
    kernel = tiny.kernel(tmp_path, prints)
    got = bytearray()
    with Machine(MachineConfig(kernel, memory=16 * MIB, console=f"file:{fifo}")) as machine:
        machine.start()
        for turn in range(3):
            wait_until_stuck(machine)
            within("pause", machine.pause)
            within("checkpoint", machine.checkpoint)
            if turn == 1:
                within("snapshot", lambda: machine.snapshot(tmp_path / "snapshot"))
            got += read_all(reader)
            within("resume", machine.resume)
        wait_until_stuck(machine)
        within("rollback", machine.rollback)
        wait_until_stuck(machine)
        within("pause", machine.pause)
        printed = machine.console.position
        closing = threading.Thread(target=machine.close)
        closing.start()
        while closing.is_alive():
            got += read_all(reader)
            closing.join(0.01)
    got += read_all(reader)
    os.close(reader)
    assert len(got) >= printed > 4 * 50_000
    breaks = [at for at in range(1, len(got)) if got[at] != (got[at - 1] + 1) % 256]
    assert got[0] == 0 and len(breaks) <= 1  # at the rollback


def wait_until_stuck(machine: Machine) -> None:
    """Until the guest has printed, and can print no more."""
    before = -1
    while machine.console.position == 0 or machine.console.position != before:
        before = machine.console.position
        time.sleep(0.3)


def read_all(reader: int) -> bytes:
    got = b""
    with suppress(BlockingIOError):
        while part := os.read(reader, 1 << 20):
            got += part
    return got


def test_output_goes_on_after_a_turn(tmp_path: Path) -> None:
    """A long chain is put out to its end, a turn after the other."""
    machine = machine_with_all(tmp_path)
    try:
        machine.start()
        driver = Greedy(machine, number_of(machine, "console"))
        driver.memory.write(64 * MIB, b"0123456789abcdef" * (MIB // 16))
        driver.rings[1].add([(64 * MIB, MIB, False)] * 3)
        driver.kick(1)
        until(lambda: machine.console.position == 3 * MIB)
        until(lambda: len(driver.rings[1].used()) == 1)
    finally:
        machine.close()


def test_a_capture_copies_a_frame_and_not_its_buffers(tmp_path: Path) -> None:
    import mmap

    os.mkfifo(tmp_path / "fifo")
    capture = FifoCapture(str(tmp_path / "fifo"))
    with mmap.mmap(-1, GIB) as memory, memoryview(memory) as view:
        capture.record([view] * 1000, 80)
    capture.close()
    assert "1 frames" not in capture.error
