"""Queues served no faster than a limit allows (vmm.virtio.limit).

What there is no budget for goes back into the ring, where it counts as not taken yet: a reset or a
snapshot finds nothing kept. An alarm has the queue looked at when there is budget again.
"""

from __future__ import annotations

from vmm import priority
from vmm.virtio import spec
from vmm.virtio.alarm import Alarm
from vmm.virtio.device import GivesWay, Interrupted
from vmm.virtio.limit import Limit
from vmm.virtio.queue import QueueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.virtio.device import VirtioDevice
    from vmm.virtio.queue import Chain, VirtQueue

BATCH = 32


def admit(
    limit: Limit, queue: VirtQueue, chains: list[Chain], size: Callable[[Chain], int]
) -> tuple[list[Chain], float]:
    """Those of `chains`, just popped, that there is budget for, and the seconds others wait.

    The others are in the queue again; 0.0 where there are none.
    """
    for number, chain in enumerate(chains):
        wait = limit.take(size(chain))
        if wait:
            for later in reversed(chains[number:]):
                queue.unpop(later)
            return chains[:number], wait
    return chains, 0.0


def watch(device: VirtioDevice, *limits: Limit) -> Alarm:
    """An alarm for queues of `device`; has them looked at anew when one of `limits` changes."""
    alarm = Alarm(f"{device.name}-limit", device.notify, lambda err: device.on_bug(err))

    def changed() -> None:
        alarm.clear()
        device.hold()  # whoever serves a queue stops, and begins anew
        device.release()

    for limit in limits:
        limit.on_change = changed
    return alarm


class Throttle:
    """Serves queues of `device`, whose requests are of `size` bytes.

    Attributes:
        limit: none at first; a change takes effect at once, also for what waits.
    """

    def __init__(self, device: VirtioDevice, size: Callable[[Chain], int]) -> None:
        self._device = device
        self._size = size
        self.limit = Limit()
        self.alarm = watch(device, self.limit)

    def serve(self, index: int) -> None:
        """As `VirtioDevice.notify`, as far as the budget goes."""
        while self._serve(index):
            priority.give_way()

    def _serve(self, index: int) -> bool:
        """True: the queue is left for a moment, because somebody goes first."""
        device, limit = self._device, self.limit
        slot = device.slots[index]
        with slot.lock:
            queue = slot.queue
            if queue is None or not device.status & spec.DRIVER_OK:
                return False
            try:
                while not device.quiet and limit.active:
                    chains = queue.pop_batch(BATCH)
                    if chains:
                        chains, wait = admit(limit, queue, chains, self._size)
                        device.requests(index, queue, chains)
                        if queue.publish():
                            device.interrupt(index)
                        if wait:
                            self.alarm.set(index, wait)
                            return False
                        if priority.wanted:
                            return True
                    elif not queue.rearm():
                        return False
            except Interrupted as err:
                if queue.publish():
                    device.interrupt(index)
                return isinstance(err, GivesWay)
            except QueueError as err:
                if queue.publish():
                    device.interrupt(index)
                device.needs_reset(f"queue {index}: {err}")
        return False
