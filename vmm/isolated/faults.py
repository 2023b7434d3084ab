"""`machine.faults` of a machine in a process of its own: the same calls, made there."""

from __future__ import annotations

from _thread import allocate_lock
from collections import deque

from vmm.errors import StateError
from vmm.faults.disk import DiskFaults
from vmm.faults.machine import Faults
from vmm.faults.net import NetFaults
from vmm.faults.rules import LOG_LIMIT, Fault, FaultEvent
from vmm.faults.volatile import Cut
from vmm.isolated import values, wire
from vmm.isolated.functions import FunctionServer, of_frames
from vmm.isolated.process import LONG, moment, need
from vmm.isolated.wire import WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from vmm.isolated.machine import IsolatedMachine

FAULTS_MAX = 100_000
"""Faults that a program has set and cleared; more is no use of faults."""


class IsolatedFault(Fault):
    """A fault that is set in the machine's process."""

    def __init__(
        self,
        faults: IsolatedFaults,
        number: int,
        device: str,
        kind: str,
        details: dict[str, object],
    ) -> None:
        self.device = device
        self.kind = kind
        self._details = details
        self._faults = faults
        self._number = number

    def _ask(self, name: str) -> Any:
        return self._faults.machine.call("fault.of", self._number, name)

    @property
    def count(self) -> int:  # type: ignore[override]
        """See `Fault.count`."""
        return int(need(self._ask("count"), int))

    @property
    def active(self) -> bool:  # type: ignore[override]
        """See `Fault.active`."""
        return bool(need(self._ask("active"), bool))

    @property
    def log(self) -> deque[dict[str, object]]:  # type: ignore[override]
        """See `Fault.log`; the last 1000."""
        told = need(values.unpack(self._ask("log")), list)
        return deque(need(each, dict) for each in told)

    def clear(self) -> None:
        """See `Fault.clear`."""
        self._ask("clear")


class IsolatedFaults(Faults):
    """The faults of an isolated machine. All methods from any thread."""

    def __init__(self, machine: IsolatedMachine) -> None:
        self.machine = machine
        self._log: deque[FaultEvent] = deque(maxlen=LOG_LIMIT)
        self._known: dict[int, IsolatedFault] = {}
        self._disk_faults: dict[int, IsolatedDiskFaults] = {}
        self._net_faults: dict[int, IsolatedNetFaults] = {}
        self._functions: list[FunctionServer] = []
        self._lock = allocate_lock()

    def forward(self, path: tuple[Any, ...], name: str, args: Any, options: dict[str, Any]) -> Any:
        """The call `name` of what `path` names, there."""
        servers: list[FunctionServer] = []

        def special(value: object) -> object:
            if not callable(value):
                raise TypeError(f"{value!r} cannot be handed to the machine's process")
            if len(servers) == wire.FDS_MAX:
                raise TypeError(f"more than {wire.FDS_MAX} functions in one call")
            servers.append(
                FunctionServer(
                    self.machine.process, of_frames(value), self.machine.monitor_failed, "vmm-match"
                )
            )
            return {"$function": 1}

        try:
            packed = [values.pack(each, special) for each in args]
            named = {key: values.pack(each, special) for key, each in options.items()}
            result = self.machine.call(
                "fault", list(path), name, packed, named,
                fds=[server.theirs.fileno() for server in servers], seconds=LONG,
            )  # fmt: skip
        except BaseException:
            for server in servers:
                server.close()
            raise
        finally:
            for server in servers:
                server.theirs.close()
        self._functions += servers
        return values.unpack(result, self._unpacked)

    def _unpacked(self, kind: str, inner: Any) -> object:
        if kind == "$cut" and isinstance(inner, list) and len(inner) == 3:
            cut = Cut()
            cut.lost, cut.kept, cut.torn = (need(each, int) for each in inner)
            return cut
        if kind == "$fault" and isinstance(inner, list) and len(inner) == 4:
            number, device, what, details = inner
            with self._lock:
                found = self._known.get(need(number, int))
                if found is None:
                    if len(self._known) >= FAULTS_MAX:
                        raise StateError(f"faults: more than {FAULTS_MAX} were set")
                    found = self._known[number] = IsolatedFault(
                        self, number, need(device, str), need(what, str),
                        need(values.unpack(need(details, dict)), dict),
                    )  # fmt: skip
            return found
        raise WireError(f"{kind[:20]} is no kind of value")

    def happened(self, told: Any, when: object) -> None:
        """An event of a fault, as the process tells it. Raises WireError."""
        if not (
            isinstance(told, list) and len(told) == 4 and isinstance(told[3], dict)
            and all(isinstance(each, str) for each in told[:3])
        ):  # fmt: skip
            raise WireError("an event of a fault that is none")
        event = FaultEvent(told[0], told[1], told[2], told[3])
        event.time = moment(when)
        self._log.append(event)
        self.machine.emit(event)

    def __repr__(self) -> str:
        return "<faults of a machine in a process of its own>"

    @property
    def active(self) -> tuple[Fault, ...]:
        """See `Faults.active`."""
        return tuple(need(each, Fault) for each in self.forward((), "active", (), {}))

    @property
    def log(self) -> list[FaultEvent]:
        """See `Faults.log`."""
        return list(self._log)

    def tell(self, event: FaultEvent) -> None:
        """See `Faults.tell`."""
        self._log.append(event)
        self.machine.emit(event)

    def close(self) -> None:
        """The machine is closed."""
        for server in self._functions:
            server.close()

    def disk(self, number: int = 0) -> DiskFaults:
        """See `Faults.disk`."""
        with self._lock:
            found = self._disk_faults.get(number)
        if found is None:
            found = IsolatedDiskFaults(self, ("disk", number))
            assert isinstance(found.is_volatile, bool)  # asked for: there is such a disk
            with self._lock:
                self._disk_faults[number] = found
        return found

    def net(self, number: int = 0) -> NetFaults:
        """See `Faults.net`."""
        with self._lock:
            found = self._net_faults.get(number)
        if found is None:
            found = IsolatedNetFaults(self, ("net", number))
            self.forward(("net", number), "clear", (), {})  # there is such a card
            with self._lock:
                self._net_faults[number] = found
        return found


class IsolatedDiskFaults(DiskFaults):
    """See `DiskFaults`."""

    def __init__(self, faults: IsolatedFaults, path: tuple[Any, ...]) -> None:
        self._faults = faults
        self._path = path
        self._name = f"faults.disk({path[1]})"


class IsolatedNetFaults(NetFaults):
    """See `NetFaults`."""

    def __init__(self, faults: IsolatedFaults, path: tuple[Any, ...]) -> None:
        self._faults = faults
        self._path = path
        self._name = f"faults.net({path[1]})"


HERE = {
    IsolatedFaults: ("active", "log", "tell", "close", "disk", "net"),
    IsolatedDiskFaults: (),
    IsolatedNetFaults: (),
}
"""What is done in the program."""
REFUSED = (
    "device", "write_log", "write_cut", "cut", "power_cut_image", "power_cut_images",
)  # fmt: skip
"""What only a machine of this process has."""


def _forwarding(name: str, original: Any) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        faults = self if isinstance(self, IsolatedFaults) else self._faults
        path = () if isinstance(self, IsolatedFaults) else self._path
        return faults.forward(path, name, args, options)

    call.__name__, call.__doc__ = name, original.__doc__
    return property(call) if isinstance(original, property) else call


def _refusing(name: str) -> Any:
    def refuse(self: Any, *args: Any, **options: Any) -> NoReturn:
        raise StateError(f"faults: {name}: the machine has a process of its own, where that is")

    return refuse


def _complete() -> None:
    """Give each class the calls of the one it stands for."""
    for kind, here in HERE.items():
        for name, original in vars(kind.__mro__[1]).items():
            if name.startswith("_") or name in here:
                continue
            made: Callable[..., Any] | property = (
                _refusing(name) if name in REFUSED else _forwarding(name, original)
            )
            setattr(kind, name, made)


_complete()
