"""Parts of a machine in a process of its own, as the program has them: vCPUs, devices, balloon,
the way to the agent."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time

from vmm.agent.link import BOOT_WITHIN, LOOK, Link
from vmm.errors import AgentError, StateError, VmmError
from vmm.isolated import kvm_calls
from vmm.isolated.process import need
from vmm.isolated.wire import WireError
from vmm.kvm.ffi import ffi, new
from vmm.kvm.vcpu import Vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, NoReturn

TOLD_WITHIN = 0.3
"""Seconds in which the end of the machine is known, once a connection to it is lost."""
AREA_MAX = 1 << 20
"""Bytes of an XSAVE area or of nested state."""


class IsolatedVcpu(Vcpu):
    """Registers and state of one vCPU; what `Vcpu` has besides raises StateError.

    Args:
        number: its APIC id.
        call: a call to the machine's process.
    """

    __slots__ = ("_remote",)

    def __init__(self, number: int, call: Callable[..., Any]) -> None:
        self.number = number
        self.fd = -1
        self._remote = call

    def close(self) -> None:
        """Nothing is held here."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise StateError(f"vcpus[].{name}: the machine has a process of its own, where that is")

    def _call(self, name: str, *args: Any, data: bytes = b"") -> Any:
        return self._remote("vcpu", self.number, name, *args, data=data)

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """See `Vcpu.get_msrs`."""
        pairs = need(self._call("get_msrs", list(indices)), list)
        wanted = set(indices)
        found: dict[int, int] = {}
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and pair[0] in wanted):
                raise WireError("an MSR that was not asked for")
            found[pair[0]] = need(pair[1], int)
        return found

    def set_msrs(self, msrs: Iterable[tuple[int, int]]) -> list[int]:
        """See `Vcpu.set_msrs`."""
        refused = need(self._call("set_msrs", [list(pair) for pair in msrs]), list)
        return [need(each, int) for each in refused]


def _plain_call(name: str) -> Any:
    def call(self: IsolatedVcpu, *args: Any) -> Any:
        return need(self._call(name, *args), (int, type(None)))

    return call


def _struct_calls(what: str, struct: str) -> tuple[Any, Any]:
    def get(self: IsolatedVcpu) -> Any:
        data = need(self._call(f"get_{what}"), bytes)
        found = new(struct)
        if len(data) != ffi.sizeof(found[0]):
            raise WireError(f"{len(data)} bytes for a {struct}")
        ffi.buffer(found)[:] = data
        return found

    def set_(self: IsolatedVcpu, value: Any) -> None:
        self._call(f"set_{what}", data=bytes(ffi.buffer(value)))

    return get, set_


def _get_area(name: str) -> Any:
    def get(self: IsolatedVcpu) -> Any:
        data = need(self._call(name), bytes)
        if len(data) > AREA_MAX:
            raise WireError(f"{len(data)} bytes of state")
        return data if name == "get_nested_state" else bytearray(data)

    return get


def _set_area(name: str) -> Any:
    def set_(self: IsolatedVcpu, area: bytes | bytearray) -> None:
        self._call(name, data=bytes(area))

    return set_


def _refused(name: str) -> Any:
    def refuse(self: IsolatedVcpu, *args: Any, **options: Any) -> NoReturn:
        raise StateError(f"vcpus[].{name}: the machine has a process of its own, where that is")

    return refuse


def _complete() -> None:
    """Give IsolatedVcpu each call of Vcpu, from the tables of what crosses."""
    made: dict[str, Any] = {name: _plain_call(name) for name in kvm_calls.PLAIN}
    for what, struct in kvm_calls.STRUCTS.items():
        made[f"get_{what}"], made[f"set_{what}"] = _struct_calls(what, struct)
    made |= {name: _get_area(name) for name in kvm_calls.AREAS_OUT}
    made |= {name: _set_area(name) for name in kvm_calls.AREAS_IN}
    for name, value in vars(Vcpu).items():
        if name.startswith("_") or name in vars(IsolatedVcpu) or not callable(value):
            continue
        call = made.get(name) or _refused(name)
        call.__name__, call.__doc__ = name, f"See `Vcpu.{name}`."
        setattr(IsolatedVcpu, name, call)


_complete()


class IsolatedBalloon:
    """See `vmm.virtio.balloon.Balloon`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def target(self, size: int) -> None:
        """See `Balloon.target`."""
        self._call("balloon", "target", size)

    def stats(self, timeout: float = 10.0) -> dict[str, int]:
        """See `Balloon.stats`."""
        told = need(self._call("balloon", "stats", timeout, seconds=timeout + 10.0), dict)
        return {need(key, str): need(value, int) for key, value in told.items()}

    @property
    def wanted(self) -> int:
        """See `Balloon.wanted`."""
        return int(need(self._call("balloon", "wanted"), int))

    @property
    def actual(self) -> int:
        """See `Balloon.actual`."""
        return int(need(self._call("balloon", "actual"), int))

    @property
    def given_back(self) -> int:
        """See `Balloon.given_back`."""
        return int(need(self._call("balloon", "given_back"), int))


class IsolatedDevice:
    """A virtio device: its size and rate limits can be changed; other names raise StateError."""

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.name = name
        self._call = call

    def __repr__(self) -> str:
        return f"<virtio device {self.name} in a process of its own>"

    def resize(self, size: int | None = None) -> int:
        """See `vmm.virtio.blk.Block.resize`."""
        return int(need(self._call("resize", self.name, *([] if size is None else [size])), int))

    def __getattr__(self, name: str) -> IsolatedLimit:
        if name in ("limit", "rx_limit", "tx_limit"):
            return IsolatedLimit(self.name, name, self._call)
        if name.startswith("_"):
            raise AttributeError(name)
        raise StateError(
            f"virtio_device({self.name!r}).{name}: the machine has a process of its own, where "
            "that is; resize() and the limits are here"
        )


class IsolatedLimit:
    """A device's rate limit: `change`, and the `rates` that are in force."""

    def __init__(self, device: str, name: str, call: Callable[..., Any]) -> None:
        self._at = device, name
        self._call = call

    def change(self, **rates: float) -> None:
        """See `vmm.virtio.limit.Limit.change`."""
        self._call("limit", *self._at, rates or {"bytes": 0})

    @property
    def rates(self) -> tuple[float, float]:
        """See `Limit.rates`."""
        told = need(self._call("limit", *self._at, {}), list)
        if len(told) != 2:
            raise WireError("rates that are none")
        return need(told[0], (int, float)), need(told[1], (int, float))


class IsolatedLink(Link):
    """The way to the agent: the machine's process hands over connections to it.

    Commands and files are dealt with in the program, which opens the host's files itself.

    Args:
        call: a call to the machine's process.
        console: the last of the guest's console.
    """

    def __init__(self, call: Callable[..., Any], console: Callable[[], bytes]) -> None:
        self._remote = call
        self._console = console
        self._waiting: list[Callable[[], object]] = []
        self._over = ""
        self._end_known = threading.Event()

    @property
    def ready(self) -> bool:
        """See `Link.ready`."""
        return bool(self._wait_slice(0.0))

    def _wait_slice(self, seconds: float) -> Any:
        if self._over:
            raise AgentError(f"the machine ended before its agent answered: {self._over}")
        try:
            return need(self._remote("agent.wait", seconds), bool)
        except VmmError:
            if self._over:
                raise AgentError(
                    f"the machine ended before its agent answered: {self._over}"
                ) from None
            raise

    def wait(self, timeout: float | None = None) -> None:
        """See `Link.wait`."""
        limit = BOOT_WITHIN if timeout is None else timeout
        until = time.monotonic() + limit
        while True:
            left = until - time.monotonic()
            asked = time.monotonic()
            if self._wait_slice(min(max(left, 0.0), LOOK)):
                return
            if left <= 0:
                raise self.late(limit)
            # A process that answers at once, whatever it is asked, does not keep this one busy.
            time.sleep(max(min(asked + 0.01 - time.monotonic(), left), 0.0))

    def when_ready(self, function: Callable[[], object]) -> None:
        """See `Link.when_ready`."""
        self._waiting.append(function)
        self._remote("agent.watch")

    def told(self) -> None:
        """Something may have changed."""
        waiting, self._waiting = self._waiting, []
        for function in waiting:
            function()

    def end(self, why: str) -> None:
        """See `Link.end`."""
        self._over = why
        self._end_known.set()
        self.told()

    def revive(self) -> None:
        """See `Link.revive`."""
        self._end_known.clear()
        self._over = ""

    def connect(self) -> socket.socket:
        """See `Link.connect`."""
        [fd] = self._remote("agent.connect", want=1)
        return connection(fd)

    def why_lost(self) -> str:
        """See `Link.why_lost`."""
        self._end_known.wait(TOLD_WITHIN)
        if self._over:
            return f"the machine ended: {self._over}"
        return "the connection to the guest's agent is lost"

    def power_off(self) -> None:
        """Done there."""

    def close(self) -> None:
        """Nothing is held here."""


def connection(fd: int) -> socket.socket:
    """The connected UNIX stream socket `fd` that a machine's process has handed over, blocking.
    Raises WireError, and closes it, where it is something else."""
    from vmm.forked import drop_in_child

    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise WireError("a descriptor that is no socket")
        sock = socket.socket(fileno=fd)
    except BaseException:
        os.close(fd)
        raise
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise WireError("a socket of another kind")
    sock.setblocking(True)
    drop_in_child(sock)
    return sock
