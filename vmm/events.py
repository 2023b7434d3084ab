"""What happens to a machine, as objects: see `Machine.events`, `Machine.subscribe`, `Machine.emit`.

An event is a value: its `time` is when it happened (seconds of CLOCK_MONOTONIC, as
`time.monotonic()` gives), its other attributes say what. A program may add kinds of its own: a
subclass of `Event` with its attributes in `__slots__`.
"""

from __future__ import annotations

from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.machine.exits import MachineExit


class Event:
    """Base of all events.

    Attributes:
        time: seconds of CLOCK_MONOTONIC, set when the event is made.
    """

    __slots__ = ("time",)

    name = "event"
    """The kind in a word or two, for logs."""

    def __init__(self) -> None:
        self.time = monotonic()

    def values(self) -> dict[str, object]:
        """Its attributes but the time, in order."""
        slots = [name for kind in reversed(type(self).__mro__) for name in _slots(kind)]
        return {name: getattr(self, name) for name in slots if name != "time"}

    def to_dict(self) -> dict[str, object]:
        """Plain data: `event` (the name), `time`, and its attributes."""
        return {"event": self.name, "time": self.time, **self.values()}

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.values().items())
        return f"{type(self).__name__}({values})"

    def __str__(self) -> str:
        what = ", ".join(str(value) for value in self.values().values() if value not in ("", None))
        return f"{self.name}: {what}" if what else self.name


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


class Started(Event):
    """The vCPUs run."""

    __slots__ = ()
    name = "started"


class Paused(Event):
    """The vCPUs are parked, or about to be.

    Attributes:
        why: what a device or a panic had it paused for; empty where a program called `pause`.
    """

    __slots__ = ("why",)
    name = "paused"

    def __init__(self, why: str = "") -> None:
        super().__init__()
        self.why = why


class Resumed(Event):
    """The vCPUs go on after a pause."""

    __slots__ = ()
    name = "resumed"


class Snapshotted(Event):
    """A snapshot of it is complete.

    Attributes:
        path: its directory.
    """

    __slots__ = ("path",)
    name = "snapshot"

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path


class RolledBack(Event):
    """It is again what it was at its checkpoint."""

    __slots__ = ()
    name = "rolled back"


class ConsoleLine(Event):
    """The guest has printed a line, or its last words without an end of line.

    These are not in `Machine.event_log`: `Machine.console` has the text.

    Attributes:
        line: the text, without its end of line.
    """

    __slots__ = ("line",)
    name = "console"

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line = line


class Panicked(Event):
    """The guest's kernel panicked.

    Attributes:
        how: what is known of it: it told pvpanic that it has `panicked`, or that a crash kernel
            takes over (`crash-loaded`); it has `printed` so, and then reset the machine; KVM has
            `reported` it (KVM_SYSTEM_EVENT_CRASH).
    """

    __slots__ = ("how",)
    name = "panicked"

    def __init__(self, how: str = "panicked") -> None:
        super().__init__()
        self.how = how


class DeviceError(Event):
    """Something went wrong with a device, or a driver broke its rules; the machine goes on.

    Attributes:
        line: what, in a line that names the device.
    """

    __slots__ = ("line",)
    name = "device error"

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line = line


class Stopped(Event):
    """The machine is over: the last event, unless it is rolled back to before.

    Attributes:
        exit: why.
    """

    __slots__ = ("exit",)
    name = "stopped"

    def __init__(self, exit: MachineExit) -> None:
        super().__init__()
        self.exit = exit

    def to_dict(self) -> dict[str, object]:
        why = self.exit
        plain = {"kind": why.kind, "message": why.message, "status": why.status}
        return {"event": self.name, "time": self.time, **plain}

    def __str__(self) -> str:
        return f"{self.name}: {self.exit.message} (status {self.exit.status})"
