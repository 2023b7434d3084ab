"""Disks' drivers for the tests of faults: many requests under way, each in a place of its own."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

from tests.support.virtio_driver import BUFFERS, Driver
from vmm import Machine
from vmm.block.overlay import Overlay
from vmm.block.raw import RawImage
from vmm.faults.disk import DiskFaults
from vmm.faults.rules import Control
from vmm.virtio import blk
from vmm.virtio.blk import Block
from vmm.virtio.device import VirtioDevice
from vmm.virtio.transport import Transport

HEADER, STATUS, DATA = BUFFERS, BUFFERS + 0x8000, BUFFERS + 0x10000
SLOT = 0x4000
PLACES = 16


class Requests(Driver):
    """A disk's driver."""

    place = 0

    def submit(
        self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0
    ) -> tuple[int, int]:
        """The chain's head, and the place of its data."""
        self.place = (self.place + 1) % PLACES
        header, status = self.area + HEADER + 32 * self.place, self.area + STATUS + self.place
        data = self.area + DATA + SLOT * self.place
        self.memory.write(header, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write_u8(status, 0xAA)
        buffers = [(header, 16, False)]
        if out:
            self.memory.write(data, out)
            buffers.append((data, len(out), False))
        if into:
            self.memory.fill(data, into)
            buffers.append((data, into, True))
        head = self.rings[0].add([*buffers, (status, 1, True)])
        self.kick()
        return head, self.place

    def answered(self, count: int = 1) -> list[int]:
        """Heads of `count` requests, as they come back."""
        done: list[int] = []
        limit = time.monotonic() + 30
        while len(done) < count:
            assert time.monotonic() < limit, f"{len(done)} of {count} requests came back"
            done += [head for head, _ in self.rings[0].used()]
            time.sleep(0 if done else 0.0005)
        return done

    def status(self, place: int) -> int:
        return self.memory.read_u8(self.area + STATUS + place)

    def request(self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0) -> int:
        _, place = self.submit(kind, sector, out, into)
        self.answered()
        return self.status(place)

    def get(self, sector: int, size: int = 512) -> bytes:
        """Read from the disk."""
        assert self.request(blk.T_IN, sector, into=size) == blk.S_OK
        return self.memory.read(self.area + DATA + SLOT * self.place, size)

    def put(self, sector: int, data: bytes) -> int:
        """Write to the disk: the status."""
        return self.request(blk.T_OUT, sector, out=data)

    def flush(self) -> int:
        return self.request(blk.T_FLUSH)


class DiskGuest(Requests):
    """The driver of a disk by itself, whose faults are `faults`."""

    def __init__(self, path: Path, *, seed: int = 0, overlay: bool = False, **how: Any) -> None:
        image: Any = RawImage(str(path), readonly=overlay)
        if overlay:
            image = Overlay(image)
        self.disk = Block(image, **how)
        self.control = Control(seed)
        self.faults = DiskFaults(self.disk, self.control, "faults.disk(0)")
        super().__init__(self.disk, size=64)

    def __exit__(self, *exc: object) -> None:
        self.control.close()
        super().__exit__(*exc)


class DiskRequests(Requests):
    """The driver of a disk of `machine`, in the place of its guest's."""

    def __init__(self, machine: Machine, number: int, area: int = 0) -> None:
        self.area = area
        assert machine.platform.virtio is not None
        self._transport = machine.platform.virtio.transports[number]
        super().__init__(self._transport.device, memory=machine.memory, size=64)

    def attach(self, device: VirtioDevice) -> Transport:
        return self._transport
