"""The last of a console's output, kept for reports and for programs that wait for a line."""

from __future__ import annotations

import time
from _thread import allocate_lock

from vmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from _thread import LockType
    from collections.abc import Callable

    Pattern = str | bytes | re.Pattern[str] | re.Pattern[bytes]

DEFAULT_LIMIT = 64 << 10
"""Bytes kept."""
CUT_MORE = 1000
"""Bytes beyond those about to be forgotten that `before_cut` gets: a line may be cut in two."""
SLICE = 0.05
"""Seconds between two calls of `before_wait`."""


class ConsoleClosed(VmmError):
    """The machine ended before the awaited text was printed."""


class ConsoleTail:
    """A bounded record of output; all methods from any thread.

    Positions count bytes of output since the start. `wait_for` goes on where its last match
    ended, so a dialogue (wait for the prompt, send, wait for the prompt again) works.
    `before_wait`, where set, is called before each wait and every 50 ms in it: the place to
    flush a device that holds output back. `before_cut`, where set, is given output that is about to
    be forgotten. `on_write`, where set, is given all output too.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.before_wait: Callable[[], object] | None = None
        self.before_cut: Callable[[bytes], object] | None = None
        self.on_write: Callable[[bytes], object] | None = None
        self._limit = limit
        self._data = bytearray()
        self._start = 0  # position of _data[0]
        self._cursor = 0
        self._closed = False
        self._lock = allocate_lock()
        self._waiters: list[LockType] = []

    @property
    def position(self) -> int:
        """Bytes of output so far."""
        return self._start + len(self._data)

    def write(self, data: bytes) -> None:
        """Take more output."""
        with self._lock:
            self._data += data
            if len(self._data) > 2 * self._limit:  # not at each write: a move of the whole
                excess = len(self._data) - self._limit
                if self.before_cut is not None:
                    self.before_cut(bytes(self._data[: excess + CUT_MORE]))
                del self._data[:excess]
                self._start += excess
            if self._waiters:
                self._wake()
        if self.on_write is not None:
            self.on_write(data)

    def close(self) -> None:
        """There will be no more output; waiters are told."""
        with self._lock:
            self._closed = True
            self._wake()

    def wake(self) -> None:
        """Have those who wait look at their `given_up`."""
        with self._lock:
            self._wake()

    def reopen(self) -> None:
        """Take `close` back."""
        with self._lock:
            self._closed = False

    def bytes(self) -> bytes:
        """The last output, at most the limit."""
        with self._lock:
            return bytes(self._data[-self._limit :])

    def text(self) -> str:
        """The last output as text."""
        return self.bytes().decode("utf-8", "replace")

    def wait_for(
        self,
        pattern: Pattern,
        timeout: float | None = None,
        since: int | None = None,
        given_up: Callable[[], bool] | None = None,
    ) -> str:
        """Wait until `pattern` is printed and return the line it is on, as far as printed.

        `pattern` is literal text or a compiled regular expression. It is looked for after the
        last match, or from position `since`. TimeoutError after `timeout` seconds, ConsoleClosed
        where the console closes first; both tell the last output. `given_up`, asked now and then
        and after `wake`, ends the wait with a TimeoutError too.
        """
        find = finder(pattern)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self.before_wait is not None:
                self.before_wait()
            left = 3600.0 if deadline is None else deadline - time.monotonic()
            with self._lock:
                begin = self._cursor if since is None else since
                match = find(self._data, max(begin - self._start, 0))
                if match is not None:
                    self._cursor = self._start + match[1]
                    return self._line(*match)
                if self._closed:
                    raise ConsoleClosed(f"the console closed without {self._missing(pattern)}")
                if left <= 0 or (given_up is not None and given_up()):
                    raise TimeoutError(f"{timeout} s passed without {self._missing(pattern)}")
                waiter = allocate_lock()
                waiter.acquire()
                self._waiters.append(waiter)
            if self.before_wait is not None:
                left = min(left, SLICE)
            waiter.acquire(timeout=left)
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            waiter.release()
        self._waiters.clear()

    def _line(self, start: int, end: int) -> str:
        first = self._data.rfind(b"\n", 0, start) + 1
        last = self._data.find(b"\n", end)
        line = self._data[first : last if last >= 0 else None]
        return line.decode("utf-8", "replace").rstrip("\r")

    def _missing(self, pattern: Pattern) -> str:
        shown = pattern if isinstance(pattern, (str, bytes)) else pattern.pattern
        end = bytes(self._data[-200:]).decode("utf-8", "replace")
        return f"{shown!r} on the console; its last output: {end!r}"


def finder(pattern: Pattern) -> Callable[[bytearray, int], tuple[int, int] | None]:
    """A function that finds `pattern` in a buffer from an index on: (start, end) or None."""
    if isinstance(pattern, (str, bytes)):
        literal = pattern.encode() if isinstance(pattern, str) else pattern

        def find(data: bytearray, begin: int) -> tuple[int, int] | None:
            at = data.find(literal, begin)
            return None if at < 0 else (at, at + len(literal))

        return find

    import re

    if not isinstance(pattern, re.Pattern):
        raise TypeError(f"{pattern!r} is not text, or a compiled regular expression")
    source = pattern.pattern
    if isinstance(source, str):  # the buffer is bytes, and its positions must stay bytes
        compiled = re.compile(source.encode(), pattern.flags & ~re.UNICODE)
    else:
        compiled = re.compile(source, pattern.flags)

    def search(data: bytearray, begin: int) -> tuple[int, int] | None:
        match = compiled.search(data, begin)
        return None if match is None else match.span()

    return search
