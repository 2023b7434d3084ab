"""Who hears of a machine's events, and the last of them, kept.

Loaded when a program first asks for events; until then a machine only notes them.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from typing import Generic, TypeVar

from vmm import events
from vmm.events import ConsoleLine, Event, Stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Sequence
    from typing import Self

    from vmm.console.tail import ConsoleTail

    Note = tuple[float, str, tuple[object, ...]]
    """When, the name and the arguments of an event that was not made yet."""

E = TypeVar("E", bound=Event)

LOG_LIMIT = 1000
"""Events kept in the log."""
STREAM_LIMIT = 10_000
"""Events that wait in a stream; of more, the oldest are dropped."""
LINE_LIMIT = 4096
"""Bytes of a console line; a longer one comes in pieces."""

KINDS: dict[str, type[Event]] = {
    kind.name: kind
    for kind in (
        events.Started,
        events.Paused,
        events.Resumed,
        events.Snapshotted,
        events.RolledBack,
        events.Panicked,
        events.DeviceError,
        events.Stopped,
    )
}


def make(name: str, arguments: tuple[object, ...]) -> Event:
    """The event that a machine calls `name`."""
    return KINDS[name](*arguments)


def _check_kinds(call: str, kinds: tuple[object, ...]) -> None:
    """TypeError here, rather than in the thread of the next event."""
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, Event)):
            raise TypeError(f"{call}: {kind!r} is not a kind of event, as vmm.events.Stopped is")


class EventHub:
    """The listeners and the log of one machine; all methods from any thread.

    Args:
        notes: what happened before.
        tail: the console, watched for lines while somebody listens for them.
        flush: brings out what the guest has printed.
        failed: told of an exception in a listener.
        over: the machine has ended.
    """

    def __init__(
        self,
        notes: Sequence[Note],
        tail: ConsoleTail,
        flush: Callable[[], object],
        failed: Callable[[BaseException], object],
        over: bool = False,
    ) -> None:
        self._log: deque[Event] = deque(maxlen=LOG_LIMIT)
        self._listeners: tuple[tuple[Callable[[Event], object], tuple[type[Event], ...]], ...] = ()
        self._streams: list[EventStream[Event]] = []
        self._lock = threading.Lock()
        self._tail = tail
        self._flush = flush
        self._failed = failed
        self._lines: LineSplitter | None = None
        self._over = over
        for time, name, arguments in notes:
            event = make(name, arguments)
            event.time = time
            self._log.append(event)

    def log(self) -> list[Event]:
        """The last events, oldest first."""
        with self._lock:
            return list(self._log)

    def emit(self, event: Event) -> None:
        """Log `event` and tell who listens, in this thread."""
        if not isinstance(event, Event):
            raise TypeError(f"emit: {event!r} is not a vmm.events.Event")
        if isinstance(event, Stopped) and self._lines is not None:
            self._last_lines(self._lines)
        with self._lock:
            if not isinstance(event, ConsoleLine):
                self._log.append(event)
            listeners = self._listeners
        for listener, kinds in listeners:  # unlocked: it may subscribe, or emit
            if isinstance(event, kinds):
                try:
                    listener(event)
                except Exception as err:
                    if self._over or isinstance(event, Stopped):  # it cannot end once more
                        sys.excepthook(type(err), err, err.__traceback__)
                    else:
                        self._failed(err)
        if isinstance(event, Stopped):
            self.close()

    def subscribe(
        self, listener: Callable[[Event], object], kinds: tuple[type[Event], ...]
    ) -> Callable[[], None]:
        """Have `listener` called; what is returned ends that."""
        if not callable(listener):
            raise TypeError(f"subscribe: {listener!r} is not a function")
        _check_kinds("subscribe", kinds)
        entry = (listener, kinds or (Event,))
        with self._lock:
            self._listeners = (*self._listeners, entry)
            self._want_lines(entry[1])

        def remove() -> None:
            with self._lock:
                self._listeners = tuple(other for other in self._listeners if other is not entry)

        return remove

    def stream(self, kinds: tuple[type[Event], ...], history: bool) -> EventStream[Event]:
        """A stream of events from now on."""
        _check_kinds("events", kinds)
        kinds = kinds or (Event,)
        with self._lock:
            stream = EventStream(self._log if history else (), kinds)
            if self._over:
                stream.finish()
                return stream
            entry = (stream.put, (*kinds, Stopped))
            self._listeners = (*self._listeners, entry)
            self._streams.append(stream)
            self._want_lines(kinds)

        def leave() -> None:
            with self._lock:
                self._listeners = tuple(other for other in self._listeners if other is not entry)
                if stream in self._streams:
                    self._streams.remove(stream)

        stream.leave = leave
        return stream

    def close(self) -> None:
        """Nothing more will happen: end the streams."""
        with self._lock:
            self._over = True
            streams, self._streams = self._streams, []
        for stream in streams:
            stream.finish()

    def reopen(self) -> None:
        """The machine has not ended after all: it was rolled back to before."""
        self._over = False

    def _want_lines(self, kinds: tuple[type[Event], ...]) -> None:
        if self._lines is None and any(issubclass(ConsoleLine, kind) for kind in kinds):
            self._lines = LineSplitter(lambda line: self.emit(ConsoleLine(line)))
            self._tail.on_write = self._lines.write

    def _last_lines(self, lines: LineSplitter) -> None:
        """What was printed before the end, however it comes out, is told before it."""
        if lines.thread != threading.get_ident():  # else: a listener has ended the machine
            self._flush()
            lines.end()


class LineSplitter:
    """Makes lines of output.

    Attributes:
        thread: the one that is in `write`.
    """

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.thread: int | None = None
        self._tell = tell
        self._rest = b""
        self._lock = threading.RLock()

    def write(self, data: bytes) -> None:
        """Take output; from any thread (the UART's and a virtio console's are two)."""
        with self._lock:
            self.thread = threading.get_ident()
            try:
                *lines, self._rest = (self._rest + data).split(b"\n")
                while len(self._rest) > LINE_LIMIT:
                    lines.append(self._rest[:LINE_LIMIT])
                    self._rest = self._rest[LINE_LIMIT:]
                for line in lines:
                    self._tell(line.decode("utf-8", "replace").rstrip("\r"))
            finally:
                self.thread = None

    def end(self) -> None:
        """Tell what is left as a line."""
        if self._rest:
            self.write(b"\n")


class EventStream(Generic[E]):
    """Events in their order, to be iterated over: `async for` in a coroutine, `for` in a thread.

    It begins when it is made and ends after `Stopped`, when the machine is closed, or at
    `close()`; it is a context manager too. Use it from one task or thread.

    Attributes:
        dropped: how many events were lost, because more than STREAM_LIMIT waited.
    """

    def __init__(self, history: Iterable[Event], kinds: tuple[type[E], ...]) -> None:
        self.dropped = 0
        self.leave: Callable[[], None] | None = None
        self._kinds = kinds
        self._waiting: deque[E] = deque(event for event in history if isinstance(event, kinds))
        self._over = False
        self._changed = threading.Condition(threading.Lock())
        self._wake: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def put(self, event: Event) -> None:
        """One more event; from any thread."""
        with self._changed:
            if self._over:
                return
            if isinstance(event, self._kinds):
                if len(self._waiting) >= STREAM_LIMIT:
                    self._waiting.popleft()
                    self.dropped += 1
                self._waiting.append(event)
            self._over = isinstance(event, Stopped)
            self._tell()

    def finish(self) -> None:
        """No more events will come; those that wait can still be taken."""
        with self._changed:
            self._over = True
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        if self._wake is not None:
            _resolve_soon(*self._wake)
            self._wake = None

    def close(self) -> None:
        """End it; harmless twice."""
        if self.leave is not None:
            self.leave()
            self.leave = None
        with self._changed:
            self._waiting.clear()
        self.finish()

    def next(self, timeout: float | None = None) -> E | None:
        """The next event, or None at the end. TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._waiting) or self._over, timeout):
                raise TimeoutError(f"no event within {timeout:g} s")
            return self._waiting.popleft() if self._waiting else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> E:
        event = self.next()
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        from asyncio import get_running_loop

        loop = get_running_loop()
        while True:
            with self._changed:
                if self._waiting:
                    return self._waiting.popleft()
                if self._over:
                    raise StopAsyncIteration
                future: asyncio.Future[None] = loop.create_future()
                self._wake = (loop, future)
            await future


def _resolve_soon(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    """From any thread."""

    def resolve() -> None:
        if not future.done():
            future.set_result(None)

    from contextlib import suppress

    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(resolve)
