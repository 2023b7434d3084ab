"""The socket device (virtio 1.2, section 5.10): streams between the guest and host programs.

The host's side is UNIX sockets (vmm.virtio.vsock_host): this module is the rings, the packets and
the table of connections; vmm.virtio.vsock_stream is one of them. All of it runs on the machine's
event loop (vmm.virtio.on_loop).
"""

from __future__ import annotations

import os
from collections import deque

from vmm import descriptors
from vmm.virtio import spec
from vmm.virtio.on_loop import LoopDevice
from vmm.virtio.queue import CHAIN_MAX, QueueError
from vmm.virtio.vsock_packet import (
    CID_HOST,
    EVENT_TRANSPORT_RESET,
    F_STREAM,
    HEADER,
    HEADER_SIZE,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    TYPE_STREAM,
)
from vmm.virtio.vsock_stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from vmm.virtio.queue import Chain, VirtQueue
    from vmm.virtio.vsock_host import VsockHost

RX, TX, EVENT = 0, 1, 2
REPLIES_MAX = 256
"""Packets for the guest that wait for its buffers; beyond, nothing more is taken from it."""
BATCH = 32
HUNGRY = 64
"""Connections that are given a burst when the guest gives buffers, before that."""
TURN = 8
"""Batches of the guest's packets before others of the loop have their turn."""
STREAMS_MAX = 1024
"""Connections, or a quarter of the descriptors that the process may have, if those are fewer."""
FIRST_PORT = 1 << 30
"""Ports of host programs that connect to the guest count from here, as Firecracker's do."""


class RxBuffer:
    """A receive buffer of the guest's: room for a header, then data."""

    __slots__ = ("chain", "data", "header", "size")

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        writable = chain.writable
        if writable and len(writable[0]) >= HEADER_SIZE:
            self.header: memoryview | None = writable[0]
            rest = writable[0][HEADER_SIZE:]
            self.data = [rest, *writable[1:]] if rest else writable[1:]
        else:
            self.header = None  # in pieces
            self.data = []
            before = HEADER_SIZE
            for view in writable:
                if before < len(view):
                    self.data.append(view[before:])
                before = max(before - len(view), 0)
        self.size = sum(map(len, self.data))
        if not self.size:
            raise QueueError("a receive buffer without room for data")

    def write_header(self, *fields: int) -> None:
        if self.header is not None:
            HEADER.pack_into(self.header, 0, *fields)
        else:
            self.chain.write(HEADER.pack(*fields))


class Vsock(LoopDevice):
    """The socket device of guest `cid`, with `host` on the other side; closed with the device."""

    ID = spec.ID_VSOCK
    FEATURES = 1 << F_STREAM
    QUEUES = (128, 128, 16)

    def __init__(self, cid: int, host: VsockHost, name: str = "vsock") -> None:
        super().__init__(name)
        self.set_cid(cid)
        self.host = host
        self.streams: dict[tuple[int, int], Stream] = {}
        self._lingering: set[Stream] = set()
        self._former: list[Stream] = []
        """Those of a driver that is gone, until the loop has closed them."""
        self._was_reset = False
        self._next_port = _random_port()
        self._transport_reset = False
        self._clear()
        host.attach(self)

    def _clear(self) -> None:
        self._buffers: deque[RxBuffer] = deque()
        self._replies: deque[tuple[int, ...] | Stream] = deque()
        self._hungry: dict[Stream, None] = {}
        self._tx_waits = False

    def set_cid(self, cid: int) -> None:
        """Another address for the guest, before it runs."""
        self.cid = cid
        self.config[:] = cid.to_bytes(8, "little")

    # --- life -------------------------------------------------------------------------------------

    def started(self) -> None:
        self.once("host", self._renew_host)
        if self._transport_reset:
            self.call(lambda: self.notify(EVENT))

    def stopped(self) -> None:
        self._former += [*self.streams.values(), *self._lingering]
        self.streams = {}
        self._lingering = set()
        self._clear()
        self._was_reset = True
        self.once("host", self._renew_host)

    def _renew_host(self) -> None:
        """The former driver is gone, with its connections; there may be another one by now. On the
        loop."""
        with self._mutex:
            if self._was_reset:
                self._was_reset = False
                self.host.stop()
                former, self._former = self._former, []
                for stream in former:
                    stream.gone = True
                    stream.drop()
            if self.status & spec.DRIVER_OK:
                self.host.start()

    def queue_stopped(self, index: int) -> None:
        if index == RX:
            self._buffers.clear()

    def close(self) -> None:
        self._loop = None  # it has ended before
        self.stopped()
        self.host.close()

    # --- queues -----------------------------------------------------------------------------------

    def serve(self, index: int) -> None:
        if index == TX:
            queue = self.slots[TX].queue
            if queue is not None:
                self._transmit(queue)
        elif index == EVENT:
            self._send_event()
        elif self._hungry:
            for stream in list(self._hungry)[:HUNGRY]:
                self._hungry.pop(stream, None)
                stream.pull()
            if self._hungry and self._buffers and self._loop is not None:
                self.again(RX)

    def _transmit(self, queue: VirtQueue) -> None:
        """Take the guest's packets."""
        self._tx_waits = False
        for _ in range(TURN) if self._loop is not None else iter(int, 1):
            if len(self._replies) >= REPLIES_MAX:
                self._tx_waits = True  # until there are buffers for them
                return
            chains = queue.pop_batch(BATCH)
            if not chains:
                if queue.rearm():
                    continue
                return
            try:
                for chain in chains:
                    self._packet(chain)
                    queue.push(chain, 0)
            finally:
                if queue.publish():
                    self.interrupt(TX)
            self.flush()
        if self._loop is not None:
            self.again(TX)

    def _packet(self, chain: Chain) -> None:
        """One packet of the guest's."""
        readable = chain.readable
        if readable and len(readable[0]) == HEADER_SIZE:
            header, data = readable[0], readable[1:]
        else:
            header, data = _split(readable)
        (src_cid, dst_cid, guest_port, host_port, size, kind, op, flags, alloc, fwd) = (
            HEADER.unpack_from(header)
        )
        if src_cid != self.cid:
            return
        if dst_cid != CID_HOST or kind != TYPE_STREAM:
            if op != OP_RST:
                self._replies.append(
                    (dst_cid, src_cid, host_port, guest_port, 0, kind, OP_RST, 0, 0, 0)
                )
            return
        stream = self.streams.get((host_port, guest_port))
        if stream is None:
            if op == OP_REQUEST:
                self._requested(host_port, guest_port, alloc, fwd)
            elif op != OP_RST:
                self._refuse(host_port, guest_port)
            return
        stream.credit(alloc, fwd)
        if op == OP_RW:
            stream.write(_cut(data, size), size)
        elif op == OP_CREDIT_UPDATE:
            pass
        elif op == OP_CREDIT_REQUEST:
            stream.tell()
        elif op == OP_SHUTDOWN:
            stream.shut_down(flags)
        elif op == OP_RST:
            stream.finish()
        elif op == OP_RESPONSE and not stream.open and stream.dialled:
            self.host.answered(stream)
        else:
            stream.reset()

    def _requested(self, host_port: int, guest_port: int, alloc: int, fwd: int) -> None:
        """The guest connects to a port of the host's."""
        if self.full():
            self._refuse(host_port, guest_port)
            return
        stream = Stream(self, host_port, guest_port, None)
        self.streams[host_port, guest_port] = stream
        stream.credit(alloc, fwd)
        self.host.connect(stream)

    def _refuse(self, host_port: int, guest_port: int) -> None:
        self._replies.append(
            (CID_HOST, self.cid, host_port, guest_port, 0, TYPE_STREAM, OP_RST, 0, 0, 0)
        )

    def _send_event(self) -> None:
        """After a restore, the connections the guest had are gone (5.10.6.7)."""
        queue = self.slots[EVENT].queue
        if not self._transport_reset or queue is None:
            return
        while not (chains := queue.pop_batch(1)):
            if not queue.rearm():
                return
        self._transport_reset = False
        queue.push(chains[0], chains[0].write(EVENT_TRANSPORT_RESET.to_bytes(4, "little")))
        if queue.publish():
            self.interrupt(EVENT)

    # --- for streams and the host's side ----------------------------------------------------------

    def full(self) -> bool:
        """Whether there are as many connections as there may be."""
        return self.connections() >= min(STREAMS_MAX, descriptors.limit() // 4)

    def connections(self) -> int:
        """How many there are, with those that are only to be flushed."""
        return len(self.streams) + len(self._lingering)

    def dial(self, port: int, sock: socket.socket) -> Stream | None:
        """Ask the guest for a connection to its `port`; None where there are too many."""
        if self.full():
            return None
        while (self._next_port, port) in self.streams:
            self._advance()
        stream = Stream(self, self._next_port, port, sock)
        self._advance()
        stream.dialled = True
        self.streams[stream.host_port, port] = stream
        self.reply(stream, OP_REQUEST)
        return stream

    def _advance(self) -> None:
        self._next_port = self._next_port + 1 if self._next_port < 2 * FIRST_PORT else FIRST_PORT

    def reply(self, stream: Stream, op: int, flags: int = 0) -> None:
        """Queue a packet of `stream`'s that has no data."""
        if not stream.gone:
            alloc, fwd = stream.told()
            self._replies.append(
                (CID_HOST, self.cid, stream.host_port, stream.guest_port, 0, TYPE_STREAM, op, flags,
                 alloc, fwd)
            )  # fmt: skip

    def reply_credit(self, stream: Stream) -> None:
        """Queue a CREDIT_UPDATE, made when it is sent."""
        self._replies.append(stream)

    def room(self, want: int) -> list[memoryview]:
        """Buffers of the guest's for up to `want` bytes of data; none while replies wait."""
        self.flush()
        if self._replies:
            return []
        views: list[memoryview] = []
        number = 0
        while want > 0:
            if number == len(self._buffers) and not self._take_buffers():
                break
            for view in self._buffers[number].data:
                part = len(view)
                views.append(view if part <= want else view[:want])
                want -= part
                if want <= 0 or len(views) >= CHAIN_MAX:  # IOV_MAX
                    return views
            number += 1
        return views

    def deliver(self, stream: Stream, got: int) -> None:
        """`got` bytes are in the buffers `room` gave: they are `stream`'s."""
        queue, buffers = self.slots[RX].queue, self._buffers
        assert queue is not None
        alloc, fwd = stream.told()
        cid, host_port, guest_port = self.cid, stream.host_port, stream.guest_port
        while got > 0:
            buffer = buffers.popleft()
            size = min(got, buffer.size)
            buffer.write_header(
                CID_HOST, cid, host_port, guest_port, size, TYPE_STREAM, OP_RW, 0, alloc, fwd
            )
            queue.push(buffer.chain, HEADER_SIZE + size)
            got -= size
        if queue.publish():
            self.interrupt(RX)

    def wait_for_room(self, stream: Stream) -> None:
        """Have `stream` pull when the guest gives buffers."""
        self._hungry[stream] = None

    def forget(self, stream: Stream) -> None:
        """Take `stream` out of the table: its ports may be used again."""
        self._hungry.pop(stream, None)
        if self.streams.get((stream.host_port, stream.guest_port)) is stream:
            del self.streams[stream.host_port, stream.guest_port]

    def linger(self, stream: Stream) -> None:
        """Keep `stream` until what it holds is out."""
        self._lingering.add(stream)

    def dropped(self, stream: Stream) -> None:
        """Its socket is closed."""
        self._hungry.pop(stream, None)
        self._lingering.discard(stream)

    # --- receive buffers --------------------------------------------------------------------------

    def _take_buffers(self) -> bool:
        """Take more of the guest's receive buffers; False: there are none, it will notify."""
        queue = self.slots[RX].queue
        if queue is None or queue.broken:
            return False
        while not (chains := queue.pop_batch(128)):
            if not queue.rearm():
                return False
        self._buffers.extend(map(RxBuffer, chains))
        return True

    def flush(self) -> None:
        replies = self._replies
        queue = self.slots[RX].queue if replies else None
        if queue is None:
            return
        while replies:
            if not self._buffers and not self._take_buffers():
                break
            packet = replies.popleft()
            if isinstance(packet, Stream):
                packet.credit_queued = False
                if packet.gone:
                    continue
                packet = (
                    CID_HOST, self.cid, packet.host_port, packet.guest_port, 0, TYPE_STREAM,
                    OP_CREDIT_UPDATE, 0, *packet.told(),
                )  # fmt: skip
            buffer = self._buffers.popleft()
            buffer.write_header(*packet)
            queue.push(buffer.chain, HEADER_SIZE)
        if queue.publish():
            self.interrupt(RX)
        if self._tx_waits and len(replies) < REPLIES_MAX:
            self._tx_waits = False
            self.call(lambda: self.notify(TX))

    # --- state ------------------------------------------------------------------------------------

    # Without the connections: a restored guest is told that they are gone.

    def give_back(self) -> None:
        queue = self.slots[RX].queue
        while self._buffers and queue is not None:
            queue.unpop(self._buffers.pop().chain)

    def restore(self, state: dict[str, object]) -> None:
        config = bytes(self.config)
        super().restore(state)
        self._transport_reset = True
        self._next_port = _random_port()
        self.config[:] = config  # a clone has a CID of its own; the guest asks for it again


def _random_port() -> int:
    """Where the host's ports begin. The guest of a restored machine, or of a copy, may still have
    connections of before, and would answer one from the same port with a reset."""
    return FIRST_PORT + int.from_bytes(os.urandom(4), "little") % FIRST_PORT


def _split(readable: list[memoryview]) -> tuple[memoryview, list[memoryview]]:
    """Header and data of a packet that is laid out in another way. The data is not copied: a
    hostile chain names much more memory than there is."""
    header, data = b"", []
    for view in readable:
        missing = HEADER_SIZE - len(header)
        if missing:
            header += view[:missing]
        if len(view) > missing:
            data.append(view[missing:])
    if len(header) < HEADER_SIZE:
        raise QueueError(f"a packet of {len(header)} bytes is shorter than its header")
    return memoryview(header), data


def _cut(data: list[memoryview], size: int) -> list[memoryview]:
    """The first `size` bytes of `data`."""
    if len(data) == 1 and len(data[0]) == size:
        return data
    cut: list[memoryview] = []
    left = size
    for view in data:
        if not left:
            break
        part = view[:left]
        cut.append(part)
        left -= len(part)
    if left:
        raise QueueError(f"a packet says {size} bytes and has {size - left}")
    return cut
