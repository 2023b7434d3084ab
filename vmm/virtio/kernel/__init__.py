"""The C kernel for virtqueues, optional: plain requests of a batch without Python objects.

A device hands its split queue to one of the kernel's functions (`serve`), which takes chain after
chain, carries out what is plain, and returns when something is not: a chain it leaves in the ring,
untouched, for the Python that is there anyway. So what is wrong is judged in one place, and without
the library (no compiler at build time) everything is as it was, only slower.

The kernel looks at an empty ring for as long as that has lately been worth it, POLL_MAX at most,
before it asks for the next notify: the guest then needs no exit to get its next request seen.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.memory import GuestMemory
    from vmm.virtio.device import QueueSlot
    from vmm.virtio.split import SplitQueue

IDLE, MORE, OTHER, WAIT, HELD = range(5)
INTERRUPT = 16
"""What the functions return, see kernel.h."""
POLL_MAX = 32_000
"""Nanoseconds; QEMU's choice for iothreads."""
SHARED = ("struct vmm_ring", "struct vmm_disk", "struct vmm_receive")

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


class KernelRing:
    """A split queue as the kernel sees it, made from `slot`, whose queue it is."""

    __slots__ = ("_queue", "_ring")

    def __init__(self, memory: GuestMemory, slot: QueueSlot, queue: SplitQueue) -> None:
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
        ring.poll_max = POLL_MAX

    def serve(self, function: Any, argument: Any) -> int:
        """Have the kernel go on with the queue; what it returned."""
        ring, queue = self._ring, self._queue
        ring.last_avail, ring.next_used, ring.published = queue.position
        what: int = function(ring, argument)
        queue.position = ring.last_avail, ring.next_used, ring.published
        return what


def ring(memory: GuestMemory, slot: QueueSlot) -> KernelRing | None:
    """The ring of `slot` for the kernel; None where it knows no such rings. Under its lock."""
    if slot.kernel is None:
        from vmm.virtio.split import SplitQueue

        if type(slot.queue) is not SplitQueue:
            return None
        slot.kernel = KernelRing(memory, slot, slot.queue)
    return slot.kernel
