"""Rate limits of a network card: frames wait, in the guest's ring or in the host's queue."""

from __future__ import annotations

from vmm.virtio.limit import Limit
from vmm.virtio.net_tx import frame_size
from vmm.virtio.throttle import admit, watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.virtio.net import Nic
    from vmm.virtio.queue import Chain, VirtQueue


class NicLimits:
    """Limits of `device`; none at first.

    Attributes:
        rx, tx: to the guest, and from it.
        alarm: has a transmit queue served again.
    """

    def __init__(self, device: Nic) -> None:
        self.rx, self.tx = Limit(), Limit()
        self.alarm = watch(device, self.rx, self.tx)

    def admit(self, index: int, queue: VirtQueue, chains: list[Chain]) -> list[Chain]:
        """The first of `chains`; the others are in the queue again, and wait."""
        admitted, wait = admit(self.tx, queue, chains, frame_size)
        if wait:
            self.alarm.set(index, wait)
        return admitted
