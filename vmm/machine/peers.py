"""Tells a machine's devices at once that a program they depend on has gone.

A helper (passt, virtiofsd, qemu-storage-daemon) or somebody's back end may end before the guest has
a driver for its device, and then nothing of the device looks at its socket yet. One thread of the
machine does, for all of them.
"""

from __future__ import annotations

import os
import select
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Peers:
    """Watches descriptors until the other end of each hangs up, or `close`.

    Args:
        peers: descriptors, and what to call, once and in the thread, when the other end of each
            has hung up.
        on_bug: told of an exception that escaped in the thread.
    """

    def __init__(
        self,
        peers: Sequence[tuple[int, Callable[[], object]]],
        on_bug: Callable[[BaseException], object],
    ) -> None:
        self._on_bug = on_bug
        self._watched = dict(peers)
        self._closed: list[Callable[[], object]] = []
        """What to call of descriptors that were closed before they were handed in."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # An epoll object knows the files, not their numbers: a descriptor that its device closes
        # leaves it, and whatever gets the number next is not taken for the peer.
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        for fd in list(self._watched):
            try:
                self._poll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)
            except OSError:
                self._closed.append(self._watched.pop(fd))
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; before the descriptors are closed."""
        if self._wake < 0:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._poll.close()
        os.close(self._wake)
        self._wake = -1

    def _main(self) -> None:
        try:
            for function in self._closed:
                function()
            while not self._closing:
                for fd, _ in self._poll.poll():
                    if fd == self._wake:
                        os.eventfd_read(fd)
                    else:
                        self._watched.pop(fd)()
        except BaseException as err:  # a bug of ours: the machine ends, the process does not
            self._on_bug(err)
