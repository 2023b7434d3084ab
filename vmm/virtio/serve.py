"""Who serves the queues: a thread a queue, asleep in read(2) on the queue's eventfd.

A wake-up is one system call and no dispatch; while requests keep coming none is needed, because
`VirtioDevice.notify` asks for notifies only when the ring is empty. What the requests do (preadv,
writev) runs without the GIL.
"""

from __future__ import annotations

import os
import threading

from vmm import priority

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.virtio.device import VirtioDevice


class QueueThread:
    """Serves queue `index` of `device` whenever eventfd `fd` is written."""

    def __init__(
        self, device: VirtioDevice, index: int, fd: int, failed: Callable[[BaseException], object]
    ) -> None:
        os.set_blocking(fd, True)
        self._device = device
        self._index = index
        self._fd = fd
        self._failed = failed
        self._ended = False
        self._thread = threading.Thread(
            target=self._main, name=f"{device.name}-q{index}", daemon=True
        )
        self._thread.start()

    def _main(self) -> None:
        wait, serve = os.eventfd_read, self._device.notify
        fd, index = self._fd, self._index
        try:
            while not self._ended:
                wait(fd)
                if priority.wanted:
                    priority.give_way()
                serve(index)
        except BaseException as err:  # a bug of ours: the machine ends, the process does not
            self._failed(err)

    def end(self) -> None:
        """Have the thread end, without waiting for that; the descriptor stays open."""
        self._ended = True
        os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """End the thread, and wait for that; the descriptor stays open."""
        self.end()
        self.join()

    def join(self, timeout: float | None = None) -> bool:
        """Whether the thread has ended within `timeout` seconds; also in that thread itself.

        Where only the host is slow, it has longer; see `vmm.held_up`.
        """
        if threading.get_ident() == self._thread.ident:
            return True
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        from vmm import held_up

        return held_up.join(self._thread)
