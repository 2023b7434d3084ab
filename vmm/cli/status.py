"""A line on the terminal that says what takes so long, written over each second, and then gone.

Only where standard error is a terminal that this process may write to; in a pipe or a file nothing
of it is ever seen. Lines of `vmm.cli.say` take it away first; it comes back with the next second.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager

from vmm.cli import say as output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

PERIOD = 1.0
"""Seconds before the line is first seen, and between two versions of it."""
ERASE = "\r\x1b[K"


class StatusLine:
    """A context manager that shows `text()` and the seconds since it began, until `end`.

    Attributes:
        text: what is going on, in a few words; called by the thread that shows it.
        tail: what follows the seconds.
    """

    def __init__(self, text: str, tail: Callable[[], str] = lambda: "") -> None:
        self.text = text
        self.tail = tail
        self._shown = False
        self._over = not _is_possible()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not self._over:
            output.before_line = self.clear
            self._begin()
        return self

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._main, name="vmm-status", daemon=True)
        self._thread.start()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Have no thread for as long as the block: what it gives up, threads that are there
        would keep."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join()
            self._stop.clear()
        yield
        if thread is not None and not self._over:
            self._begin()

    def __exit__(self, *exc: object) -> None:
        self.end()

    def say(self, text: str, tail: Callable[[], str] = lambda: "") -> None:
        """Something else is going on now."""
        with self._lock:
            self.text, self.tail = text, tail
            self._began = time.monotonic()

    def clear(self) -> None:
        """Take it off the terminal, for something else to be written there; from any thread."""
        with self._lock:
            self._erase()

    def end(self) -> None:
        """Take it off for good; from any thread, harmless twice."""
        with self._lock:
            if self._over:
                return
            self._over = True
            self._erase()
        self._stop.set()
        output.before_line = None

    def _erase(self) -> None:
        if self._shown:
            self._shown = False
            _write(ERASE)

    def _main(self) -> None:
        while not self._stop.wait(PERIOD):
            tail = self.tail()
            with self._lock:
                if self._over:
                    return
                if not _is_in_foreground():
                    self._shown = False  # the shell has the terminal: nothing is ours there
                    continue
                seconds = int(time.monotonic() - self._began)
                line = f"vmm: {self.text}, {seconds} s{tail}"
                line = "".join(c if c.isprintable() else " " for c in line)
                self._shown = _write(ERASE + line[: _columns() - 1]) or self._shown


def _is_possible() -> bool:
    return os.isatty(output.STDERR) and (os.environ.get("TERM") or "dumb") != "dumb"


def _is_in_foreground() -> bool:
    from vmm.console.terminal import in_foreground

    return in_foreground(output.STDERR)


def _columns() -> int:
    try:
        return os.get_terminal_size(output.STDERR).columns or 80
    except OSError:
        return 80


def _write(text: str) -> bool:
    """Write to the terminal, if that would not wait (Ctrl-S has stopped it); whether it did."""
    import select

    poll = select.poll()
    poll.register(output.STDERR, select.POLLOUT)
    if not poll.poll(0):
        return False
    try:
        os.write(output.STDERR, text.encode("utf-8", "replace"))
    except OSError:
        return False
    return True
