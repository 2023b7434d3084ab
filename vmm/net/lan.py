"""`--net lan=NAME`: a private network between machines of one process, without the host's.

An Ethernet switch that learns addresses. A frame is copied out of its sender's memory once and into
each receiver's. Packets are large by default (`MTU`), as the wire is memory.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from collections import deque
from weakref import WeakValueDictionary

from vmm.net.port import Backend, Port, scatter
from vmm.virtio.net_spec import HEADER_SIZE, MTU_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import ClassVar

MTU = 65520
QUEUE_FRAMES = 1024
QUEUE_BYTES = 16 << 20
"""What waits for one machine; more is dropped, as any switch does."""
_HEADER = bytes(HEADER_SIZE)
ADDRESSES_MAX = 1024
"""What the switch remembers; then it forgets all, and learns anew."""


class Lan:
    """A switch. `connect` gives a port for one machine's network card."""

    _named: ClassVar[WeakValueDictionary[str, Lan]] = WeakValueDictionary()
    _names = allocate_lock()

    def __init__(self, mtu: int = MTU) -> None:
        self.mtu = mtu
        self.name = ""
        self._lock = allocate_lock()
        self._ports: list[LanPort] = []
        self._where: dict[bytes, LanPort] = {}
        self._parts: tuple[dict[LanPort, int], ...] = ()

    @classmethod
    def named(cls, name: str) -> Lan:
        """The process's LAN of that name, made if there is none; it goes with its last port."""
        with cls._names:
            lan = cls._named.get(name)
            if lan is None:
                lan = cls._named[name] = cls()
                lan.name = name
            return lan

    def connect(self, *, mtu: int = 0) -> LanBackend:
        """A port; `mtu` is what its guest is told, 0 for the LAN's."""
        port = LanPort(self)
        with self._lock:
            self._ports.append(port)
        return LanBackend(self, port, min(mtu or self.mtu, MTU_MAX))

    def disconnect(self, port: LanPort) -> None:
        """Take `port` out."""
        with self._lock:
            self._ports.remove(port)
            self._where = {mac: at for mac, at in self._where.items() if at is not port}

    def part(self, sides: dict[LanPort, int]) -> None:
        """Part the LAN: frames pass between ports of the same number (0: ports not in it)."""
        with self._lock:
            self._parts = (*self._parts, sides)

    def unite(self, sides: dict[LanPort, int]) -> None:
        """The end of `part`."""
        with self._lock:
            self._parts = tuple(other for other in self._parts if other is not sides)

    def forward(self, source: LanPort, frame: bytes) -> None:
        """Deliver `frame`, an empty virtio-net header before it, that came in on `source`."""
        to, sender = frame[HEADER_SIZE : HEADER_SIZE + 6], frame[HEADER_SIZE + 6 : HEADER_SIZE + 12]
        with self._lock:
            where = self._where
            if not sender[0] & 1 and where.get(sender) is not source:
                if len(where) >= ADDRESSES_MAX:
                    where.clear()
                where[sender] = source
            target = where.get(to)
            if target is not None:
                targets = [target] if target is not source else []
            else:
                targets = [port for port in self._ports if port is not source]
            for sides in self._parts:
                side = sides.get(source, 0)
                targets = [port for port in targets if sides.get(port, 0) == side]
            for port in targets:
                port.deliver(frame)


class LanPort(Port):
    """One card's end of a LAN."""

    def __init__(self, lan: Lan) -> None:
        self._lan = lan
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._lock = allocate_lock()

    def deliver(self, frame: bytes) -> None:
        """Queue `frame` for the guest."""
        with self._lock:
            if self.fd < 0:
                return
            waiting = len(self._frames)
            if waiting >= QUEUE_FRAMES or self._bytes + len(frame) > QUEUE_BYTES:
                self.dropped += 1
                return
            self._frames.append(frame)
            self._bytes += len(frame)
            if not waiting:
                os.eventfd_write(self.fd, 1)

    def read(self, views: list[memoryview]) -> int:
        with self._lock:
            if not self._frames:
                return 0
            frame = self._frames.popleft()
            self._bytes -= len(frame)
            if not self._frames:
                os.eventfd_read(self.fd)
        first, size = views[0], len(frame)
        if len(first) >= size:
            first[:size] = frame
        else:
            scatter(views, memoryview(frame))
        return size

    def write(self, views: Sequence[memoryview]) -> bool:
        if len(views[0]) >= HEADER_SIZE:
            frame = b"".join((_HEADER, views[0][HEADER_SIZE:], *views[1:]))
        else:
            frame = _HEADER + b"".join(views)[HEADER_SIZE:]
        self._lan.forward(self, frame)
        return True

    def close(self) -> None:
        """Leave the LAN; harmless twice."""
        with self._lock:
            fd, self.fd = self.fd, -1
            self._frames.clear()
        if fd >= 0:
            os.close(fd)


class LanBackend(Backend):
    """A network card's connection to a LAN.

    Attributes:
        lan, port: what it is connected to, and where.
    """

    def __init__(self, lan: Lan, port: LanPort, mtu: int) -> None:
        super().__init__()
        self.lan, self.port = lan, port
        self.mtu = mtu
        self.peer = f"lan {lan.name}".rstrip()
        self.ports.append(port)

    def close(self) -> None:
        if self.port.fd >= 0:
            self.port.close()
            self.lan.disconnect(self.port)
