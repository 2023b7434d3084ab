"""Split virtqueues (virtio 1.2, section 2.7)."""

from __future__ import annotations

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
    AVAIL_F_NO_INTERRUPT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    USED_F_NO_NOTIFY,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory


class SplitQueue(VirtQueue):
    """A split virtqueue.

    Args:
        size: entries, a power of two up to 32768.
        desc, avail, used: GPAs of the descriptor table, the driver area and the device area.
        indirect, event_idx: negotiated features.

    Raises:
        QueueError: the ring is misplaced, or its size is none.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        indirect: bool = False,
        event_idx: bool = False,
    ) -> None:
        super().__init__(memory, size, indirect=indirect, event_idx=event_idx)
        if size <= 0 or size & (size - 1):
            raise QueueError(f"a split queue of {size} entries (not a power of two)")
        self._mask = size - 1
        self._desc = self._area("descriptor table", desc, 16 * size, 16)
        self._avail = self._area("driver area", avail, 6 + 2 * size, 2).cast("H")
        device_area = self._area("device area", used, 6 + 8 * size, 4)
        self._used = device_area.cast("H")
        self._ring = device_area[4 : 4 + 8 * size].cast("I")
        self._used_event = 2 + size  # in _avail
        self._avail_event = 2 + 4 * size  # in _used
        self._last_avail = 0
        self._next_used = 0
        self._published = 0

    def pop_batch(self, limit: int = BATCH_MAX) -> list[Chain]:
        if self.broken:
            return []
        avail = self._avail
        last = self._last_avail
        ready = (avail[1] - last) & 0xFFFF
        if not ready:
            return []
        # With those that are not given back yet: each takes a descriptor at least.
        taken = ready + ((last - self._next_used) & 0xFFFF)
        if taken > self.size:
            raise self._bad(f"{taken} chains made available, in a queue of {self.size}")
        if ready > limit:
            ready = limit
        if not self.event_idx:
            self._used[0] = USED_F_NO_NOTIFY
        mask = self._mask
        chains = []
        room = BATCH_BUFFERS
        for _ in range(ready):
            chain = self._chain(avail[2 + (last & mask)])
            chains.append(chain)
            last = (last + 1) & 0xFFFF
            self._last_avail = last
            room -= len(chain.readable) + len(chain.writable)
            if room <= 0:
                break
        return chains

    def _chain(self, head: int) -> Chain:
        unpack, table, limit = DESC.unpack_from, self._desc, self.size
        chain = Chain(head)
        index, count, total, indirect = head, 0, 0, False
        while True:
            if index >= limit:
                raise self._bad(f"descriptor index {index} in a table of {limit}")
            addr, length, flags, following = unpack(table, index << 4)
            if flags & DESC_F_INDIRECT:
                if indirect:
                    self._no_nesting(flags)
                table = self._indirect_table(addr, length, flags)
                limit, index, indirect = length >> 4, 0, True
                count = 0
                continue
            self._buffer(chain, addr, length, flags)
            if not flags & DESC_F_NEXT:
                return chain
            count += 1
            total += 1
            if count >= limit or total >= CHAIN_MAX:
                raise self._bad("a descriptor chain that loops or is too long")
            index = following

    def take_over(self, heads: list[int]) -> list[Chain]:
        """Go on where another one has left the ring, which had taken `heads` and not given them
        back: those chains. Raises `QueueError`."""
        self._next_used = self._published = used = self._used[1]
        self._last_avail = (used + len(heads)) & 0xFFFF
        return [self._chain(head) for head in heads]

    def unpop(self, chain: Chain) -> None:
        self._last_avail = (self._last_avail - 1) & 0xFFFF

    def push(self, chain: Chain, written: int = 0) -> None:
        at = (self._next_used & self._mask) << 1
        ring = self._ring
        ring[at] = chain.head
        ring[at + 1] = written
        self._next_used = (self._next_used + 1) & 0xFFFF

    def publish(self) -> bool:
        new, old = self._next_used, self._published
        if new == old:
            return False
        self._used[1] = new
        self._published = new
        fence()
        if self.event_idx:
            return need_event(self._avail[self._used_event], new, old)
        return not self._avail[0] & AVAIL_F_NO_INTERRUPT

    def rearm(self) -> bool:
        if self.broken:
            return False
        if self.event_idx:
            self._used[self._avail_event] = self._last_avail
        else:
            self._used[0] = 0
        fence()
        return self._avail[1] != self._last_avail

    @property
    def position(self) -> tuple[int, int, int]:
        """Indices, modulo 2**16, for who goes on with the ring in our place, and back (see
        vmm.virtio.kernel): the next in the driver area and in the device area, the last shown."""
        return self._last_avail, self._next_used, self._published

    @position.setter
    def position(self, indices: tuple[int, int, int]) -> None:
        self._last_avail, self._next_used, self._published = indices

    def save(self) -> dict[str, object]:
        return {"last_avail": self._last_avail, "next_used": self._next_used}

    def restore(self, state: dict[str, object]) -> None:
        last, used = state["last_avail"], state["next_used"]
        if not isinstance(last, int) or not isinstance(used, int):
            raise ShapeError("state of a queue: its indices are not integers")
        self._last_avail = last & 0xFFFF
        self._next_used = self._published = used & 0xFFFF
