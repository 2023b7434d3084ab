"""Sending: chains of the guest's to a port, a frame each, its virtio-net header before it."""

from __future__ import annotations

from vmm.net.port import LinkLost
from vmm.virtio import net_spec as n
from vmm.virtio import spec
from vmm.virtio.queue import QueueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.net.port import Port
    from vmm.virtio.net import Nic
    from vmm.virtio.queue import Chain, VirtQueue

BATCH = 64
"""Frames before others get the lock."""
SEND_MIN = n.HEADER_SIZE + n.FRAME_MIN
SEND_MAX = n.HEADER_SIZE + n.FRAME_MAX


class Sender:
    """The transmit side of queue pair `pair`; all of it under the lock of its queue's slot."""

    def __init__(self, device: Nic, pair: int) -> None:
        self._device = device
        self._pair = pair
        self._index = 2 * pair + 1
        self._slot = device.slots[self._index]

    def serve(self, frames: int = BATCH) -> bool:
        """Send what is there, `frames` at most; whether there is more to do at once."""
        device, port = self._device, self._device.ports[self._pair]
        with self._slot.lock:
            queue = self._slot.queue
            if queue is None or device.quiet or not device.status & spec.DRIVER_OK:
                return False
            if port.blocked:
                return False
            try:
                return self._serve(queue, port, frames)
            except QueueError as err:
                device.needs_reset(f"queue {self._index}: {err}")
                return False
            finally:
                if queue.publish():
                    device.interrupt(self._index)

    def _serve(self, queue: VirtQueue, port: Port, frames: int) -> bool:
        device = self._device
        chains = queue.pop_batch(frames)
        if not chains:
            return queue.rearm()
        if device.limits is not None and device.limits.tx.active:
            chains = device.limits.admit(self._index, queue, chains)
            if not chains:
                return False  # until there is budget
        self._send(queue, port, chains)
        return not port.blocked

    def _send(self, queue: VirtQueue, port: Port, chains: list[Chain]) -> None:
        """Send frames; those there is no room or no time for go back into the queue."""
        device, write, push = self._device, port.write, queue.push
        usable = device.link_up and self._pair < device.pairs
        done = 0
        try:
            for chain in chains:
                if device.quiet:
                    break
                views = chain.readable
                size = len(views[0]) if len(views) == 1 else sum(map(len, views))
                push(chain)
                done += 1
                if not SEND_MIN <= size <= SEND_MAX:
                    port.dropped += 1
                elif usable and not write(views):
                    break
            port.flush()
        except LinkLost as err:
            device.lost(self._pair, err)
        for chain in reversed(chains[done:]):
            queue.unpop(chain)
            if device.limits is not None:
                device.limits.tx.spend(-frame_size(chain), -1)


def frame_size(chain: Chain) -> int:
    """Bytes of the frame in a transmitted chain, without its header."""
    return min(max(chain.readable_size() - n.HEADER_SIZE, 0), n.FRAME_MAX)
