"""Disks by the C kernel: reads the page cache holds, buffered writes, and the disk's name."""

from __future__ import annotations

from vmm import priority
from vmm.block.raw import RawImage
from vmm.virtio import kernel, spec
from vmm.virtio.device import Interrupted
from vmm.virtio.queue import QueueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.virtio.blk import Block
    from vmm.virtio.device import QueueSlot
    from vmm.virtio.queue import VirtQueue


class DiskKernel:
    """Serves queues of `device`, where a raw image is all that is behind it."""

    def __init__(self, device: Block) -> None:
        ffi, lib = kernel.library()
        self._device = device
        self._function = lib.vmm_disk_serve
        self._disk: Any = ffi.new("struct vmm_disk *")
        self.resized()
        self._disk.id = device.serial

    def resized(self) -> None:
        """The device's capacity is another; while no queue is served."""
        self._disk.capacity = self._device.capacity

    def serve(self, index: int) -> bool:
        """As `VirtioDevice.notify`; False: nothing was done, the queue or disk is not for this."""
        device = self._device
        slot = device.slots[index]
        left = True
        while left:
            with slot.lock:
                queue, image = slot.queue, device.image
                if queue is None or not device.status & spec.DRIVER_OK:
                    return True
                ring = kernel.ring(device.memory, slot, kernel.POLL_MAX)
                if ring is None or type(image) is not RawImage or image.direct:
                    return False
                self._disk.fd = image.fd
                self._disk.readable = True
                left = False
                try:
                    left = self._go_on(index, slot, queue)
                except Interrupted:
                    if queue.publish():
                        device.interrupt(index)
                except QueueError as err:
                    if queue.publish():
                        device.interrupt(index)
                    device.needs_reset(f"queue {index}: {err}")
            if left:
                priority.give_way()
        return device.faults is None  # else: they have come meanwhile, and must meet the rest

    def _go_on(self, index: int, slot: QueueSlot, queue: VirtQueue) -> bool:
        """Serve the queue until it is empty; True: it is left, because somebody goes first."""
        device, disk, ring = self._device, self._disk, slot.kernel
        assert ring is not None
        while not device.quiet and not queue.broken and device.faults is None:
            disk.writable = device.buffers_writes
            what = ring.serve(self._function, disk)
            if what & kernel.INTERRUPT:
                device.interrupt(index)
                what &= ~kernel.INTERRUPT
            if what == kernel.IDLE:
                return False
            if what == kernel.OTHER:
                chains = queue.pop_batch(1)
                if chains:
                    device.requests(index, queue, chains)
                    if queue.publish():
                        device.interrupt(index)
                elif not queue.rearm():
                    return False
            if priority.wanted:
                return True
        return False


def make(device: Block) -> DiskKernel | None:
    """None where there is no library."""
    return DiskKernel(device) if kernel.library() is not None else None
