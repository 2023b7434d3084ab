"""A guest's socket driver, for tests: packets over the rings of tests.support.virtio_driver."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import NamedTuple, Self

from tests.support.bare import DriverOn
from tests.support.virtio_driver import BUFFERS, Driver
from vmm import Machine
from vmm.virtio import vsock_packet as vp
from vmm.virtio.loop import DeviceLoop
from vmm.virtio.vsock import RX, TX, Vsock
from vmm.virtio.vsock_host import VsockHost

CID = 42
RX_SIZE = 4096
SLOT = 0x20000
SLOTS = 16
"""Packets under way at most."""


class Packet(NamedTuple):
    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    size: int
    kind: int
    op: int
    flags: int
    alloc: int
    fwd: int
    data: bytes


class Guest:
    """Device, loop and driver together; a context manager.

    `window` is what it says its buffer is; it tells of progress when `told` is called.
    """

    def __init__(
        self, path: str | None, *, packed: bool = False, event_idx: bool = False, loop: bool = True,
        buffers: int = 8, rx_chain: tuple[int, ...] = (vp.HEADER_SIZE, RX_SIZE), cid: int = CID,
    ) -> None:  # fmt: skip
        self.errors: list[BaseException] = []
        self.complaints: list[str] = []
        self.device = Vsock(cid, VsockHost(path))
        self.device.on_error = self.complaints.append
        self.loop: DeviceLoop | None = None
        if loop:
            self.loop = DeviceLoop(self.errors.append)
            running = threading.Event()
            at = self.loop.loop
            self.loop.call(lambda: (self.device.loop_running(at), running.set())[0])
            assert running.wait(10)
        self._drive(Driver(self.device, packed=packed, event_idx=event_idx, size=64), rx_chain)
        for number in range(buffers):
            self.give(number)

    def _drive(self, driver: Driver, rx_chain: tuple[int, ...]) -> None:
        self.driver = driver
        self.rx_chain = rx_chain
        self.rx: dict[int, int] = {}
        self.window = 1 << 18
        self.patience = 10.0
        self.fwd = 0
        self._tx_slot = 0
        self._got: list[Packet] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.loop is not None:
            self.loop.close()
        self.driver.__exit__()
        assert self.errors == []

    def give(self, number: int) -> None:
        """Give receive buffer `number`."""
        at, pieces = BUFFERS + 0x300000 + number * SLOT, []
        for size in self.rx_chain:
            pieces.append((at, size, True))
            at += size
        self.rx[self.driver.rings[RX].add(pieces)] = number
        self.driver.kick(RX)

    def send(
        self, op: int, src_port: int, dst_port: int, data: bytes = b"", *, flags: int = 0,
        kind: int = vp.TYPE_STREAM, cids: tuple[int, int] | None = None, size: int | None = None,
        alloc: int | None = None, one_buffer: bool = False,
    ) -> None:  # fmt: skip
        """Send one packet."""
        header = vp.HEADER.pack(
            *(cids or (self.device.cid, vp.CID_HOST)), src_port, dst_port,
            len(data) if size is None else size, kind, op, flags,
            self.window if alloc is None else alloc, self.fwd,
        )  # fmt: skip
        self.raw(header + data, [] if one_buffer else [vp.HEADER_SIZE])

    def raw(self, packet: bytes, cuts: list[int] | None = None) -> None:
        """Send any bytes, cut into buffers."""
        ring = self.driver.rings[TX]
        deadline = time.monotonic() + self.patience
        ring.used()
        while len(ring.chains) >= SLOTS:
            assert time.monotonic() < deadline, "the device takes no packets"
            time.sleep(0.0002)
            ring.used()
        self._tx_slot = (self._tx_slot + 1) % SLOTS
        base = BUFFERS + self._tx_slot * SLOT
        self.driver.memory.write(base, packet)
        edges = [0, *(cuts or []), len(packet)]
        pieces = [(base + a, b - a, False) for a, b in pairwise(edges) if b > a]
        ring.add(pieces)
        self.driver.kick(TX)

    def settle(self) -> None:
        """Wait until the device has taken every packet."""
        ring = self.driver.rings[TX]
        deadline = time.monotonic() + self.patience
        while ring.chains:
            assert time.monotonic() < deadline, "the device takes no packets"
            time.sleep(0.0002)
            ring.used()

    def poll(self, refill: bool = True) -> list[Packet]:
        """What has come; the buffers are given again."""
        packets = []
        used = [(self.rx.pop(ident), size) for ident, size in self.driver.rings[RX].used()]
        for number, written in used:
            whole = self.driver.memory.read(BUFFERS + 0x300000 + number * SLOT, written)
            fields = vp.HEADER.unpack_from(whole)
            assert written == vp.HEADER_SIZE + fields[4]
            packets.append(Packet(*fields, whole[vp.HEADER_SIZE :]))
            if refill:
                self.give(number)
        return packets

    def packet(self, timeout: float = 10) -> Packet:
        """The next packet."""
        deadline = time.monotonic() + timeout
        while not self._got:
            self._got += self.poll()
            if not self._got:
                assert time.monotonic() < deadline, f"no packet; {self.errors} {self.complaints}"
                time.sleep(0.001)
        return self._got.pop(0)

    def expect(self, op: int) -> Packet:
        """The next packet, which is an `op`; credit updates are passed over."""
        while True:
            packet = self.packet()
            if packet.op == op:
                return packet
            assert packet.op == vp.OP_CREDIT_UPDATE, packet

    def nothing(self) -> None:
        """Nothing comes."""
        time.sleep(0.05)
        self._got += self.poll()
        assert self._got == []


class GuestOf(Guest):
    """The driver of a machine's socket device, the only one it has; it closes the machine."""

    def __init__(self, machine: Machine) -> None:
        self.errors, self.complaints, self.loop = [], [], None
        driver = DriverOn(machine)
        assert isinstance(driver.device, Vsock)
        self.device = driver.device
        self._drive(driver, (vp.HEADER_SIZE, RX_SIZE))
        for number in range(8):
            self.give(number)
