"""A network driver for tests, over tests/support/virtio_driver.py: sends, receives, commands."""

from __future__ import annotations

import os
import struct
import time
from typing import Any

from tests.support.virtio_driver import Driver, ServedDriver
from vmm import Machine
from vmm.memory import GuestMemory
from vmm.virtio import net_spec as n
from vmm.virtio.device import VirtioDevice
from vmm.virtio.net import Nic
from vmm.virtio.transport import Transport

RX_BUFFERS = 0x200000
TX_BUFFER = 0x600000
COMMAND = 0x700000
MAC = bytes.fromhex("525400000005")


class NetGuest(Driver):
    """A started network device's driver.

    Args:
        buffer: bytes of each receive buffer.
        buffers: how many are given at once.
        cut: where a receive buffer is cut into descriptors.
    """

    def __init__(
        self, nic: Nic, *, buffer: int = 2048, buffers: int = 16, cut: int = 0, **how: Any
    ) -> None:
        self.nic = nic
        if "memory" not in how:
            how["memory"] = GuestMemory(16 << 20)
        super().__init__(nic, **{"size": 64, **how})
        self.buffer, self.cut = buffer, cut
        self.where: dict[int, int] = {}
        self.given = 0
        self.packets: list[bytes] = []
        self.partial = b""
        self.left = 0
        self.give(buffers)

    def give(self, count: int = 1, gpa: int | None = None) -> None:
        """Give receive buffers."""
        for _ in range(count):
            at = RX_BUFFERS + self.given * self.buffer if gpa is None else gpa
            if gpa is None:
                self.given += 1
            if self.cut:
                pieces = [(at, self.cut, True), (at + self.cut, self.buffer - self.cut, True)]
            else:
                pieces = [(at, self.buffer, True)]
            self.where[self.rings[0].add(pieces)] = at
        self.kick(0)

    def send(self, frame: bytes, header: bytes = bytes(n.HEADER_SIZE), queue: int = 1) -> None:
        """Send a frame; the device has taken it on return."""
        data = header + frame
        self.memory.write(TX_BUFFER, data)
        self.rings[queue].add([(TX_BUFFER, len(data), False)])
        self.kick(queue)
        deadline = time.monotonic() + 20
        while not self.rings[queue].used():
            assert time.monotonic() < deadline, "the frame was not taken"
            time.sleep(0.001)

    def poll(self) -> None:
        """Take what came."""
        for at, size in [(self.where.pop(head), size) for head, size in self.rings[0].used()]:
            data = bytes(self.memory.read(at, size))
            if not self.left:
                self.left = struct.unpack_from("<H", data, n.NUM_BUFFERS)[0]
                self.partial = b""
            self.partial += data
            self.left -= 1
            if not self.left:
                self.packets.append(self.partial)
            self.give(1, at)

    def receive(self, within: float = 20.0) -> bytes:
        """The next packet, header first."""
        deadline = time.monotonic() + within
        while not self.packets:
            assert time.monotonic() < deadline, "no packet came"
            self.poll()
            time.sleep(0.001)
        return self.packets.pop(0)

    def frame(self, kind: int | None = None, within: float = 20.0) -> bytes:
        """The next frame, of EtherType `kind` (those of other kinds are thrown away)."""
        while True:
            frame = self.receive(within)[n.HEADER_SIZE :]
            if kind is None or frame[12:14] == struct.pack(">H", kind):
                return frame

    def silent(self, seconds: float = 0.1) -> bool:
        """Whether nothing comes for a while."""
        time.sleep(seconds)
        self.poll()
        return not self.packets

    def command(self, kind: int, command: int, data: bytes = b"", queue: int = 2) -> int:
        """A command on the control queue: its ack."""
        self.memory.write(COMMAND, bytes((kind, command)) + data)
        self.memory.write(COMMAND + 0x80000, b"\xee")
        self.rings[queue].add([(COMMAND, 2 + len(data), False), (COMMAND + 0x80000, 1, True)])
        self.kick(queue)
        assert self.rings[queue].used()
        return self.memory.read(COMMAND + 0x80000, 1)[0]

    def config_status(self) -> int:
        return self.read(0x100 + n.CONFIG_STATUS, 2)


class ServedNetGuest(NetGuest, ServedDriver):
    """One whose card's queues are served as a machine's are; it notifies when it is asked to."""

    def kick(self, index: int = 0) -> None:
        if self.rings[index].wants_notify():
            super().kick(index)


class MachineNetGuest(NetGuest):
    """The driver of a network card of `machine`, in the place of its guest's."""

    def __init__(self, machine: Machine, number: int = 0, **how: Any) -> None:
        assert machine.platform.virtio is not None
        self._transport = machine.platform.virtio.transports[number]
        nic = self._transport.device
        assert isinstance(nic, Nic)
        super().__init__(nic, memory=machine.memory, **how)

    def attach(self, device: VirtioDevice) -> Transport:
        return self._transport


def random_frame(size: int, to: bytes = MAC) -> bytes:
    return to + b"\x02\0\0\0\0\x09" + b"\x88\xb5" + os.urandom(size - 14)
