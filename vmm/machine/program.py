"""What a program hears of a machine, and answers in it: `Machine` has these."""

from __future__ import annotations

import time
from _collections import deque  # type: ignore[import-not-found]  # `collections` is slow to load

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from typing import Any, TypeVar, overload

    from vmm.events import Event
    from vmm.machine.binding import Read, Write
    from vmm.machine.event_hub import EventHub, EventStream
    from vmm.machine.machine import Machine
    from vmm.machine.vsock_binding import Handler

    E = TypeVar("E", bound=Event)

NOTES_MAX = 100
"""Events kept before a program asks for any."""


class ProgramCalls:
    """Events, and functions of the program that the guest calls."""

    _telling: threading.RLock
    """Held while events are noted, and while the one of `listen` is told; not while others are."""
    _closers: list[Callable[[], object]]

    @property
    def _machine(self) -> Machine:
        return self  # type: ignore[return-value]  # it is the one class that has these

    def _prepare_events(self) -> None:
        self._listener: Callable[[str], None] | None = None
        self._notes: deque[tuple[float, str, tuple[object, ...]]] = deque(maxlen=NOTES_MAX)
        self._hub: EventHub | None = None

    def _reopen_events(self) -> None:
        if self._hub is not None:
            self._hub.reopen()

    def _close_events(self) -> None:
        if self._hub is not None:
            self._hub.close()

    # --- events ---------------------------------------------------------------------------------

    @property
    def event_log(self) -> list[Event]:
        """The last events (up to 1000, without console lines), oldest first."""
        return self._events.log()

    if TYPE_CHECKING:

        @overload
        def events(self, *, history: bool = False) -> EventStream[Event]: ...
        @overload
        def events(self, *kinds: type[E], history: bool = False) -> EventStream[E]: ...

    def events(self, *kinds: type[Event], history: bool = False) -> EventStream[Any]:
        """The events from now on, of these kinds (or of all), for `async for` or `for`.

        It ends when the machine stops. With `history`, those in the log come first.
        """
        return self._events.stream(kinds, history)

    def subscribe(self, listener: Callable[[E], object], *kinds: type[E]) -> Callable[[], None]:
        """Have `listener` called with each event of these kinds (or of all); what is returned ends
        that.

        It is called in the thread the event happens in (a vCPU's, a device's), perhaps in two at
        once, and must not wait for the machine. What it raises ends the machine, with a report.
        """
        return self._events.subscribe(listener, kinds)  # type: ignore[arg-type]

    def emit(self, event: Event) -> None:
        """Log `event` and tell those who listen; from any thread."""
        self._events.emit(event)

    @property
    def _events(self) -> EventHub:
        with self._telling:
            if self._hub is None:
                from vmm.machine.event_hub import EventHub

                machine = self._machine
                self._hub = EventHub(
                    self._notes,
                    machine.console,
                    machine.platform.flush,
                    machine.monitor_failed,
                    machine.state in ("stopped", "closed"),
                )
            return self._hub

    def listen(self, listener: Callable[[str], None] | None) -> None:
        """For `vmm run`, which loads nothing more: have `listener` called with the names of what
        happens to the machine, or nobody (None).

        It is called in the thread the event happens in and must not block. Once this has returned,
        the former listener is not called.
        """
        with self._telling:
            self._listener = listener

    def _tell(self, event: str, *arguments: object) -> None:
        with self._telling:
            if self._listener is not None:
                self._listener(event)
            hub = self._hub
            if hub is None:
                self._notes.append((time.monotonic(), event, arguments))
                return
        from vmm.machine.event_hub import make

        hub.emit(make(event, arguments))

    def panic_seen(self, how: str) -> None:
        """Tell that the guest's kernel has panicked; see `events.Panicked`."""
        self._tell("panicked", how)

    # --- functions of the program -----------------------------------------------------------------

    def bind_port(
        self, port: int, size: int = 1, *, read: Read | None = None, write: Write | None = None
    ) -> Callable[[], None]:
        """Have functions answer at ports `port` to `port + size - 1`, until what is returned is
        called. Created or paused.

        `read(offset, size)` returns what the guest reads, an int of `size` bytes (1, 2 or 4);
        `write(offset, size, value)` takes what it writes; the offset counts from `port`. Without
        `read` it reads all ones, without `write` writes do nothing. They are called on the vCPU's
        thread, which waits; what they raise ends the machine, with a report.

        Raises:
            UsageError: something else is there, named.
            StateError: the machine is running, stopped or closed.
        """
        from vmm.machine.binding import bind

        return bind(self._machine, "port", port, size, read, write)

    def bind_mmio(
        self, gpa: int, size: int, *, read: Read | None = None, write: Write | None = None
    ) -> Callable[[], None]:
        """As `bind_port`, at guest physical addresses without RAM; accesses of 1 to 8 bytes."""
        from vmm.machine.binding import bind

        return bind(self._machine, "mmio", gpa, size, read, write)

    def bind_vsock(self, port: int, handler: Handler) -> Callable[[], None]:
        """Have `handler(sock)` called when the guest connects to `port` of CID 2, until what is
        returned is called.

        It is called in a thread of its own for each connection (of which a port has 256 at most),
        with a blocking socket that is closed when it returns, and whose other end is closed when
        the machine ends. What it raises ends the machine, with a report, but for ConnectionError
        and EOFError, which end the connection alone: a guest can bring them about.

        Raises:
            UsageError: the port is bound already.
            StateError: the machine was made without `vsock`, or has ended.
        """
        from vmm.machine.vsock_binding import VsockServer

        return VsockServer(self._machine, port, handler).unbind

    def on_close(self, function: Callable[[], object]) -> None:
        """Have `function` called when the machine is closed, after its devices."""
        self._closers.append(function)
