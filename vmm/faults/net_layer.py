"""Between a network card and its port, while faults of the card are set.

Frames that are delayed wait here, in the order of their time: on the way out until the thread of
`Schedule` sends them, on the way in until the card's own thread asks for them again.
"""

from __future__ import annotations

from heapq import heappop, heappush
from threading import Lock
from time import monotonic

from vmm.faults.rules import LayerFault
from vmm.net.port import LinkLost, Port, scatter
from vmm.virtio.net_spec import FRAME_MAX, HEADER_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.faults.rules import Chance, Control
    from vmm.virtio.net import Nic

RX, TX = "rx", "tx"
"""To the guest, and from it."""
WAITING_MAX = 4096
WAITING_BYTES = 64 << 20
"""What is delayed in one direction; more is dropped."""
READS = 64
"""Frames taken from the port at once: who waits for the queue's lock gets it then."""
RETRY = 0.01
"""Seconds until it is tried again to send where the other side takes no more."""


class Passage:
    """A frame on its way.

    Attributes:
        direction: RX or TX.
        packets: what arrives of it, each with its virtio-net header; empty: it is lost.
        delay: seconds.
    """

    __slots__ = ("delay", "direction", "packets")

    def __init__(self, direction: str, packet: bytes) -> None:
        self.direction = direction
        self.packets = [packet]
        self.delay = 0.0


class NetFault(LayerFault):
    """A fault of frames.

    Args:
        chances: what chance says in each direction that it is for.
        match: whether it may strike a frame, without its virtio-net header; None: any.
    """

    layer: NetLayer

    def __init__(
        self,
        layer: NetLayer,
        kind: str,
        details: dict[str, object],
        chances: dict[str, Chance],
        match: Callable[[bytes], object] | None = None,
    ) -> None:
        super().__init__(layer, kind, details)
        self._chances = chances
        self._match = match

    def meet(self, passage: Passage) -> None:
        """A frame comes by, in order; under the control's lock."""
        chance = self._chances.get(passage.direction)
        if chance is None:
            return
        packet = passage.packets[0]
        if self._match is not None and not self._match(packet[HEADER_SIZE:]):
            return
        if chance.strikes():
            size = len(packet) - HEADER_SIZE
            self.struck(frame=chance.seen, direction=passage.direction, size=size)
            self.strike(passage, chance)

    def strike(self, passage: Passage, chance: Chance) -> None:
        """Do it."""
        raise NotImplementedError


class NetLayer:
    """The faults of `device`. In the way only while there are any, or frames wait."""

    def __init__(self, device: Nic, control: Control) -> None:
        self.device = device
        self.control = control
        self.faults: tuple[NetFault, ...] = ()
        self._ports = [FaultyPort(self, pair, port) for pair, port in enumerate(device.ports)]

    # Under control.lock, which comes after a queue's lock: neither takes one.

    def add(self, fault: NetFault) -> None:
        """One more fault."""
        self.faults = (*self.faults, fault)
        for pair, port in enumerate(self._ports):
            self.device.ports[pair] = port
            self.device.receivers[pair].port = port

    def remove(self, fault: NetFault) -> None:
        """One fault less; without any, what waits goes on."""
        self.faults = tuple(other for other in self.faults if other is not fault)
        if not self.faults:
            for pair, port in enumerate(self._ports):
                self.device.ports[pair] = port.port
                port.hurry()

    def passes(self, direction: str, packet: bytes) -> Passage:
        """What becomes of a frame."""
        passage = Passage(direction, packet)
        with self.control.lock:
            for fault in self.faults:
                fault.meet(passage)
                if not passage.packets:
                    break
        return passage

    def leave(self, pair: int) -> None:
        """Nothing waits for the guest any more: get out of the way, if there is no fault."""
        with self.control.lock:
            if not self.faults:
                self.device.receivers[pair].port = self._ports[pair].port


class Waiting:
    """Frames that wait for their time."""

    def __init__(self) -> None:
        self._frames: list[tuple[float, int, bytes]] = []
        self._count = self._bytes = 0
        self._lock = Lock()
        self._hurry = False

    def __bool__(self) -> bool:
        return bool(self._frames)

    def add(self, due: float, packet: bytes) -> bool:
        """One more; False: there are too many."""
        with self._lock:
            if len(self._frames) >= WAITING_MAX or self._bytes + len(packet) > WAITING_BYTES:
                return False
            self._count += 1
            self._bytes += len(packet)
            self._hurry = False
            heappush(self._frames, (due, self._count, packet))
            return True

    def take(self) -> bytes | None:
        """The next one whose time has come."""
        with self._lock:
            if not self._frames or (self._frames[0][0] > monotonic() and not self._hurry):
                return None
            packet = heappop(self._frames)[2]
            self._bytes -= len(packet)
            return packet

    def hurry(self) -> None:
        """The time of all that is here has come."""
        self._hurry = True


class FaultyPort(Port):
    """`port`, with faults in both directions."""

    def __init__(self, layer: NetLayer, pair: int, port: Port) -> None:
        self.port = port
        self._layer = layer
        self._pair = pair
        self._slot = layer.device.slots[2 * pair + 1]
        self._buffer = memoryview(bytearray(HEADER_SIZE + FRAME_MAX))
        self._rx, self._tx = Waiting(), Waiting()

    @property
    def fd(self) -> int:  # type: ignore[override]
        return self.port.fd

    @property
    def blocked(self) -> bool:  # type: ignore[override]
        return self.port.blocked

    @property
    def dropped(self) -> int:
        return self.port.dropped

    @dropped.setter
    def dropped(self, count: int) -> None:
        self.port.dropped = count

    def flush(self) -> bool:
        return self.port.flush()

    def resume(self) -> None:
        self.port.resume()

    # --- to the guest; in the thread of its queue pair --------------------------------------------

    def read(self, views: list[memoryview]) -> int:
        for _ in range(READS):
            packet = self._rx.take()
            if packet is not None:
                scatter(views, memoryview(packet))
                return len(packet)
            size = self.port.read([self._buffer])
            if not size:
                if not self._layer.faults and not self._rx:
                    self._layer.leave(self._pair)
                return 0
            passage = self._layer.passes(RX, bytes(self._buffer[:size]))
            due = monotonic() + passage.delay
            for packet in passage.packets:
                if not self._rx.add(due, packet):
                    self.dropped += 1
                elif passage.delay:
                    self._layer.control.schedule.at(due, self._wake)
        self._wake()
        return 0

    def _wake(self) -> None:
        self._layer.device.look(self._pair)

    # --- from the guest; under the lock of its queue ----------------------------------------------

    def write(self, views: Sequence[memoryview]) -> bool:
        passage = self._layer.passes(TX, b"".join(views))
        go_on = True
        due = monotonic() + passage.delay
        for packet in passage.packets:
            if not passage.delay:
                go_on = self.port.write([memoryview(packet)]) and go_on
            elif self._tx.add(due, packet):
                self._layer.control.schedule.at(due, self._send_late)
            else:
                self.dropped += 1
        return go_on

    def _send_late(self) -> None:
        """Send what has waited; in the schedule's thread."""
        device, port = self._layer.device, self.port
        with self._slot.lock:
            if port.blocked:
                self._layer.control.schedule.at(monotonic() + RETRY, self._send_late)
                return
            try:
                while not port.blocked and (packet := self._tx.take()) is not None:
                    if device.link_up and port.fd >= 0:
                        port.write([memoryview(packet)])
                port.flush()
            except LinkLost as err:
                device.lost(self._pair, err)
                return
            if port.blocked:
                device.look(self._pair)  # its thread waits for room
                self._layer.control.schedule.at(monotonic() + RETRY, self._send_late)

    def hurry(self) -> None:
        """There is no fault any more: what waits goes on."""
        if self._tx:
            self._tx.hurry()
            self._layer.control.schedule.at(0, self._send_late)
        self._rx.hurry()
        self._layer.control.schedule.at(0, self._wake)
