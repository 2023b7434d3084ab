"""Receiving: frames from a port into the buffers the driver gave.

A frame is read straight into guest memory, into as many buffers as the largest one may need
(VIRTIO_NET_F_MRG_RXBUF), or into one. What does not fit goes into a spill buffer of ours.
"""

from __future__ import annotations

from collections import deque

from vmm.net.port import collect
from vmm.virtio import net_spec as n
from vmm.virtio import spec
from vmm.virtio.queue import CHAIN_MAX, QueueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.net.port import Port
    from vmm.virtio.net import Nic
    from vmm.virtio.queue import Chain, VirtQueue

BATCH = 64
"""Frames before the driver is interrupted, and others get the lock."""
VIEWS_MAX = CHAIN_MAX - 1
"""In one readv(2), with the spill buffer one more."""
_START = 18
"""Bytes of a frame that the filter looks at."""

NOTHING = 0
"""What to wait for: only to be woken (the guest's driver is not there, or gives no buffers)."""
FRAMES = 1
"""Frames on the port."""
MORE = 2
"""Not to wait: there is more to do."""
LATER = 3
"""For `wait` seconds: the limit is reached."""


class Receiver:
    """The receive side of queue pair `pair`; all of it under the lock of its queue's slot."""

    def __init__(self, device: Nic, pair: int, port: Port) -> None:
        self._device = device
        self.port = port
        self._pair = pair
        self._index = 2 * pair
        self._slot = device.slots[2 * pair]
        self._spill = memoryview(bytearray(n.HEADER_SIZE + n.FRAME_MAX))
        self._spare: deque[Chain] = deque()
        self._held = b""
        self.dropped = 0
        self.wait = 0.0
        self.forget()

    def forget(self) -> None:
        """The queue is gone, with the buffers taken from it."""
        self._spare.clear()
        self._chains: deque[Chain] = deque()
        self._views: list[memoryview] = []
        self._size = 0
        self._held = b""

    def give_back(self) -> None:
        """Put the buffers taken back into the queue, as for a snapshot."""
        queue = self._slot.queue
        if queue is not None:
            for chain in reversed((*self._chains, *self._spare)):
                queue.unpop(chain)
        held = self._held
        self.forget()
        self._held = held

    def serve(self, frames: int = BATCH) -> int:
        """Deliver what is there, `frames` at most; NOTHING, FRAMES, MORE or LATER."""
        device, slot = self._device, self._slot
        with slot.lock:
            queue = slot.queue
            if queue is None or device.quiet or not device.status & spec.DRIVER_OK:
                return NOTHING
            if self._pair >= device.pairs:
                return NOTHING
            try:
                return self._serve(queue, frames)
            except QueueError as err:
                device.needs_reset(f"queue {self._index}: {err}")
                return NOTHING
            finally:
                if queue.publish():
                    device.interrupt(self._index)

    def spare(self) -> bool:
        """Put the buffers taken back for the C kernel; whether it may receive now."""
        if self._held:
            return False
        if self._chains or self._spare:
            self.give_back()
        return True

    def hold(self, frame: bytes) -> None:
        """Deliver `frame` first, its header before it."""
        self._held = frame

    def _serve(self, queue: VirtQueue, frames: int) -> int:
        device, port = self._device, self.port
        if not device.link_up:
            self._held = b""
            return MORE if port.read([self._spill]) else FRAMES
        merge, need = device.mergeable, device.receive_size
        limit = None if device.limits is None or not device.limits.rx.active else device.limits.rx
        for _ in range(frames):
            if self._held:
                if not self._gather(queue, len(self._held) if merge else 1):
                    if self._held and not self._hopeless(queue):
                        return NOTHING
                    continue
                size = self._unhold()
            else:
                if not self._gather(queue, need if merge else 1) and not self._views:
                    if queue.rearm():
                        continue
                    return NOTHING
                if limit is not None:
                    self.wait = limit.ready()
                    if self.wait:
                        return LATER
                size = port.read([*self._views[:VIEWS_MAX], self._spill])
                if not size:
                    return FRAMES
                if limit is not None:
                    limit.spend(size - n.HEADER_SIZE)
            self._deliver(queue, size)
        return MORE

    def _gather(self, queue: VirtQueue, need: int) -> bool:
        """Have buffers for `need` bytes; False: all there are is less."""
        spare = self._spare
        while self._size < need:
            if not spare:
                spare.extend(queue.pop_batch(BATCH))
                if not spare:
                    return False
            chain = spare.popleft()
            self._chains.append(chain)
            self._views += chain.writable
            self._size += chain.writable_size()
            if not chain.writable:
                raise QueueError("a receive buffer the device cannot write")
        return True

    def _hopeless(self, queue: VirtQueue) -> bool:
        """Whether no buffers will ever do for what is held; drops it then. Asks for a notify."""
        if len(self._chains) >= queue.size:
            self._held = b""
            self.dropped += 1
            return True
        return queue.rearm()

    def _unhold(self) -> int:
        """Copy the frame held into the buffers."""
        held, done = memoryview(self._held), 0
        for view in (*self._views, self._spill):
            part = min(len(view), len(held) - done)
            view[:part] = held[done : done + part]
            done += part
        self._held = b""
        return done

    def _deliver(self, queue: VirtQueue, size: int) -> None:
        """A frame of `size` bytes, with its header, is in the views: give it to the driver."""
        device, views, chains = self._device, self._views, self._chains
        first = views[0]
        if len(first) < n.HEADER_SIZE + _START or len(views) > VIEWS_MAX:
            self._deliver_slowly(queue, size)
            return
        if size > self._size:
            self._overflow(size)
            return
        if size < n.HEADER_SIZE + n.FRAME_MIN or (
            not device.filter.promiscuous and not device.filter.takes(first[12:30])
        ):
            self.dropped += 1
            return
        if not device.checksums:
            first[0] = 0
        left, count = size, 0
        while True:
            chain = chains.popleft()
            room = chain.writable_size()
            del views[: len(chain.writable)]
            self._size -= room
            count += 1
            if left <= room:
                queue.push(chain, left)
                break
            queue.push(chain, room)
            left -= room
        first[n.NUM_BUFFERS] = count & 0xFF
        first[n.NUM_BUFFERS + 1] = count >> 8

    def _overflow(self, size: int) -> None:
        """The frame did not fit: wait for more buffers, or drop it where one must do."""
        if self._device.mergeable:
            self._held = bytes(collect([*self._views, self._spill], size))
        else:
            self.dropped += 1

    def _deliver_slowly(self, queue: VirtQueue, size: int) -> None:
        """As `_deliver`, for buffers cut into unusual pieces: by way of a copy."""
        device = self._device
        frame = memoryview(collect([*self._views[:VIEWS_MAX], self._spill], size))
        if size > self._size:
            if device.mergeable:
                self._held = bytes(frame)
            else:
                self.dropped += 1
            return
        if size < n.HEADER_SIZE + n.FRAME_MIN or not device.filter.takes(frame[12:30]):
            self.dropped += 1
            return
        if not device.checksums:
            frame[0] = 0
        used: list[tuple[Chain, memoryview]] = []
        rest = frame
        while rest:
            chain = self._chains.popleft()
            room = chain.writable_size()
            del self._views[: len(chain.writable)]
            self._size -= room
            used.append((chain, rest[:room]))
            rest = rest[room:]
        frame[n.NUM_BUFFERS : n.NUM_BUFFERS + 2] = len(used).to_bytes(2, "little")
        for chain, part in used:
            queue.push(chain, chain.write(part))
