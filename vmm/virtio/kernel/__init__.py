"""The C kernel for virtqueues, optional: plain requests of a batch without Python objects.

A device hands its split queue to one of the kernel's functions (`serve`), which takes chain after
chain, carries out what is plain, and returns when something is not: a chain it leaves in the ring,
untouched, for the Python that is there anyway. So what is wrong is judged in one place, and without
the library (no compiler at build time) everything is as it was, only slower.

Of a disk the kernel looks at an empty ring for as long as that has lately been worth it, POLL_MAX
at most, before it asks for the next notify: the guest needs no exit to get a request seen then.
"""

from __future__ import annotations

import os

from vmm.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.memory import GuestMemory
    from vmm.virtio.device import QueueSlot
    from vmm.virtio.split import SplitQueue

IDLE, MORE, OTHER, WAIT, HELD = range(5)
INTERRUPT, RECEIVED = 16, 8
"""What the functions return, see kernel.h."""
POLL_MAX = 32_000
"""Nanoseconds; QEMU's choice for iothreads."""
SHARED = ("struct vmm_ring", "struct vmm_disk", "struct vmm_net")

_loaded: list[Any] = []


def library() -> Any:
    """(ffi, lib), or None where there is no library."""
    if not _loaded:
        _loaded.append(_load())
    return _loaded[0]


def _load() -> Any:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_kernel.so")
    try:
        from vmm.virtio.kernel._abi import ffi

        lib = ffi.dlopen(path)
    except (ImportError, OSError):
        return None
    if lib.vmm_sizes() != sum(map(ffi.sizeof, SHARED)):
        return None  # of another version
    return ffi, lib


def only_split(features: int) -> int:
    """`features` as a driver is to see them where the kernel serves the device: it knows no packed
    rings, which a driver would prefer."""
    return features if library() is None else features & ~(1 << spec.F_RING_PACKED)


class KernelRing:
    """A split queue as the kernel sees it, made from `slot`, whose queue it is."""

    __slots__ = ("_queue", "_ring")

    def __init__(self, memory: GuestMemory, slot: QueueSlot, queue: SplitQueue, poll: int) -> None:
        ffi, _ = library()
        ring = self._ring = ffi.new("struct vmm_ring *")
        self._queue = queue
        size = queue.size
        ring.desc = ffi.cast("uint8_t *", memory.hva(slot.desc, 16 * size))
        ring.avail = ffi.cast("uint16_t *", memory.hva(slot.driver, 6 + 2 * size))
        ring.used = ffi.cast("uint16_t *", memory.hva(slot.device, 6 + 8 * size))
        ring.size = size
        ring.indirect, ring.event_idx = queue.indirect, queue.event_idx
        ring.regions = len(memory.regions)
        for place, region in zip(ring.region, memory.regions, strict=False):
            place.gpa, place.size = region.gpa, region.size
            place.host = ffi.cast("uint8_t *", region.hva)
        ring.poll_max = poll

    def serve(self, function: Any, argument: Any) -> int:
        """Have the kernel go on with the queue; what it returned."""
        what: int = function(self.begin(), argument)
        self.end()
        return what

    def begin(self) -> Any:
        """The `struct vmm_ring *`, as the queue is now."""
        ring = self._ring
        ring.last_avail, ring.next_used, ring.published = self._queue.position
        return ring

    def end(self) -> None:
        """The queue is as the kernel has left the ring."""
        ring = self._ring
        self._queue.position = ring.last_avail, ring.next_used, ring.published


def ring(memory: GuestMemory, slot: QueueSlot, poll: int = 0) -> KernelRing | None:
    """The ring of `slot` for the kernel; None where it knows no such rings. Under its lock.

    `poll`: nanoseconds it may look at the ring while that is empty.
    """
    if slot.kernel is None:
        from vmm.virtio.split import SplitQueue

        if type(slot.queue) is not SplitQueue:
            return None
        slot.kernel = KernelRing(memory, slot, slot.queue, poll)
    return slot.kernel
