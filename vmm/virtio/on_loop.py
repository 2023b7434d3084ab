"""Base of the devices that the machine's event loop serves, with one lock that is every queue's.

A reset, which comes from a vCPU thread, so finds nothing under way; and what a descriptor or a
timer of the loop sets off is serialized with the queues.
"""

from __future__ import annotations

from _thread import RLock, allocate_lock, get_ident

from vmm import priority
from vmm.virtio import spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.queue import QueueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class LoopDevice(VirtioDevice):
    """A device whose queues are served on the loop; before that runs, by who calls."""

    ON_LOOP = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._mutex = RLock()
        for slot in self.slots:
            slot.lock = self._mutex
        self._gate = allocate_lock()
        self._wanted = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._asked: set[object] = set()
        """What the loop has been asked to do and has not begun: see `once`."""

    def loop_running(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = get_ident()

    def serve(self, index: int) -> None:
        """Serve queue `index`; on the loop, with the lock. For devices to define."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send what waits for the guest; with the lock, after whatever was done with it."""

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` on the loop: now, if this is its thread, or there is none (yet)."""
        loop = self._loop
        if loop is None or get_ident() == self._thread:
            function()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(function)

    def once(self, what: object, function: Callable[[], object]) -> None:
        """As `call`; nothing where the loop has been asked for the same thing, `what`, and has not
        begun it: a guest may be quicker than the loop."""
        if self._loop is None or get_ident() == self._thread:
            function()
        else:
            self._soon(what, function)

    def again(self, index: int) -> None:
        """Have queue `index` served after others of the loop have had their turn; from any
        thread. There is a loop."""
        self._soon(index, lambda: self.notify(index))

    def _soon(self, what: object, function: Callable[[], object]) -> None:
        loop = self._loop
        if loop is None or what in self._asked or loop.is_closed():
            return

        def begin() -> None:
            self._asked.discard(what)  # first: what comes from now on may not be seen
            function()

        self._asked.add(what)
        loop.call_soon_threadsafe(begin)

    def later(self, seconds: float, function: Callable[[], object]) -> bool:
        """Call `function` on the loop in a while, with the lock; False where there is no loop."""
        if self._loop is None:
            return False
        self._loop.call_later(seconds, self.locked, function)
        return True

    def watch(self, fd: int, function: Callable[[], object] | None) -> None:
        """Call `function`, with the lock, while `fd` can be read; None: no more."""
        if self._loop is not None:
            if function is not None:
                self._loop.add_reader(fd, self.locked, function)
            else:
                self._loop.remove_reader(fd)

    def watch_writing(self, fd: int, function: Callable[[], object] | None) -> None:
        """Call `function`, with the lock, while `fd` can be written; None: no more."""
        if self._loop is not None:
            if function is not None:
                self._loop.add_writer(fd, self.locked, function)
            else:
                self._loop.remove_writer(fd)

    def locked(self, function: Callable[..., object], *args: object) -> None:
        """Call `function` with the lock, unless the device is being reset; then `flush`."""
        if self._wanted and not self._mutex._is_owned():  # type: ignore[attr-defined]
            with self._gate:  # who has the lock most of the time lets others in
                pass
        with self._mutex:
            if self.quiet or not self.status & spec.DRIVER_OK:
                return
            try:
                function(*args)
                self.flush()
            except QueueError as err:
                self.needs_reset(str(err))

    def hold(self) -> None:
        with self.control:
            if self._mutex._is_owned():  # type: ignore[attr-defined]
                super().hold()
                return
            with self._gate:
                self._wanted = True
                try:
                    super().hold()
                finally:
                    self._wanted = False

    def notify(self, index: int) -> None:
        if self._loop is not None and get_ident() != self._thread:
            self.once(index, lambda: self.notify(index))
            return
        if priority.wanted and self._loop is not None:
            priority.give_way()
        self.locked(self.serve, index)
