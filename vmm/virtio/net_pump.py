"""The thread of a queue pair: serves both queues, and waits for frames, for notifies, and for room
where a write had to wait.

One for both: who answers what he receives would else wake two.
"""

from __future__ import annotations

import os
import select
import threading

from vmm import priority
from vmm.net.port import LinkLost
from vmm.virtio import kernel
from vmm.virtio.net_kernel import NOT_HERE
from vmm.virtio.net_rx import BATCH, FRAMES, LATER, MORE, NOTHING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.virtio.net import Nic

AGAIN = {NOT_HERE: BATCH, kernel.OTHER: 1, kernel.HELD: 1}
"""What is left to Python, and how many frames of it."""
RECEIVED = {kernel.IDLE: NOTHING, kernel.WAIT: FRAMES, kernel.MORE: MORE}
"""What else the kernel says of received frames, as the receiver does."""


class Pump:
    """Serves queue pair `pair` of `device` until `close`.

    Args:
        kicks: the eventfds of their notifies, if nobody else reads them.
    """

    def __init__(self, device: Nic, pair: int, kicks: Sequence[int] = ()) -> None:
        self._device = device
        self._pair = pair
        self._receiver = device.receivers[pair]
        self._sender = device.senders[pair]
        self._port = self._receiver.port
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._kicks = (self._wake, *kicks)
        for fd in self._kicks:
            self._poll.register(fd, select.POLLIN)
        self._events = 0
        self._ended = False
        self._lost = False
        self._thread = threading.Thread(
            target=self._main, name=f"{device.name}-frames{pair}", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """Have the thread look again: buffers, settings, or a write that waits."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the thread."""
        self._ended = True
        self.wake()
        if threading.get_ident() != self._thread.ident:
            self._thread.join()
            os.close(self._wake)

    def _main(self) -> None:
        try:
            while not self._ended:
                if priority.wanted:
                    priority.give_way()
                try:
                    self._wait(self._serve())
                except LinkLost as err:
                    self._lost = self._device.lost(self._pair, err)
        except BaseException as err:  # a bug of ours: the machine ends, the process does not
            self._device.on_bug(err)

    def _serve(self) -> int:
        """Serve both queues for a while; what the receiver is to wait for, or MORE."""
        device, sent, received = self._device, NOT_HERE, NOT_HERE
        if device.fast is not None:
            sent, received = device.fast.serve(self._pair, not self._lost)
        more = sent == kernel.MORE
        if sent in AGAIN:
            more = self._sender.serve(AGAIN[sent])
        if self._lost:
            what = NOTHING
        elif received in AGAIN:
            what = self._receiver.serve(AGAIN[received])
        else:
            what = RECEIVED[received]
        return MORE if more else what

    def _wait(self, what: int) -> None:
        port = self._port
        events = select.POLLIN if what == FRAMES else 0
        if port.blocked and not self._lost:
            events |= select.POLLOUT
        elif what == MORE:
            return
        if events != self._events:
            # Not merely masked: errors would be reported all the same, and without end.
            if events and port.fd >= 0:
                self._poll.register(port.fd, events)
            elif self._events and port.fd >= 0:
                self._poll.unregister(port.fd)
            self._events = events
        timeout = 0.0 if what == MORE else None
        if what == LATER:
            timeout = self._receiver.wait * 1000
        for fd, found in self._poll.poll(timeout):
            if fd in self._kicks:
                os.eventfd_read(fd)
            elif port.blocked and found & ~select.POLLIN:
                port.resume()
