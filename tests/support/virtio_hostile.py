"""A driver that breaks rules: broken rings, tables and register sequences, from a seed.

A case is all that happens between two resets of a device, and depends on nothing but its number:

    rig = Rig(device, MmioRegisters(device), packed=True, event_idx=False)
    rig.case(random.Random(number))

Transports are a `Registers` each; devices are told apart by what `fill` puts into the buffers.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from tests.support.virtio_driver import Driver
from vmm.layout import HOLE_END, HOLE_START
from vmm.memory import GuestMemory
from vmm.virtio import mmio, spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.mmio import MmioTransport

HIGH = 1 << 20
"""Bytes of guest memory above 4 GiB."""
RINGS, STRIDE = 0x10000, 0x4000
BUFFERS, BUFFER, BUFFER_COUNT = 0x100000, 0x2000, 16
PREPARED = 0x180000
"""Where buffers of chains are that keep to the rules."""
TABLES = 0x200000
DESC = struct.Struct("<QIHH")
READY = spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK

ADDRESSES = (
    0, 1, HOLE_START - 1, HOLE_START - 16, HOLE_START, HOLE_END - 1, HOLE_END, HOLE_END + HIGH - 1,
    HOLE_END + HIGH, 1 << 63, (1 << 64) - 1, (1 << 64) - 16, (1 << 64) - 4096,
    RINGS, RINGS + 0x1000, RINGS + 0x2000, RINGS + 0x2004, TABLES, BUFFERS,
)  # fmt: skip
LENGTHS = (
    0, 1, 2, 8, 15, 16, 17, 20, 32, 511, 512, 513, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
    16 * 1024, 16 * 1025, 1 << 16, 1 << 20,
)  # fmt: skip
INDICES = (0, 1, 2, 15, 16, 17, 255, 256, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)
STATUSES = (0, 1, 3, 7, 11, 15, 64, 79, 128, 143, 255)
NUMBERS = (0, 1, 2, 3, 16, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)


class Registers:
    """What a transport's registers can do, well and badly."""

    def reset(self) -> None:
        """Write 0 to the status and see that it has worked."""
        self.set_status(0)
        assert self.status() == 0

    def status(self) -> int:
        raise NotImplementedError

    def set_status(self, value: int) -> None:
        raise NotImplementedError

    def set_features(self, mask: int) -> None:
        """The driver's features, 64 bits."""
        raise NotImplementedError

    def set_queue(self, index: int, size: int, addresses: tuple[int, int, int]) -> None:
        """Size and addresses of queue `index` (descriptors, driver area, device area)."""
        raise NotImplementedError

    def enable(self, index: int) -> None:
        raise NotImplementedError

    def reset_queue(self, index: int) -> None:
        raise NotImplementedError

    def notify(self, index: int) -> None:
        raise NotImplementedError

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The device's configuration space."""
        raise NotImplementedError

    def poke(self, chance: random.Random) -> None:
        """Read or write any register in any size."""
        raise NotImplementedError

    def driver(self, rig: Rig) -> Driver:
        """A well-behaved driver on this transport, from reset to DRIVER_OK."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the transport, and with it the device."""
        raise NotImplementedError


class MmioRegisters(Registers):
    def __init__(self, device: VirtioDevice) -> None:
        self.transport = MmioTransport(device)

    def _write(self, offset: int, value: int) -> None:
        self.transport.write(offset, 4, value)

    def status(self) -> int:
        return self.transport.read(mmio.STATUS, 4)

    def set_status(self, value: int) -> None:
        self._write(mmio.STATUS, value)

    def set_features(self, mask: int) -> None:
        for half in (0, 1):
            self._write(mmio.DRIVER_FEATURES_SEL, half)
            self._write(mmio.DRIVER_FEATURES, mask >> 32 * half & 0xFFFFFFFF)

    def set_queue(self, index: int, size: int, addresses: tuple[int, int, int]) -> None:
        self._write(mmio.QUEUE_SEL, index)
        self._write(mmio.QUEUE_NUM, size)
        places = (mmio.QUEUE_DESC, mmio.QUEUE_DRIVER, mmio.QUEUE_DEVICE)
        for register, gpa in zip(places, addresses, strict=True):
            self._write(register, gpa & 0xFFFFFFFF)
            self._write(register + 4, gpa >> 32)

    def enable(self, index: int) -> None:
        self._write(mmio.QUEUE_SEL, index)
        self._write(mmio.QUEUE_READY, 1)

    def reset_queue(self, index: int) -> None:
        self._write(mmio.QUEUE_SEL, index)
        self._write(mmio.QUEUE_RESET, 1)

    def notify(self, index: int) -> None:
        self._write(mmio.QUEUE_NOTIFY, index)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.transport.write(mmio.CONFIG + offset, size, value)

    def driver(self, rig: Rig) -> Driver:
        return _Borrowed(rig, self.transport)

    def close(self) -> None:
        self.transport.close()

    def poke(self, chance: random.Random) -> None:
        size = chance.choice((1, 2, 4, 4, 4, 4, 8))
        offset = chance.randrange(0, mmio.LENGTH - size + 1)
        if chance.random() < 0.7:
            offset &= ~3
        if chance.random() < 0.5:
            value = self.transport.read(offset, size)
            assert 0 <= value < 1 << 8 * size, f"register {offset:#x}, {size} bytes: {value:#x}"
        else:
            value = chance.choice(NUMBERS) if chance.random() < 0.5 else chance.getrandbits(64)
            self.transport.write(offset, size, value & (1 << 8 * size) - 1)


class _Borrowed(Driver):
    """A `Driver` with the transport and memory of a rig."""

    def __init__(self, rig: Rig, transport: MmioTransport) -> None:
        self.memory, self.device, self.transport = rig.memory, rig.device, transport
        self.packed, self.event_idx = rig.packed, rig.event_idx
        self.size, self.without = 16, 0
        self.rings = []
        self.start()


class Rig:
    """A device, its registers, and memory for it; `fill` prepares the buffers of a case.

    In half of the cases `prelude` is called first, for what a device needs before it serves all of
    its queues, or has something for the driver: see `prepare`.
    """

    def __init__(
        self,
        device: VirtioDevice,
        transport: Callable[[VirtioDevice], Registers],
        *,
        packed: bool,
        event_idx: bool,
        fill: Callable[[GuestMemory, random.Random], None],
        prelude: Callable[[Rig], None] | None = None,
    ) -> None:
        self.memory = GuestMemory(HOLE_START + HIGH)
        device.memory = self.memory
        self.device = device
        self.packed, self.event_idx = packed, event_idx
        self.fill = fill
        self.prelude = prelude
        self.bugs: list[BaseException] = []
        device.on_bug = self.bugs.append
        self.registers = transport(device)
        self.features = device.features
        if not packed:
            self.features &= ~(1 << spec.F_RING_PACKED)
        if not event_idx:
            self.features &= ~(1 << spec.F_EVENT_IDX)
        self.sizes: list[int] = []
        self.avail: list[int] = []
        self.prepared = 0

    def close(self) -> None:
        self.registers.close()
        for slot in self.device.slots:
            slot.clear()
        self.memory.close()

    # --- a case -----------------------------------------------------------------------------------

    def case(self, chance: random.Random) -> None:
        """Set the device up properly, or nearly, then break rules until it has had enough."""
        self.registers.reset()
        self._set_up(chance)
        self.fill(self.memory, chance)
        if self.prelude is not None and chance.random() < 0.5:
            self.prelude(self)
        for _ in range(chance.randint(1, 4)):
            kind = chance.random()
            if kind < 0.8:
                index = chance.randrange(len(self.sizes))
                (self._packed_step if self.packed else self._split_step)(chance, index)
                self.registers.notify(index)
            else:
                self._registers_step(chance)
        if self.bugs:
            raise self.bugs[0]

    def _set_up(self, chance: random.Random) -> None:
        registers, memory = self.registers, self.memory
        registers.set_status(spec.ACKNOWLEDGE | spec.DRIVER)
        registers.set_features(self.features)
        registers.set_status(READY)
        self.sizes, self.avail, self.prepared = [], [], 0
        for index, slot in enumerate(self.device.slots):
            size = min(chance.choice((1, 2, 4, 8, 16, 16, 16, 16, 64, 64, 256)), slot.size_max)
            if self.packed and chance.random() < 0.3:
                size = chance.randint(1, size)
            base = RINGS + index * STRIDE
            memory.fill(base, STRIDE)
            self.sizes.append(size)
            self.avail.append(0)
            places = [base, base + 0x1000, base + 0x2000]
            if chance.random() < 0.03:
                places[chance.randrange(3)] = chance.choice(ADDRESSES) & ~(chance.choice((0, 15)))
            registers.set_queue(
                index,
                chance.choice(NUMBERS) if chance.random() < 0.02 else size,
                (places[0], places[1], places[2]),
            )
            registers.enable(index)
        registers.set_status(READY | spec.DRIVER_OK)

    def prepare(self, index: int, data: bytes = b"", room: int = 0) -> None:
        """Make a right chain available in queue `index`, of `data` and `room` bytes to write."""
        rows = []
        if data:
            rows.append([self._place(data), len(data), spec.DESC_F_NEXT if room else 0])
        if room:
            rows.append([self._place(bytes(room)), room, spec.DESC_F_WRITE])
        memory, size, avail = self.memory, self.sizes[index], self.avail[index]
        base = RINGS + index * STRIDE
        if self.packed:
            self._prepare_packed(base, index, rows)
        elif size >= len(rows) * ((avail & 0xFFFF) + 1):  # each chain has descriptors of its own
            head = len(rows) * avail
            for place, (addr, length, flags) in enumerate(rows, head):
                memory.write(base + 16 * place, DESC.pack(addr, length, flags, place + 1))
            memory.write_u16(base + 0x1004 + 2 * (avail % size), head)
            self.avail[index] = avail + 1
            memory.write_u16(base + 0x1002, avail + 1)
        self.registers.notify(index)

    def _prepare_packed(self, base: int, index: int, rows: list[list[int]]) -> None:
        at, wrap = self.avail[index] >> 1, 1 - (self.avail[index] & 1)
        if at + len(rows) >= self.sizes[index]:
            return
        flag = spec.PACKED_DESC_F_AVAIL if wrap else spec.PACKED_DESC_F_USED
        for place, (addr, length, flags) in reversed(list(enumerate(rows, at))):
            self.memory.write(base + 16 * place, DESC.pack(addr, length, 0, flags | flag))
        self.avail[index] = (at + len(rows)) << 1 | (1 - wrap)

    def _place(self, data: bytes) -> int:
        gpa = PREPARED + 0x1000 * self.prepared
        self.prepared += 1
        self.memory.write(gpa, data)
        return gpa

    # --- rings ------------------------------------------------------------------------------------

    def _rows(self, chance: random.Random, count: int, indirect: bool) -> list[list[int]]:
        """A chain of `count` buffers, [addr, length, flags, next]: right but for what is changed
        about it."""
        readable = chance.randint(min(1, count - 1), max(1, count - 1))
        if chance.random() < 0.1:
            readable = chance.choice((0, count))
        rows = []
        for place in range(count):
            addr = BUFFERS + BUFFER * chance.randrange(BUFFER_COUNT)
            length = chance.choice((1, 16, 16, 20, 32, 512, 512, 512, 1024, 4096))
            if place == 0 and readable:
                addr, length = BUFFERS, chance.choice((16, 16, 16, 16, 24, 32, 600))
            if place == count - 1 and readable < count:
                length = chance.choice((1, 1, 1, 513, 17))
            flags = (spec.DESC_F_NEXT if place + 1 < count else 0) | (
                spec.DESC_F_WRITE if place >= readable else 0
            )
            rows.append([addr, length, flags, place + 1])
        if chance.random() < 0.3:
            for _ in range(chance.choice((1, 1, 1, 3))):
                self._spoil(chance, chance.choice(rows))
        if indirect:
            table = TABLES + 0x8000 * chance.randrange(4)
            if self.packed and chance.random() < 0.9:
                for row in rows:
                    row[2] &= ~spec.DESC_F_NEXT
            self.memory.write(table, b"".join(DESC.pack(*_wrap(row)) for row in rows))
            length = 16 * count if chance.random() < 0.9 else chance.choice(LENGTHS)
            rows = [[table, length, spec.DESC_F_INDIRECT, 0]]
            if chance.random() < 0.1:
                self._spoil(chance, rows[0])
        return rows

    def _spoil(self, chance: random.Random, row: list[int]) -> None:
        what = chance.randrange(5)
        if what == 0:
            row[0] = chance.choice(ADDRESSES)
        elif what == 1:
            row[0] += chance.choice((-1, 1, 8, 0xFFF, HOLE_START - BUFFERS - 8, 1 << 40))
        elif what == 2:
            row[1] = chance.choice(LENGTHS)
        elif what == 3:
            row[2] = chance.choice((0, 1, 2, 3, 4, 5, 6, 7, 0xFF, 0xFFFF, chance.getrandbits(16)))
        else:
            row[3] = chance.choice(INDICES)

    def _split_step(self, chance: random.Random, index: int) -> None:
        memory, size = self.memory, self.sizes[index]
        base = RINGS + index * STRIDE
        at, avail = chance.randrange(size), self.avail[index]
        heads = []
        for _ in range(chance.randint(1, 3)):
            heads.append(at)
            rows = self._rows(chance, chance.choice((1, 2, 2, 3, 3, 3, 5)), chance.random() < 0.3)
            for row in rows:
                following = (at + 1) % size if row[3] <= len(rows) else row[3]
                addr, length, flags, _ = _wrap(row)
                memory.write(base + 16 * at, DESC.pack(addr, length, flags, following & 0xFFFF))
                at = (at + 1) % size
        for head in heads:
            if chance.random() < 0.03:
                head = chance.choice(INDICES)
            memory.write_u16(base + 0x1004 + 2 * (avail % size), head)
            avail = (avail + 1) & 0xFFFF
        if chance.random() < 0.05:
            avail = chance.choice((avail + size, avail - 1, chance.getrandbits(16))) & 0xFFFF
        self.avail[index] = avail
        memory.write_u16(base + 0x1002, avail)
        if chance.random() < 0.1:  # flags and events
            memory.write_u16(base + 0x1000, chance.choice(INDICES))
            memory.write_u16(base + 0x1004 + 2 * size, chance.choice(INDICES))
        if chance.random() < 0.05:  # the device's own part
            memory.write(base + 0x2000, chance.randbytes(min(6 + 8 * size, 64)))
        if chance.random() < 0.03:
            memory.write(base, chance.randbytes(16 * size))

    def _packed_step(self, chance: random.Random, index: int) -> None:
        memory, size = self.memory, self.sizes[index]
        base = RINGS + index * STRIDE
        at, wrap = self.avail[index] >> 1, 1 - (self.avail[index] & 1)
        for _ in range(chance.randint(1, 3)):
            rows = self._rows(chance, chance.choice((1, 2, 2, 3, 3, 3, 5)), chance.random() < 0.3)
            written = []
            for row in rows:
                addr, length, flags, ident = _wrap(row)
                flags &= ~(spec.PACKED_DESC_F_AVAIL | spec.PACKED_DESC_F_USED)
                flags |= spec.PACKED_DESC_F_AVAIL if wrap else spec.PACKED_DESC_F_USED
                if chance.random() < 0.03:
                    flags = chance.getrandbits(16)
                written.append((base + 16 * at, DESC.pack(addr, length, ident, flags)))
                at += 1
                if at == size:
                    at, wrap = 0, 1 - wrap
            for place, data in reversed(written):
                memory.write(place, data)
        self.avail[index] = at << 1 | (1 - wrap)
        if chance.random() < 0.1:
            memory.write_u16(base + 0x1000, chance.choice(INDICES))
            memory.write_u16(base + 0x1002, chance.choice(INDICES))
        if chance.random() < 0.05:
            memory.write_u32(base + 0x2000, chance.getrandbits(32))
        if chance.random() < 0.03:
            memory.write(base, chance.randbytes(16 * size))

    # --- registers --------------------------------------------------------------------------------

    def _registers_step(self, chance: random.Random) -> None:
        registers = self.registers
        queues = len(self.sizes)
        for _ in range(chance.randint(1, 6)):
            what = chance.randrange(9)
            index = chance.randrange(queues + 1) if chance.random() < 0.9 else 0xFFFFFFFF
            if what == 0:
                registers.set_status(chance.choice(STATUSES))
            elif what == 1:
                mask = self.features & chance.getrandbits(64) | 1 << spec.F_VERSION_1
                registers.set_features(mask if chance.random() < 0.7 else chance.getrandbits(64))
            elif what == 2:
                gpas = [
                    chance.choice(ADDRESSES)
                    if chance.random() < 0.3
                    else RINGS + chance.randrange(queues) * STRIDE + 0x1000 * place
                    for place in range(3)
                ]
                size = chance.choice(NUMBERS)
                registers.set_queue(index, size, (gpas[0], gpas[1], gpas[2]))
            elif what == 3:
                registers.enable(index)
            elif what == 4:
                registers.reset_queue(index)
            elif what == 5:
                registers.notify(index)
            elif what == 6:
                size = chance.choice((1, 2, 4, 8))
                offset = chance.choice((0, 8, 20, 32, 32, 60, 255, chance.randrange(0x100)))
                registers.write_config(
                    min(offset, 0x100 - size), size, chance.getrandbits(8 * size)
                )
            else:
                registers.poke(chance)


def _wrap(row: list[int]) -> tuple[int, int, int, int]:
    return row[0] & (1 << 64) - 1, row[1] & 0xFFFFFFFF, row[2] & 0xFFFF, row[3] & 0xFFFF
