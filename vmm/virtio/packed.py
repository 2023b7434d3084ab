"""Packed virtqueues (virtio 1.2, section 2.8)."""

from __future__ import annotations

import struct

from vmm.errors import ShapeError
from vmm.virtio.queue import (
    BATCH_BUFFERS,
    BATCH_MAX,
    CHAIN_MAX,
    DESC,
    Chain,
    QueueError,
    VirtQueue,
    fence,
    need_event,
)
from vmm.virtio.spec import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    PACKED_DESC_F_AVAIL,
    PACKED_DESC_F_USED,
    QUEUE_SIZE_MAX,
    RING_EVENT_FLAGS_DESC,
    RING_EVENT_FLAGS_DISABLE,
    RING_EVENT_FLAGS_ENABLE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

_BOTH = PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED
_LEN_ID = struct.Struct("<IH")
_WRAP = 1 << 15


class PackedQueue(VirtQueue):
    """A packed virtqueue.

    Args:
        size: entries, 1 to 32768.
        desc, driver, device: GPAs of the descriptor ring and the two event suppression areas.

    Raises:
        QueueError: the ring is misplaced, or its size is none.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        driver: int,
        device: int,
        *,
        indirect: bool = False,
        event_idx: bool = False,
    ) -> None:
        super().__init__(memory, size, indirect=indirect, event_idx=event_idx)
        if not 0 < size <= QUEUE_SIZE_MAX:
            raise QueueError(f"a packed queue of {size} entries")
        self._desc = self._area("descriptor ring", desc, 16 * size, 16)
        self._flags = self._desc.cast("H")  # the flags of entry i are at 8 * i + 7
        self._driver = self._area("driver area", driver, 4, 4).cast("H")
        self._device = self._area("device area", device, 4, 4).cast("H")
        self._next_avail = 0
        self._avail_wrap = 1
        self._next_used = 0
        self._used_wrap = 1
        self._first: tuple[int, int] | None = None
        """Of what was pushed and not published: the flags' place, and the flags."""
        self._old = 0
        """Where the ring of used entries stood at the last `publish`, as position | wrap << 15."""

    def pop_batch(self, limit: int = BATCH_MAX) -> list[Chain]:
        if self.broken:
            return []
        chains: list[Chain] = []
        room = BATCH_BUFFERS
        while room > 0 and len(chains) < limit and self._available():
            chain = self._chain()
            chains.append(chain)
            room -= len(chain.readable) + len(chain.writable)
        if chains:
            self._device[1] = RING_EVENT_FLAGS_DISABLE
        return chains

    def _available(self) -> bool:
        flags = self._flags[8 * self._next_avail + 7] & _BOTH
        return flags == (PACKED_DESC_F_AVAIL if self._avail_wrap else PACKED_DESC_F_USED)

    def _chain(self) -> Chain:
        unpack, ring, size = DESC.unpack_from, self._desc, self.size
        at, count = self._next_avail, 0
        # Descriptors the driver may use: all but those that are not given back yet.
        free = self._next_used - at
        if self._avail_wrap == self._used_wrap:
            free += size
        chain = Chain(0)
        while True:
            addr, length, ident, flags = unpack(ring, at << 4)
            count += 1
            if count > free:
                raise self._bad("more descriptors made available than the ring has")
            if flags & DESC_F_INDIRECT:
                if count > 1:
                    raise self._bad("an indirect descriptor within a chain")
                table = self._indirect_table(addr, length, flags)
                for index in range(length >> 4):
                    addr, length, _, inner = unpack(table, index << 4)
                    self._no_nesting(inner)
                    self._buffer(chain, addr, length, inner & DESC_F_WRITE)
            else:
                self._buffer(chain, addr, length, flags)
            at += 1
            if at == size:
                at = 0
            if not flags & DESC_F_NEXT:
                break
            if count >= CHAIN_MAX:
                raise self._bad("a descriptor chain that loops or is too long")
        chain.head = ident
        chain.descriptors = count
        if at <= self._next_avail:
            self._avail_wrap ^= 1
        self._next_avail = at
        return chain

    def unpop(self, chain: Chain) -> None:
        self._next_avail -= chain.descriptors
        if self._next_avail < 0:
            self._next_avail += self.size
            self._avail_wrap ^= 1

    def push(self, chain: Chain, written: int = 0) -> None:
        at = self._next_used
        _LEN_ID.pack_into(self._desc, (at << 4) + 8, written, chain.head)
        flags = _BOTH if self._used_wrap else 0
        if written:
            flags |= DESC_F_WRITE
        if self._first is None:
            self._first = (8 * at + 7, flags)  # last, so that the driver sees the batch at once
        else:
            self._flags[8 * at + 7] = flags
        at += chain.descriptors
        if at >= self.size:
            at -= self.size
            self._used_wrap ^= 1
        self._next_used = at

    def publish(self) -> bool:
        if self._first is None:
            return False
        place, flags = self._first
        self._flags[place] = flags
        self._first = None
        old, self._old = self._old, self._next_used
        fence()
        wanted = self._driver[1] & 3
        if wanted == RING_EVENT_FLAGS_DISABLE:
            return False
        if wanted != RING_EVENT_FLAGS_DESC or not self.event_idx:
            return True
        event = self._driver[0]
        position = event & ~_WRAP
        if event >> 15 != self._used_wrap:
            position -= self.size
        new = self._next_used
        if new <= old:  # it has wrapped since
            old -= self.size
        return need_event(position & 0xFFFF, new & 0xFFFF, old & 0xFFFF)

    def rearm(self) -> bool:
        if self.broken:
            return False
        if self.event_idx:
            self._device[0] = self._next_avail | self._avail_wrap << 15
            self._device[1] = RING_EVENT_FLAGS_DESC
        else:
            self._device[1] = RING_EVENT_FLAGS_ENABLE
        fence()
        return self._available()

    def save(self) -> dict[str, object]:
        return {
            "next_avail": self._next_avail | self._avail_wrap << 15,
            "next_used": self._next_used | self._used_wrap << 15,
        }

    def restore(self, state: dict[str, object]) -> None:
        avail, used = state["next_avail"], state["next_used"]
        if not isinstance(avail, int) or not isinstance(used, int):
            raise ShapeError("state of a queue: its positions are not integers")
        if not (0 <= avail & ~_WRAP < self.size and 0 <= used & ~_WRAP < self.size):
            raise ShapeError("state of a queue: a position outside the ring")
        self._next_avail, self._avail_wrap = avail & ~_WRAP, avail >> 15 & 1
        self._next_used, self._used_wrap = used & ~_WRAP, used >> 15 & 1
        self._old = self._next_used
