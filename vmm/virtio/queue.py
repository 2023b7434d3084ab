"""What split and packed virtqueues have in common, and the chains that come out of them.

A queue belongs to one thread at a time: its device's. Nothing the driver writes is trusted. Every
index, address and length is checked against the ring and against guest memory before use; what
breaks a rule raises `QueueError`, upon which the device asks for a reset (DEVICE_NEEDS_RESET).

Ordering: the processors this runs on (x86) keep stores in order and loads in order. What remains,
a store before a later load, `fence` orders.
"""

from __future__ import annotations

import struct
from _thread import allocate_lock

from vmm.errors import GuestMemoryError, VmmError
from vmm.virtio.spec import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

DESC = struct.Struct("<QIHH")
"""addr, len, flags, next (split); addr, len, id, flags (packed)."""
CHAIN_MAX = 1024
"""Descriptors in one chain: IOV_MAX, so that a chain is always one preadv(2)."""
BATCH_MAX = 64
"""Chains taken from a queue at once."""
BATCH_BUFFERS = 2048
"""Buffers in them after which no other chain is taken: some 3 ms. Other machines of this process
wait while it makes them, and while it collects them as garbage."""

_fence_lock = allocate_lock()


def fence() -> None:
    """A full memory barrier: taking a lock is a LOCKed instruction on x86."""
    with _fence_lock:
        pass


class QueueError(VmmError):
    """The driver broke a rule of the specification."""


class Chain:
    """One request: the buffers of a descriptor chain, as views of guest memory.

    Attributes:
        head: what `push` gives back to the driver: the head's index, or the buffer id.
        readable: for the device to read, in order.
        writable: for the device to write, in order.
        descriptors: how many ring slots it takes (packed ring).
    """

    __slots__ = ("descriptors", "head", "readable", "writable")

    def __init__(self, head: int) -> None:
        self.head = head
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.descriptors = 1

    def readable_size(self) -> int:
        """Bytes the device may read."""
        return sum(map(len, self.readable))

    def writable_size(self) -> int:
        """Bytes the device may write."""
        return sum(map(len, self.writable))

    def read(self) -> bytes:
        """A copy of all the driver wrote."""
        return b"".join(self.readable)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Copy `data` into the writable buffers, as far as they go; the bytes written."""
        done, size = 0, len(data)
        source = memoryview(data)
        for view in self.writable:
            if done >= size:
                break
            part = min(len(view), size - done)
            view[:part] = source[done : done + part]
            done += part
        return done


class VirtQueue:
    """Common part of `SplitQueue` and `PackedQueue`.

    A device's loop over a queue that was notified:

        while True:
            for chain in queue.pop_batch():
                ...
                queue.push(chain, written)
            if queue.publish():
                interrupt()
            if not queue.rearm():
                break

    Attributes:
        size: entries.
        indirect, event_idx: VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX were negotiated.
        broken: a `QueueError` was raised; nothing more comes out.
    """

    def __init__(self, memory: GuestMemory, size: int, *, indirect: bool, event_idx: bool) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.broken = False
        self.indirect = indirect
        low = memory.regions[0]
        self._low = low.data
        self._low_size = low.size

    def pop_batch(self, limit: int = BATCH_MAX) -> list[Chain]:
        """Up to `limit` chains the driver has made available, fewer where they are long; none where
        there are none. Raises `QueueError`."""
        raise NotImplementedError

    def push(self, chain: Chain, written: int = 0) -> None:
        """Give a chain back, `written` bytes into its writable part; seen after `publish`."""
        raise NotImplementedError

    def publish(self) -> bool:
        """Let the driver see what was pushed; whether it wants an interrupt."""
        raise NotImplementedError

    def rearm(self) -> bool:
        """Ask for a notify when there is more; True if there already is (then take it first)."""
        raise NotImplementedError

    def unpop(self, chain: Chain) -> None:
        """Put the chain popped last back: it comes out again. Not after a later pop."""
        raise NotImplementedError

    def save(self) -> dict[str, object]:
        """Indices and wrap counters, as plain data."""
        raise NotImplementedError

    def restore(self, state: dict[str, object]) -> None:
        """Take over what `save` gave."""
        raise NotImplementedError

    def _area(self, what: str, gpa: int, size: int, align: int) -> memoryview:
        """A part of the ring in guest memory."""
        if gpa % align:
            raise QueueError(f"{what} at {gpa:#x} is not aligned to {align} bytes")
        try:
            return self.memory.view(gpa, size)
        except GuestMemoryError:
            raise self._bad(f"{what} at {gpa:#x} is outside guest memory") from None

    def _bad(self, message: str) -> QueueError:
        self.broken = True
        return QueueError(message)

    def _buffer(self, chain: Chain, addr: int, length: int, flags: int) -> None:
        """Add one buffer to `chain`; every check a descriptor needs."""
        if not length:
            raise self._bad(f"descriptor at {addr:#x} has length 0")
        end = addr + length
        if end <= self._low_size:
            view = self._low[addr:end]
        else:
            try:
                view = self.memory.view(addr, length)
            except GuestMemoryError:
                raise self._bad(
                    f"descriptor {addr:#x}+{length:#x} is outside guest memory"
                ) from None
        if flags & DESC_F_WRITE:
            chain.writable.append(view)
        elif chain.writable:
            raise self._bad("a readable descriptor follows a writable one")
        else:
            chain.readable.append(view)

    def _indirect_table(self, addr: int, length: int, flags: int) -> memoryview:
        """The table an indirect descriptor points to (2.7.5.3, 2.8.8)."""
        if not self.indirect:
            raise self._bad("an indirect descriptor, which was not negotiated")
        if flags & DESC_F_NEXT:
            raise self._bad("an indirect descriptor with NEXT")
        if not length or length % DESC.size:
            raise self._bad(f"an indirect table of {length} bytes")
        if length > CHAIN_MAX * DESC.size:
            raise self._bad(f"an indirect table of more than {CHAIN_MAX} entries")
        try:
            return self.memory.view(addr, length)
        except GuestMemoryError:
            raise self._bad(f"an indirect table at {addr:#x}, outside guest memory") from None

    def _no_nesting(self, flags: int) -> None:
        if flags & DESC_F_INDIRECT:
            raise self._bad("an indirect descriptor within an indirect table")


def need_event(event: int, new: int, old: int) -> bool:
    """vring_need_event() of the specification (2.7.7.1): whether going from `old` to `new`
    passes `event`, all modulo 2**16."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
