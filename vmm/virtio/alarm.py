"""Has a device's queues looked at later: one thread a device, started when first needed."""

from __future__ import annotations

import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Alarm:
    """Calls `function(key)` when the time set for `key` has come.

    Args:
        name: of the thread.
        function: called in that thread, without a lock.
        failed: told of an exception that escapes it.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[int], object],
        failed: Callable[[BaseException], object],
    ) -> None:
        self._name = name
        self._function = function
        self._failed = failed
        self._times: dict[int, float] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ended = False

    def set(self, key: int, seconds: float) -> None:
        """Call it for `key` in `seconds`, whatever was set before."""
        with self._changed:
            if self._ended:
                return
            self._times[key] = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def clear(self) -> None:
        """Forget what was set."""
        with self._changed:
            self._times.clear()

    def close(self) -> None:
        """End the thread; harmless twice."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _main(self) -> None:
        try:
            while (key := self._next()) is not None:
                self._function(key)
        except BaseException as err:  # a bug of ours: the machine ends, the process does not
            self._failed(err)

    def _next(self) -> int | None:
        """The next key whose time has come; None at the end."""
        with self._changed:
            while not self._ended:
                if not self._times:
                    self._changed.wait()
                    continue
                key, at = min(self._times.items(), key=lambda item: item[1])
                left = at - time.monotonic()
                if left <= 0:
                    del self._times[key]
                    return key
                self._changed.wait(left)
        return None
