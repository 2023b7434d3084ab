"""The entropy device (virtio 1.2, section 5.4)."""

from __future__ import annotations

import os
from collections import deque

from vmm.errors import UsageError
from vmm.virtio import spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.limit import Limit

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading

    from vmm.virtio.queue import Chain, VirtQueue

REQUEST_MAX = 64 << 10
"""Bytes given for one request; the driver asks again for more (5.4.6.1 lets a device do so)."""


class Entropy(VirtioDevice):
    """Random bytes from the host's kernel (getrandom(2)).

    Attributes:
        limit: bytes a second; `limit.change(bytes=...)` at any time.
    """

    ID = spec.ID_ENTROPY
    QUEUES = (64,)

    def __init__(self, name: str = "rng", limit: Limit | None = None) -> None:
        super().__init__(name)
        self.limit = limit or Limit()
        self._waiting: deque[tuple[VirtQueue, Chain]] = deque()
        self._timer: threading.Timer | None = None

    def request(self, index: int, chain: Chain) -> int | None:
        size = self._take(chain) if not self._waiting else None
        if size is not None:
            return chain.write(os.urandom(size))
        queue = self.slots[index].queue
        assert queue is not None
        self._waiting.append((queue, chain))
        return None

    def _take(self, chain: Chain) -> int | None:
        """Bytes the limit lets `chain` have now; None: a timer will tell."""
        size = min(chain.writable_size(), REQUEST_MAX)
        rate = self.limit.rates[0]
        if rate:
            size = min(size, int(rate) // 10 or 1)
        wait = self.limit.take(size)
        if not wait:
            return size
        import threading

        self._timer = threading.Timer(wait, self._go_on)
        self._timer.daemon = True
        self._timer.start()
        return None

    def _go_on(self) -> None:
        slot = self.slots[0]
        with slot.lock:
            while self._waiting:
                queue, chain = self._waiting[0]
                if slot.queue is queue:
                    size = self._take(chain)
                    if size is None:
                        return
                    self.finish(0, queue, chain, chain.write(os.urandom(size)))
                self._waiting.popleft()

    def stopped(self) -> None:
        self._waiting.clear()
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def queue_stopped(self, index: int) -> None:
        self.stopped()

    def give_back(self) -> None:
        """What waits for the limit goes back into the ring: it is asked for again."""
        while self._waiting:
            queue, chain = self._waiting.pop()
            queue.unpop(chain)

    def close(self) -> None:
        self.stopped()


def parse(text: str) -> Limit:
    """The limit in what `--rng` was given: empty, or `rate=BYTES`."""
    if not text:
        return Limit()
    from vmm.units import parse_size

    key, _, value = text.partition("=")
    rate = parse_size(value, "--rng rate=", "") if key == "rate" else 0
    if not rate:
        raise UsageError(f"--rng={text} is not rate=BYTES, bytes a second; say --rng=rate=64K")
    return Limit(bytes=rate)
