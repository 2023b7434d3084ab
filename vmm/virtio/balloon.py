"""The memory balloon (virtio 1.2, section 5.5): guest memory goes back to the host, on request.

Pages in the balloon, and free pages the guest reports, are given back at once (`Region.discard`);
the next access to one finds a page of zeroes. So nothing has to be done to let the balloon out, and
a page the guest takes back without a word is its own again.
"""

from __future__ import annotations

import struct
from _thread import allocate_lock

from vmm.errors import ShapeError, StateError, UsageError
from vmm.kvm.ffi import address_of
from vmm.layout import PAGE_SIZE
from vmm.virtio import spec
from vmm.virtio.device import Interrupted, VirtioDevice
from vmm.virtio.queue import QueueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from threading import Event

    from vmm.memory import Region
    from vmm.virtio.queue import Chain, VirtQueue

F_STATS_VQ, F_DEFLATE_ON_OOM, F_PAGE_REPORTING = 1, 2, 5
CONFIG = struct.Struct("<IIII")
"""num_pages, actual, free_page_hint_cmd_id, poison_val."""
ACTUAL = 4
PFNS_MAX = 1 << 18
"""Page numbers in one request: 1 GiB; Linux sends 256."""
STATS_MAX = 64
SLICE = 16 << 20
"""Bytes given back by one system call, some milliseconds where all of them are in use: Python runs
no other thread of this process meanwhile (mmap.madvise keeps the interpreter's lock)."""
SORTED = 4096
"""Page numbers that are put in order at once: sorting keeps the lock, too."""
INFLATE, DEFLATE, STATS, REPORTING = "inflate", "deflate", "stats", "reporting"
TAGS = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory",
    "available_memory", "disk_caches", "hugetlb_allocations", "hugetlb_failures",
)  # fmt: skip
"""VIRTIO_BALLOON_S_*, in bytes or events since the guest started (5.5.6.3)."""
_STAT = struct.Struct("<HQ")


class Balloon(VirtioDevice):
    """A balloon, empty at first.

    Attributes:
        given_back: bytes given to the host so far, by inflating and by reports.
    """

    ID = spec.ID_BALLOON
    FEATURES = spec.bits(F_STATS_VQ, F_DEFLATE_ON_OOM, F_PAGE_REPORTING)
    QUEUES = (128, 128, 8, 64)

    def __init__(self, name: str = "balloon", size: int = 0) -> None:
        super().__init__(name)
        self.config[:] = CONFIG.pack(size // PAGE_SIZE, 0, 0, 0)
        self.given_back = 0
        self._told_of_failure = False
        self._stats: dict[str, int] = {}
        self._stats_chain: tuple[int, VirtQueue, Chain] | None = None
        self._waiters: list[Event] = []
        self._waiters_lock = allocate_lock()

    # --- for the person ---------------------------------------------------------------------------

    def target(self, size: int) -> None:
        """Have the guest put `size` bytes into the balloon: fewer than now lets memory out.

        The guest does it in its own time, see `actual`; it takes memory back by itself rather than
        run out of it. From any thread.
        """
        if not 0 <= size <= self.memory.size:
            raise UsageError(
                f"balloon of {size} bytes: not from 0 to the machine's {self.memory.size}"
            )
        struct.pack_into("<I", self.config, 0, size // PAGE_SIZE)
        self.config_changed()

    @property
    def wanted(self) -> int:
        """Bytes `target` was given, in whole pages."""
        return int(CONFIG.unpack_from(self.config)[0]) * PAGE_SIZE

    @property
    def actual(self) -> int:
        """Bytes in the balloon, as the guest's driver says."""
        return int(CONFIG.unpack_from(self.config)[1]) * PAGE_SIZE

    def stats(self, timeout: float = 10.0) -> dict[str, int]:
        """What the guest says of its memory now; keys of `TAGS`, as far as it knows them.

        Raises:
            StateError: it has no driver that tells.
            TimeoutError: it did not answer within `timeout` seconds.
        """
        import threading

        if not self.status & spec.DRIVER_OK or not self.has(F_STATS_VQ):
            raise StateError("balloon statistics: the guest has no driver that gives them")
        waiter = threading.Event()
        with self._waiters_lock:
            self._waiters.append(waiter)
        self._ask()
        if not waiter.wait(timeout):
            with self._waiters_lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            raise TimeoutError(f"balloon statistics: no answer within {timeout:g} s")
        return dict(self._stats)

    def _ask(self) -> None:
        """Give the driver its statistics buffer, for new ones; not if it has it already."""
        with self.slots[2].lock:
            held, self._stats_chain = self._stats_chain, None
            if held is not None:
                self.finish(*held, 0)

    # --- queues -----------------------------------------------------------------------------------

    def role(self, index: int) -> str:
        """What queue `index` is: those of features that were not negotiated are not counted."""
        roles = [INFLATE, DEFLATE]
        if self.has(F_STATS_VQ):
            roles.append(STATS)
        if self.has(F_PAGE_REPORTING):
            roles.append(REPORTING)
        return roles[index] if index < len(roles) else ""

    def request(self, index: int, chain: Chain) -> int | None:
        role = self.role(index)
        if role == INFLATE:
            self._inflate(chain)
        elif role == REPORTING:
            self._reported(chain)
        elif role == STATS:
            return self._told(index, chain)
        return 0

    def _inflate(self, chain: Chain) -> None:
        size = chain.readable_size()
        if size > 4 * PFNS_MAX:
            raise QueueError(f"{size} bytes of page numbers, more than {4 * PFNS_MAX}")
        numbers = memoryview(chain.read()[: size & ~3]).cast("I")
        for at in range(0, len(numbers), SORTED):
            for first, count in runs(numbers[at : at + SORTED]):
                self._discard(first * PAGE_SIZE, count * PAGE_SIZE)

    def _discard(self, gpa: int, size: int) -> None:
        """Give back what of it is RAM."""
        end = gpa + size
        for region in self.memory.regions:
            low, high = max(gpa, region.gpa), min(end, region.end)
            if low < high:
                self._give(region, low - region.gpa, high - low)

    def _give(self, region: Region, offset: int, size: int) -> None:
        """Give it back, SLICE bytes at once. Raises Interrupted."""
        end = offset + size
        while offset < end:
            if self.quiet:  # what was given back may be given back again
                raise Interrupted
            part = min(SLICE - offset % SLICE, end - offset)
            self._give_slice(region, offset, part)
            offset += part

    def _give_slice(self, region: Region, offset: int, size: int) -> None:
        try:
            self.given_back += region.discard(offset, size)
        except OSError as err:  # locked pages, for one: they stay, which the guest need not know
            if not self._told_of_failure and self.on_error is not None:
                self.on_error(f"{self.name}: memory cannot be given back: {err.strerror}")
            self._told_of_failure = True

    def _reported(self, chain: Chain) -> None:
        """Free pages: they are the buffers themselves (5.5.6.7)."""
        for view in chain.writable:
            at = address_of(view)
            for region in self.memory.regions:
                if region.hva <= at < region.hva + region.size:
                    self._give(region, at - region.hva, len(view))

    def _told(self, index: int, chain: Chain) -> int | None:
        """Statistics: the buffer is kept until there is a wish for new ones."""
        queue = self.slots[index].queue
        assert queue is not None
        data = chain.read() if chain.readable_size() <= STATS_MAX * _STAT.size else b""
        whole = len(data) - len(data) % _STAT.size
        self._stats = {
            TAGS[tag]: value for tag, value in _STAT.iter_unpack(data[:whole]) if tag < len(TAGS)
        }
        if self._stats_chain is not None:
            return 0  # it has one too many
        self._stats_chain = (index, queue, chain)
        with self._waiters_lock:
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.set()
        return None

    def config_written(self, offset: int, data: bytes) -> None:
        if ACTUAL <= offset and offset + len(data) <= ACTUAL + 4:
            self.config[offset : offset + len(data)] = data

    # --- life and state ---------------------------------------------------------------------------

    CONFIG_STATE = ((0, ACTUAL + 4),)

    def restore(self, state: dict[str, object]) -> None:
        super().restore(state)
        if self.wanted > self.memory.size:
            raise ShapeError(f"state of {self.name}: a balloon of {self.wanted} bytes")

    def stopped(self) -> None:
        self._stats_chain = None
        struct.pack_into("<I", self.config, ACTUAL, 0)

    def queue_stopped(self, index: int) -> None:
        if self._stats_chain is not None and self._stats_chain[0] == index:
            self._stats_chain = None

    def give_back(self) -> None:
        held, self._stats_chain = self._stats_chain, None
        if held is not None:
            held[1].unpop(held[2])  # comes out again, with what it says


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """`numbers` as runs of adjacent ones, (first, count), in order, each once."""
    first = last = -2
    for number in sorted(numbers):
        if number > last + 1:
            if last >= 0:
                yield first, last - first + 1
            first = number
        last = number
    if last >= 0:
        yield first, last - first + 1
