"""The entropy device (virtio 1.2, section 5.4)."""

from __future__ import annotations

import os

from vmm.virtio import spec
from vmm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.virtio.queue import Chain

REQUEST_MAX = 64 << 10
"""Bytes given for one request; the driver asks again for more (5.4.6.1 lets a device do so)."""


class Entropy(VirtioDevice):
    """Random bytes from the host's kernel (getrandom(2))."""

    ID = spec.ID_ENTROPY
    QUEUES = (64,)

    def __init__(self, name: str = "rng") -> None:
        super().__init__(name)

    def request(self, index: int, chain: Chain) -> int:
        return chain.write(os.urandom(min(chain.writable_size(), REQUEST_MAX)))
