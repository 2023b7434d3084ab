"""The driver's side of virtio, for tests: rings in guest memory, registers through the transport.

It keeps to the specification (virtio 1.2) unless a test breaks it on purpose.
"""

from __future__ import annotations

import os
import struct
from typing import Self

from vmm.memory import GuestMemory
from vmm.virtio import mmio, spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.mmio import MmioTransport
from vmm.virtio.serve import QueueThread
from vmm.virtio.transport import Transport

RINGS = 0x10000
"""Where queue 0's rings are; each queue has 64 KiB."""
BUFFERS = 0x200000
DESC = struct.Struct("<QIHH")


class Ring:
    """Driver side of one queue; `add` and `used` are all a test needs."""

    def __init__(
        self, memory: GuestMemory, index: int, size: int, event_idx: bool, area: int = 0
    ) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        base = area + RINGS + (index << 16)
        self.desc, self.driver, self.device = base, base + 0x6000, base + 0x8000

    def add(self, buffers: list[tuple[int, int, bool]], *, indirect: int = 0) -> int:
        """Make a chain of (gpa, length, device writes) available; its id. `indirect`: the GPA of
        a table to put it in."""
        raise NotImplementedError

    def used(self) -> list[tuple[int, int]]:
        """(id, written) of what came back since the last call."""
        raise NotImplementedError

    def want_interrupts(self, wanted: bool) -> None:
        raise NotImplementedError

    def wants_notify(self) -> bool:
        """Whether the device asked for a notify after the last `add`."""
        raise NotImplementedError


def table(buffers: list[tuple[int, int, bool]]) -> bytes:
    """An indirect table of a split queue."""
    rows = b""
    for place, (gpa, length, write) in enumerate(buffers):
        more = place + 1 < len(buffers)
        rows += DESC.pack(gpa, length, more | write << 1, place + 1 if more else 0)
    return rows


class SplitRing(Ring):
    def __init__(
        self, memory: GuestMemory, index: int, size: int, event_idx: bool, area: int = 0
    ) -> None:
        super().__init__(memory, index, size, event_idx, area)
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self.avail_idx = self.used_idx = self.kicked = 0

    def add(self, buffers: list[tuple[int, int, bool]], *, indirect: int = 0) -> int:
        memory = self.memory
        if indirect:
            rows = table(buffers)
            memory.write(indirect, rows)
            slots = [self.free.pop()]
            memory.write(self.desc + 16 * slots[0], DESC.pack(indirect, len(rows), 4, 0))
        else:
            slots = [self.free.pop() for _ in buffers]
            for place, (gpa, length, write) in enumerate(buffers):
                more = place + 1 < len(buffers)
                following = slots[place + 1] if more else 0
                row = DESC.pack(gpa, length, more | write << 1, following)
                memory.write(self.desc + 16 * slots[place], row)
        self.chains[slots[0]] = slots
        memory.write_u16(self.driver + 4 + 2 * (self.avail_idx % self.size), slots[0])
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        memory.write_u16(self.driver + 2, self.avail_idx)
        return slots[0]

    def used(self) -> list[tuple[int, int]]:
        memory, done = self.memory, []
        while self.used_idx != memory.read_u16(self.device + 2):
            at = self.device + 4 + 8 * (self.used_idx % self.size)
            head, written = memory.read_u32(at), memory.read_u32(at + 4)
            self.free += self.chains.pop(head)
            done.append((head, written))
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        if self.event_idx:
            memory.write_u16(self.driver + 4 + 2 * self.size, self.used_idx)
        return done

    def want_interrupts(self, wanted: bool) -> None:
        if self.event_idx:
            event = self.used_idx if wanted else (self.used_idx - 1) & 0xFFFF
            self.memory.write_u16(self.driver + 4 + 2 * self.size, event)
        else:
            self.memory.write_u16(self.driver, 0 if wanted else 1)

    def wants_notify(self) -> bool:
        old, self.kicked = self.kicked, self.avail_idx
        if self.event_idx:
            event = self.memory.read_u16(self.device + 4 + 8 * self.size)
            return (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - old) & 0xFFFF
        return not self.memory.read_u16(self.device) & 1


class PackedRing(Ring):
    def __init__(
        self, memory: GuestMemory, index: int, size: int, event_idx: bool, area: int = 0
    ) -> None:
        super().__init__(memory, index, size, event_idx, area)
        self.ids = list(range(size))
        self.chains: dict[int, int] = {}
        self.avail, self.avail_wrap, self.at, self.wrap = 0, 1, 0, 1
        self.kicked = 0

    def add(self, buffers: list[tuple[int, int, bool]], *, indirect: int = 0) -> int:
        memory, ident = self.memory, self.ids.pop()
        if indirect:
            rows = b"".join(DESC.pack(gpa, size, 0, write << 1) for gpa, size, write in buffers)
            memory.write(indirect, rows)
            rest = [(indirect, len(rows), 4)]
        else:
            rest = [
                (gpa, size, (place + 1 < len(buffers)) | write << 1)
                for place, (gpa, size, write) in enumerate(buffers)
            ]
        self.chains[ident] = len(rest)
        first = None
        for gpa, size, flags in rest:
            flags |= 1 << 7 if self.avail_wrap else 1 << 15
            row = self.desc + 16 * self.avail
            memory.write(row, struct.pack("<QIH", gpa, size, ident))
            if first is None:
                first = (row + 14, flags)
            else:
                memory.write_u16(row + 14, flags)
            self.avail += 1
            if self.avail == self.size:
                self.avail, self.avail_wrap = 0, self.avail_wrap ^ 1
        assert first is not None
        memory.write_u16(*first)
        return ident

    def used(self) -> list[tuple[int, int]]:
        memory, done = self.memory, []
        while True:
            row = self.desc + 16 * self.at
            flags = memory.read_u16(row + 14)
            if flags >> 7 & 1 != self.wrap or flags >> 15 != self.wrap:
                break
            ident, written = memory.read_u16(row + 12), memory.read_u32(row + 8)
            self.at += self.chains.pop(ident)
            if self.at >= self.size:
                self.at, self.wrap = self.at - self.size, self.wrap ^ 1
            self.ids.append(ident)
            done.append((ident, written))
        if self.event_idx:
            self.want_interrupts(True)
        return done

    def want_interrupts(self, wanted: bool) -> None:
        if wanted and self.event_idx:
            self.memory.write_u16(self.driver, self.at | self.wrap << 15)
            self.memory.write_u16(self.driver + 2, 2)
        else:
            self.memory.write_u16(self.driver + 2, 0 if wanted else 1)

    def wants_notify(self) -> bool:
        flags = self.memory.read_u16(self.device + 2)
        old, self.kicked = self.kicked, self.avail
        if flags != 2:
            return flags == 0
        event = self.memory.read_u16(self.device)
        place = (event & 0x7FFF) - (self.size if event >> 15 != self.avail_wrap else 0)
        if old >= self.avail:
            old -= self.size
        return (self.avail - place - 1) & 0xFFFF < (self.avail - old) & 0xFFFF


class Driver:
    """Negotiates with a device over its MMIO transport and sets its queues up.

    Registers have the MMIO transport's names on every transport, see tests.support.virtio_pci.

    Attributes:
        interrupts: how often the device raised its interrupt (read by `take_interrupts`).
        area: GPA of what it uses; drivers of several devices in one memory need one each.
    """

    area = 0

    def __init__(
        self,
        device: VirtioDevice,
        *,
        memory: GuestMemory | None = None,
        packed: bool = False,
        event_idx: bool = False,
        without: int = 0,
        size: int = 16,
    ) -> None:
        self.memory = memory or GuestMemory(8 << 20)
        device.memory = self.memory
        self.device = device
        self.transport: Transport = self.attach(device)
        self.packed, self.event_idx, self.size, self.without = packed, event_idx, size, without
        self.rings: list[Ring] = []
        self.start()

    def attach(self, device: VirtioDevice) -> Transport:
        """Give `device` its transport."""
        return MmioTransport(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.transport.close()
        self.rings = []
        for slot in self.device.slots:
            slot.clear()
        self.memory.close()

    def read(self, offset: int, size: int = 4) -> int:
        return self.transport.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.transport.write(offset, size, value)

    def start(self) -> None:
        """Section 3.1.1, from reset to DRIVER_OK."""
        self.negotiate()
        for index in range(len(self.device.slots)):
            self.enable(index)
        self.write(mmio.STATUS, self.read(mmio.STATUS) | spec.DRIVER_OK)

    def negotiate(self) -> None:
        self.write(mmio.STATUS, 0)
        assert self.read(mmio.STATUS) == 0
        self.write(mmio.STATUS, spec.ACKNOWLEDGE)
        self.write(mmio.STATUS, spec.ACKNOWLEDGE | spec.DRIVER)
        features = 0
        for half in (0, 1):
            self.write(mmio.DEVICE_FEATURES_SEL, half)
            features |= self.read(mmio.DEVICE_FEATURES) << 32 * half
        if self.packed:  # also where it is not shown, because the C kernel knows no such rings
            features |= self.device.features & 1 << spec.F_RING_PACKED
        features &= ~self.without
        if not self.packed:
            features &= ~(1 << spec.F_RING_PACKED)
        if not self.event_idx:
            features &= ~(1 << spec.F_EVENT_IDX)
        for half in (0, 1):
            self.write(mmio.DRIVER_FEATURES_SEL, half)
            self.write(mmio.DRIVER_FEATURES, features >> 32 * half & 0xFFFFFFFF)
        self.features = features
        status = spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK
        self.write(mmio.STATUS, status)
        assert self.read(mmio.STATUS) == status

    def enable(self, index: int) -> None:
        self.write(mmio.QUEUE_SEL, index)
        size = min(self.size, self.read(mmio.QUEUE_NUM_MAX))
        kind = PackedRing if self.packed else SplitRing
        ring = kind(self.memory, index, size, self.event_idx, self.area)
        self.memory.fill(ring.desc, 0x10000)
        self.rings[index:] = [ring]
        self.write(mmio.QUEUE_NUM, size)
        for register, gpa in (
            (mmio.QUEUE_DESC, ring.desc),
            (mmio.QUEUE_DRIVER, ring.driver),
            (mmio.QUEUE_DEVICE, ring.device),
        ):
            self.write(register, gpa & 0xFFFFFFFF)
            self.write(register + 4, gpa >> 32)
        self.write(mmio.QUEUE_READY, 1)
        assert self.read(mmio.QUEUE_READY) == 1
        ring.want_interrupts(True)

    def kick(self, index: int = 0) -> None:
        self.write(mmio.QUEUE_NOTIFY, index)

    def take_interrupts(self) -> int:
        """The interrupt status, acknowledged; 0 if there was no interrupt."""
        assert isinstance(self.transport, MmioTransport)
        try:
            os.eventfd_read(self.transport.irq_fd)
        except BlockingIOError:
            return 0
        status = self.read(mmio.INTERRUPT_STATUS)
        self.write(mmio.INTERRUPT_ACK, status)
        return status


class ServedDriver(Driver):
    """One whose device's queues are served as a machine's are, each by a thread.

    Attributes:
        failures: what escaped in one of them.
    """

    def attach(self, device: VirtioDevice) -> Transport:
        self.failures: list[BaseException] = []
        self._threads: list[QueueThread] = []
        device.on_bug = self.failures.append
        transport = super().attach(device)

        def connect() -> None:
            for index, fd in enumerate(transport.notify_fds):
                if not device.take_kick(index, fd):
                    self._threads.append(QueueThread(device, index, fd, self.failures.append))
            transport.served = True

        transport.on_driver_ok = connect
        return transport

    def __exit__(self, *exc: object) -> None:
        for thread in self._threads:
            thread.close()
        super().__exit__(*exc)
