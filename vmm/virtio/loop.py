"""The event loop of a machine's devices: asyncio, in a thread of its own.

For devices with host descriptors to watch (sockets, terminals). Those that only move data between
a file and a ring are better off with a thread a queue, see `vmm.virtio.serve`.
"""

from __future__ import annotations

import asyncio
import os
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.virtio.device import VirtioDevice


class DeviceLoop:
    """An asyncio loop that runs from construction to `close`.

    Attributes:
        loop: for devices; from other threads only through `call`.
    """

    def __init__(self, failed: Callable[[BaseException], object]) -> None:
        self.loop = asyncio.new_event_loop()
        self._failed = failed
        self._fds: list[int] = []
        self.loop.set_exception_handler(self._exception)
        self._thread = threading.Thread(target=self._main, name="devices", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _exception(self, loop: object, context: dict[str, object]) -> None:
        err = context.get("exception")
        if isinstance(err, BaseException):
            self._failed(err)

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop call `function` soon; from any thread."""
        self.loop.call_soon_threadsafe(function)

    def serve(self, device: VirtioDevice, index: int, fd: int) -> None:
        """Serve queue `index` of `device` whenever eventfd `fd` is written."""

        def ready() -> None:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
            device.notify(index)

        self._fds.append(fd)
        self.call(lambda: self.loop.add_reader(fd, ready))

    def end(self) -> None:
        """Have the loop stop, without waiting for its thread."""
        if self._thread.is_alive():
            self.call(self.loop.stop)

    def join(self, timeout: float | None = None) -> bool:
        """Whether the thread has ended within `timeout` seconds.

        Where only the host is slow, it has longer; see `vmm.held_up`.
        """
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        from vmm import held_up

        return held_up.join(self._thread)

    def close(self) -> None:
        """Stop the loop and wait for its thread; tasks left are cancelled. Harmless twice."""
        if self.loop.is_closed():
            return
        self.end()
        self.join()
        for fd in self._fds:
            self.loop.remove_reader(fd)
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
