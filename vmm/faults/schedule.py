"""Calls at a later time: what a delay ends with. One thread a machine, started by the first."""

from __future__ import annotations

import threading
from heapq import heappop, heappush
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Schedule:
    """Calls functions when their time has come, one after another.

    Args:
        failed: told of an exception in one of them; the others are called all the same.
    """

    def __init__(self, failed: Callable[[BaseException], object]) -> None:
        self._failed = failed
        self._changed = threading.Condition(threading.Lock())
        self._calls: list[tuple[float, int, Callable[[], object]]] = []
        self._count = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def at(self, when: float, call: Callable[[], object]) -> None:
        """Have `call` called at `when`, in seconds of CLOCK_MONOTONIC; never, once it is closed."""
        with self._changed:
            if self._closed:
                return
            self._count += 1
            heappush(self._calls, (when, self._count, call))
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="faults", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Forget what was to be called, and end the thread. Harmless twice."""
        with self._changed:
            self._closed = True
            self._calls.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread.ident != threading.get_ident():
            thread.join()

    def _main(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    if not self._calls:
                        self._changed.wait()
                    elif (left := self._calls[0][0] - monotonic()) > 0:
                        self._changed.wait(min(left, threading.TIMEOUT_MAX))
                    else:
                        break
                if self._closed:
                    return
                call = heappop(self._calls)[2]
            try:
                call()
            except BaseException as err:
                self._failed(err)
