"""What every fault has: a seeded choice of what it strikes, a log of it, and an end."""

from __future__ import annotations

import threading
from collections import Counter, deque
from random import Random
from typing import Protocol

from vmm.errors import StateError, UsageError
from vmm.events import Event
from vmm.faults.schedule import Schedule

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Self

    from vmm.virtio.device import VirtioDevice


LOG_LIMIT = 10_000
"""Events kept of a machine's faults, and of each fault what it met."""
EVENTS = 100
"""How many strikes of a fault are events; `Fault.log` has more, `count` all."""


class Control:
    """What the faults of one machine share.

    Args:
        seed: see `reseed`.
        emit: told of each event.
        failed: told of an exception in the thread that ends delays.

    Attributes:
        faults: those that are set, oldest first.
        log: their events, oldest first.
        schedule: what ends delays.
        lock: held while `faults` changes.
    """

    def __init__(
        self,
        seed: int = 0,
        emit: Callable[[FaultEvent], object] | None = None,
        failed: Callable[[BaseException], object] = bool,
    ) -> None:
        self.lock = threading.RLock()
        self.faults: tuple[Fault, ...] = ()
        self.log: deque[FaultEvent] = deque(maxlen=LOG_LIMIT)
        self.schedule = Schedule(failed)
        self.closed = False
        self._emit = emit
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Whatever faults set from now on leave to chance follows from `seed`, and from nothing
        else but the order in which they are set and what comes by them."""
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UsageError(f"faults.seed: {seed!r} is not an integer")
        with self.lock:
            self.seed = seed
            self._streams: Counter[tuple[str, str]] = Counter()

    def stream(self, device: str, kind: str) -> Random:
        """Random numbers for one fault: how many others use up does not change them."""
        with self.lock:
            number = self._streams[device, kind]
            self._streams[device, kind] += 1
            return Random(f"{self.seed}/{device}/{kind}/{number}")

    def record(self, device: str, kind: str, what: str, details: dict[str, object]) -> None:
        """Log an event; `what` is `set`, `cleared` or `struck`."""
        event = FaultEvent(device, kind, what, details)
        self.log.append(event)
        if self._emit is not None:
            self._emit(event)

    def clear(self) -> None:
        """Clear every fault, the newest first."""
        for fault in reversed(self.faults):
            fault.clear()

    def close(self) -> None:
        """Clear every fault, and end the thread."""
        self.clear()
        self.closed = True
        self.schedule.close()


class FaultEvent(Event):
    """A fault was set or cleared, or it struck.

    Attributes:
        device: what it is of: `blk0`, `net0`, `vcpu1`, `machine`, a LAN's name.
        kind: of the fault: `fail`, `loss`, ...
        what: `set`, `cleared` or `struck`.
        details: for `set` what was asked for, for `struck` what it met.
    """

    __slots__ = ("details", "device", "kind", "what")
    name = "fault"

    def __init__(self, device: str, kind: str, what: str, details: dict[str, object]) -> None:
        super().__init__()
        self.device = device
        self.kind = kind
        self.what = what
        self.details = details

    def to_dict(self) -> dict[str, object]:
        details = {name: _plain(value) for name, value in self.details.items()}
        return {**super().to_dict(), "details": details}

    def __str__(self) -> str:
        details = ", ".join(f"{name}={value}" for name, value in self.details.items())
        return f"fault: {self.device} {self.kind} {self.what}{': ' * bool(details)}{details}"


def _plain(value: object) -> object:
    """As JSON may have it: a range as its first and its last, a function as its name."""
    if isinstance(value, range):
        return [value.start, value.stop - 1]
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "__name__", repr(value))


class Fault:
    """A fault that is set; a context manager that clears it at its end.

    Attributes:
        device, kind: as in `FaultEvent`.
        count: how often it struck.
        log: what it met, oldest first.
        active: it is set.
    """

    def __init__(
        self, control: Control, device: str, kind: str, details: dict[str, object]
    ) -> None:
        self.device = device
        self.kind = kind
        self.count = 0
        self.log: deque[dict[str, object]] = deque(maxlen=LOG_LIMIT)
        self.active = False
        self._control = control
        self._details = {name: value for name, value in details.items() if value is not None}

    def __repr__(self) -> str:
        details = ", ".join(f"{name}={value!r}" for name, value in self._details.items())
        state = "" if self.active else ", cleared"
        return f"<fault {self.device} {self.kind}({details}): struck {self.count} times{state}>"

    def set(self) -> Self:
        """Set it; called by who made it."""
        control = self._control
        with control.lock:
            if control.closed:
                raise StateError(f"faults of {self.device}: the machine is closed")
            self.begin()
            self.active = True
            control.faults = (*control.faults, self)
        self.settle()
        control.record(self.device, self.kind, "set", self._details)
        return self

    def clear(self) -> None:
        """The end of it; harmless twice. From any thread."""
        control = self._control
        with control.lock:
            if not self.active:
                return
            self.active = False
            control.faults = tuple(other for other in control.faults if other is not self)
            self.end()
        control.record(self.device, self.kind, "cleared", {"struck": self.count})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()

    def struck(self, **met: object) -> None:
        """It strikes: note what it meets."""
        self.count += 1
        self.log.append(met)
        if self.count <= EVENTS:
            self._control.record(self.device, self.kind, "struck", met)

    def settle(self) -> None:
        """Return when no one goes on who does not know of it yet. Without a lock."""

    # --- for the kinds of fault to override, under the lock ---------------------------------------

    def begin(self) -> None:
        """From now on."""

    def end(self) -> None:
        """No longer."""


class Layer(Protocol):
    """What stands between a device and what it uses, for faults to be put into."""

    control: Control

    @property
    def device(self) -> VirtioDevice:
        """Whose it is."""

    def add(self, fault: Any) -> None:
        """From now on it meets what comes by."""

    def remove(self, fault: Any) -> None:
        """No longer."""


class LayerFault(Fault):
    """A fault in `layer`; see `Fault`."""

    layer: Layer

    def __init__(self, layer: Layer, kind: str, details: dict[str, object]) -> None:
        super().__init__(layer.control, layer.device.name, kind, details)
        self.layer = layer

    def begin(self) -> None:
        self.layer.add(self)

    def end(self) -> None:
        self.layer.remove(self)

    def settle(self) -> None:
        self.layer.device.settle()


class Chance:
    """Which of those that come by are struck.

    Attributes:
        random: for what else the fault leaves to chance.
        seen: how many came by.

    Args:
        where: begins an error's message.
        random: where chance comes from.
        nth: those of these numbers only, counted from 1.
        after: none of the first so many.
        times: so many at most, None: no limit; with `nth` as many as it names.
        probability: of each that is left.

    Raises:
        UsageError: a value that cannot work.
    """

    def __init__(
        self,
        where: str,
        random: Random,
        *,
        nth: int | Iterable[int] | None = None,
        after: int = 0,
        times: int | None = None,
        probability: float = 1.0,
    ) -> None:
        self.random = random
        self._nth = None if nth is None else _numbers(where, nth)
        if not isinstance(after, int) or after < 0:
            raise UsageError(f"{where}: after={after!r} is not a count from 0")
        if times is not None and (not isinstance(times, int) or times < 1):
            raise UsageError(f"{where}: times={times!r} is not a count from 1")
        if not isinstance(probability, int | float) or not 0 <= probability <= 1:
            raise UsageError(f"{where}: probability={probability!r} is not from 0 to 1")
        self._after = after
        self._left = times
        self._probability = probability
        self.seen = 0

    def strikes(self) -> bool:
        """Whether the next one is struck. Not from two threads at once."""
        self.seen += 1
        # Drawn for each, so that what the n-th meets does not depend on other conditions.
        lucky = self._probability < 1 and self.random.random() >= self._probability
        if lucky or self.seen <= self._after or self._left == 0:
            return False
        if self._nth is not None and self.seen not in self._nth:
            return False
        if self._left is not None:
            self._left -= 1
        return True


def _numbers(where: str, nth: int | Iterable[int]) -> frozenset[int]:
    numbers = [nth] if isinstance(nth, int) else list(nth)
    if not numbers or not all(isinstance(each, int) and each >= 1 for each in numbers):
        raise UsageError(f"{where}: nth={nth!r} is not a count from 1, or several")
    return frozenset(numbers)


def seconds(where: str, name: str, value: float) -> float:
    """`value`, where it is a time a fault can take."""
    if not isinstance(value, int | float) or not 0 <= value <= 1e6:
        raise UsageError(f"{where}: {name}={value!r} is not seconds from 0 to a million")
    return float(value)
