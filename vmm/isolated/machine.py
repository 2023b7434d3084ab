"""`Machine(config, isolate=True)`: a machine whose every call is made in a process of its own."""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import contextmanager, suppress

from vmm import config_paths, descriptors
from vmm.config import MachineConfig
from vmm.config_types import shown
from vmm.console.tail import ConsoleTail
from vmm.errors import HostError, StateError, UsageError, VmmError, call_each
from vmm.forked import drop_in_child
from vmm.isolated import grants
from vmm.isolated import process as calls
from vmm.isolated.functions import FunctionServer, of_connections, of_range
from vmm.isolated.memory import IsolatedMemory
from vmm.isolated.parts import IsolatedBalloon, IsolatedDevice, IsolatedLink, IsolatedVcpu
from vmm.isolated.process import LONG, QUICK, MachineProcess, need
from vmm.isolated.wire import LateError, WireError
from vmm.machine import exits, unclosed
from vmm.machine.exits import MachineExit
from vmm.machine.machine import CLOSED, CREATED, Machine
from vmm.machine.vcpu_thread import PAUSED, RUNNING, STOPPED
from vmm.virtio import unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import Any, NoReturn

    from vmm.kvm.vcpu import Vcpu
    from vmm.machine.binding import Read, Write
    from vmm.machine.copies import Copies
    from vmm.machine.event_hub import EventHub
    from vmm.machine.vcpu_thread import VcpuThread
    from vmm.virtio.balloon import Balloon
    from vmm.virtio.device import VirtioDevice

EVENTS: dict[str, int] = {
    "started": 0, "paused": 1, "resumed": 0, "snapshot": 1, "rolled back": 0, "panicked": 1,
    "device error": 1, "stopped": 0,
}  # fmt: skip
"""The events of the machine's process, and how many words each has."""
ENDS_WITHIN = 0.9
"""Seconds `close` gives the machine's process before it is killed."""


class IsolatedMachine(Machine):
    """A machine in a child process of its own; see `Machine`, whose calls it has.

    Attributes:
        process: the machine's.
        lacks: what this host does not give of the sandbox, a line each (`vmm doctor` has the same).
    """

    isolated = True

    def __init__(
        self,
        config: MachineConfig,
        *,
        origin: object = None,
        isolate: bool = True,
        message: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(config, MachineConfig):
            raise UsageError(
                f"Machine: {shown(config)} is not a MachineConfig; Machine(MachineConfig(KERNEL)), "
                "or MachineConfig.load(FILE)"
            )
        self._state = CLOSED
        check(config)
        descriptors.raise_limit()
        self.directory = config_paths.here()
        self.config = config_paths.absolute(config)
        self.origin = None
        self.restored = False
        self.kept_still = 0
        self.doubt = None
        self.moment = threading.RLock()
        self.exit = None
        self.on_error = None
        self.paused_for = ""
        self._prepare_events()
        self.started_at = 0.0
        self.boot = None
        self._lock = threading.RLock()
        self._telling = threading.RLock()
        self._ended = threading.Event()
        self._stamped = threading.Lock()
        self._brokered = threading.Lock()
        self._stamp = 0
        self._closers: list[Callable[[], object]] = []
        self._servers: list[FunctionServer] = []
        self._faults: Any = None
        self._closing = False
        self._lost = False
        self._kept: IsolatedMachine | None = None
        self._asked: MachineExit | None = None
        """What `end` was given."""
        self._tail = ConsoleTail()
        made_for = message or {"machine": self.config.to_dict(defaults=True)}
        self._sockets = _sockets(config_paths.absolute(config))
        drop_in_child(self)
        self.process = MachineProcess()
        try:
            facts = self.process.make(made_for)
            self._take(facts, fixed=message is None)
        except BaseException:
            self.process.close()
            raise
        if message is None:
            config_paths.settle_console(self.config, self.directory)
        self._agent_link = IsolatedLink(self.call, self._tail.bytes)
        self._state = CREATED
        found = weakref.ref(self)
        self.process.listen(found)
        unclosed.watch(self)

    def _take(self, facts: dict[str, Any], *, fixed: bool) -> None:
        """What the process says of the machine it has made."""
        regions = []
        for region in need(facts.get("regions"), list):
            if len(need(region, list)) != 2:
                raise WireError("memory that is not the machine's")
            regions.append((need(region[0], int), need(region[1], int)))
        if not fixed:  # a restored machine: the snapshot says
            self.config = MachineConfig.from_dict(need(facts.get("config"), dict))
        self.restored = need(facts.get("restored"), bool)
        self.lacks = [need(line, str)[:1000] for line in need(facts.get("lacks"), list)[:20]]
        if sum(size for _, size in regions) != self.config.memory or len(regions) > 2:
            raise WireError("memory that is not the machine's")
        self.memory = IsolatedMemory(regions, self.call)
        self._vcpus = [IsolatedVcpu(number, self.call) for number in range(self.config.cpus)]
        self._threads = []

    def __repr__(self) -> str:
        text = super().__repr__().replace(type(self).__name__, "Machine", 1)
        return f"{text[:-1]}; process {self.process.process.pid}>"

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """A call in the machine's process; see `MachineProcess.call`."""
        if self._state == CLOSED and not self._closing:
            raise calls.closed(name)
        return self.process.call(name, *args, **options)

    # --- what the process tells -------------------------------------------------------------------

    def absorb(self, stamp: list[Any]) -> None:
        """See `vmm.isolated.process.Owner`."""
        number, state, why, end = stamp
        with self._stamped:
            if number <= self._stamp or self._lost or self._state == CLOSED:
                return
            self._stamp = number
            if state == "closed":
                return
            self._state = state
            self.paused_for = why
            if state != STOPPED:
                self.exit = None
            elif self.exit is None and end is not None:
                kind, message, status, report = end
                asked = self._asked
                if asked is not None and [asked.kind, asked.status] == [kind, status]:
                    self.exit = asked
                    return
                if kind not in exits.STATUS and kind != exits.EXIT_PORT:
                    raise WireError("an end of no known kind")
                self.exit = MachineExit(kind, message, status=status, report=report)

    def happened(self, frame: dict[str, Any], data: bytes) -> None:
        """See `vmm.isolated.process.Owner`."""
        if "console" in frame:
            self._tail.write(data)
        elif "event" in frame:
            told = need(frame["event"], list)
            name = need(told[0] if told else None, str)
            words = [need(each, str) for each in told[1:]]
            if len(words) != EVENTS.get(name, -1):
                raise WireError("an event that is none")
            self._event(name, words)
        elif "fault" in frame:
            from vmm.isolated.faults import IsolatedFaults

            if isinstance(self._faults, IsolatedFaults):
                self._faults.happened(frame["fault"], frame.get("time"))
        elif "agent" in frame:
            self._agent_link.told()
        else:
            raise WireError("a frame that is none")

    def _event(self, name: str, words: list[str]) -> None:
        if name == "stopped":
            if self.exit is None:
                raise WireError("an end that is none")
            self._has_ended(self.exit)
            return
        if name == "paused" and not words[0]:
            words = []
        if name == "device error" and self.on_error is not None:
            self.on_error(words[0])
        self._tell(name, *words)

    def _has_ended(self, end: MachineExit) -> None:
        """Tell of the end, once."""
        with self._stamped:
            if self._ended.is_set():
                return
        self._agent_link.end(end.message)
        try:
            self._tell("stopped", end)
        finally:
            self._ended.set()  # last: who waits for the end finds it told
            self._kept = None

    def lost(self, why: str) -> None:
        """See `vmm.isolated.process.Owner`."""
        if self._closing or self._state == CLOSED:
            return
        with self._stamped:
            self._lost = True  # what is answered late does not bring it back
            ended = self.exit is not None
            if not ended:
                self.exit = MachineExit(exits.CRASHED, f"the machine's process {why}"[:4096])
                self._state = STOPPED
        self._remove_sockets()
        if self._state == STOPPED and not ended:
            assert self.exit is not None
            self._has_ended(self.exit)
            self._tail.close()

    def _remove_sockets(self) -> None:
        """Remove the sockets of a process that had no time for it."""
        for path in self._sockets:
            unix.remove_stale(path)

    # --- life cycle -------------------------------------------------------------------------------

    def forked(self) -> None:
        """This is a forked child: the machine is its parent's, and closed here."""
        super().forked()
        self._stamped = threading.Lock()
        self._ended.set()

    def close(self) -> None:
        """See `Machine.close`; a process that does not close in time is killed."""
        if self._state == CLOSED:
            return
        with self._stamped:
            if self._closing:
                return
            self._closing = True
        error: BaseException | None = None
        clean = not self.process.over
        if clean:
            try:
                self.process.call("close", seconds=ENDS_WITHIN)
            except Exception as err:
                clean = not self.process.over
                error = err if clean else None
        idle = self.process.close()
        with self._stamped:
            self._lost = True
        if self.started_at and not self._ended.is_set():
            if self.exit is None:
                self.exit = MachineExit(exits.STOPPED, "stopped by the monitor")
            self._state = STOPPED
            self._has_ended(self.exit)
        self._state = CLOSED
        if not clean:
            self._remove_sockets()
        self._tail.close()
        self.memory.close()
        steps: list[Callable[[], object]] = []
        if self._faults is not None:
            steps.append(self._faults.close)
        for server in self._servers:
            idle &= server.close()
        closers, self._closers = self._closers, []
        steps += reversed(closers)
        self._close_events()
        if not idle:
            import warnings

            warnings.warn(
                f"{self!r} is closed while a function of the program, called by its guest or with "
                "an event, has not returned",
                ResourceWarning,
                stacklevel=2,
            )
        self._kept = None
        self._closing = False
        call_each(steps)
        if error is not None:
            raise error

    @property
    def vcpus(self) -> list[Vcpu]:
        """See `Machine.vcpus`."""
        if self._state in (RUNNING, CLOSED):
            raise StateError(f"vcpus: the machine is {self._state}, not created, paused or stopped")
        return list(self._vcpus)

    def virtio_device(self, name: str) -> VirtioDevice:
        """A device's size and rate limits; see `Machine.virtio_device`."""
        need(self.call("device", name), str)
        return IsolatedDevice(name, self.call)  # type: ignore[return-value]  # what of it crosses

    @property
    def balloon(self) -> Balloon:
        """See `Machine.balloon`."""
        if self.config.balloon is None:
            raise StateError("this machine has no balloon; make it with balloon=0")
        return IsolatedBalloon(self.call)  # type: ignore[return-value]  # what of it crosses

    @property
    def faults(self) -> Any:
        """See `Machine.faults`."""
        with self._lock:
            if self._faults is None:
                from vmm.isolated.faults import IsolatedFaults

                self._faults = IsolatedFaults(self)
            return self._faults

    @property
    def console(self) -> ConsoleTail:
        """See `Machine.console`."""
        return self._tail

    def flush(self) -> None:
        """See `Machine.flush`."""
        if not self.process.over:
            self.call("flush")

    def send(self, text: str | bytes) -> None:
        """See `Machine.send`."""
        if self._state not in (RUNNING, PAUSED):
            raise StateError(f"send: the machine is {self._state}, not running or paused")
        data = text.encode() if isinstance(text, str) else text
        view = memoryview(data)
        while view:
            self.call("send", data=view[: 1 << 16])
            view = view[1 << 16 :]

    def start_parked(self) -> None:
        """See `Machine.start_parked`."""
        self._start("start_parked")

    def let_go(self) -> None:
        """See `Machine.let_go`."""
        self.call("let_go")

    def start(self) -> None:
        """See `Machine.start`."""
        self._start("start")

    def _start(self, call: str) -> None:
        with self._lock:
            self.need("start", CREATED)
            self._kept = self  # it runs: who forgets it is told so at the process's end
            self.started_at = time.monotonic()
            self._tail.before_wait = self._before_console_wait
            try:
                self.call(call)
            except BaseException:
                self._kept = None
                raise

    def pause(self) -> None:
        """See `Machine.pause`. A process that does not answer within a second is killed."""
        self.need("pause", RUNNING)
        self.call("pause", seconds=QUICK)

    def resume(self) -> None:
        """See `Machine.resume`."""
        self.need("resume", PAUSED)
        self.call("resume", seconds=QUICK)

    @property
    def in_vcpu_thread(self) -> bool:
        """False: vCPUs' threads are another process's."""
        return False

    def wait_parked(self) -> None:
        """See `Machine.wait_parked`."""
        if self._state == PAUSED:
            self.call("wait_parked")

    def unplug(self) -> None:
        """See `Machine.unplug`."""
        if self._state not in (CREATED, CLOSED):
            with suppress(VmmError):
                self.call("unplug", seconds=QUICK)

    def stop(self) -> MachineExit:
        """See `Machine.stop`. A process that does not answer within a second is killed."""
        if self._state == CLOSED:
            if self.exit is None:
                raise StateError("stop: the machine is closed, and was never started")
            return self.exit
        if not self._ended.is_set():
            try:
                self.call("stop", seconds=QUICK)
            except HostError:
                if not self.process.over:
                    raise
            self._ended.wait(QUICK)
        self._join()
        if self.exit is None:
            self.exit = MachineExit(exits.STOPPED, "stopped by the monitor")
        return self.exit

    def power_button_unseen(self) -> str:
        """See `Machine.power_button_unseen`."""
        if self._state != RUNNING:
            return f"the machine is {self._state}"
        return str(need(self.call("power_button_unseen"), str))

    def press_power_button(self) -> None:
        """See `Machine.press_power_button`."""
        if self._state in (CREATED, CLOSED):
            raise StateError(f"press_power_button: the machine is {self._state}, not running")
        if not self.process.over:
            self.call("press_power_button")

    def resize_console(self, cols: int, rows: int) -> None:
        """See `Machine.resize_console`."""
        self.call("resize_console", cols, rows)

    def end(self, reason: MachineExit) -> None:
        """See `Machine.end`."""
        if self._ended.is_set() or self._state == CLOSED:
            return
        self._asked = reason
        with suppress(HostError):
            self.call(
                "end", reason.kind, reason.message[:4096], reason.status, reason.report[: 64 << 10],
                seconds=QUICK,
            )  # fmt: skip

    def _join(self) -> None:
        """The machine has ended: bring out the last of its output."""
        if self._state == CLOSED:
            return
        if not self.process.over:
            with suppress(VmmError):
                self.call("join")
        self._tail.close()

    def _before_console_wait(self) -> None:
        if self._ended.is_set():
            self._join()
        elif not self.process.over:
            with suppress(VmmError):
                self.call("flush")

    def _agent(self) -> IsolatedLink:
        if not self.config.agent:
            raise StateError("this machine has no agent in the guest; make it with agent=True")
        if self._state in (CREATED, CLOSED):
            raise StateError(f"the guest's agent: the machine is {self._state}, not running")
        return self._agent_link

    # --- moments ----------------------------------------------------------------------------------

    def snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        disks: str = "copy",
        track: bool = False,
    ) -> None:
        """See `Machine.snapshot`."""
        from vmm.machine.moments import _path

        options: dict[str, Any] = {"disks": disks, "track": track}
        where = os.path.abspath(_path("snapshot", "path", path))
        below = None if base is None else os.path.abspath(_path("snapshot", "base", base))
        if below is not None:
            options["base"] = below
        channel = self.process.process.grants
        with self._granted("snapshot", grants.making(channel, where, below)):
            self.call("snapshot", where, options, seconds=LONG)

    @contextmanager
    def _granted(self, call: str, grant: AbstractContextManager[None] | None) -> Iterator[None]:
        """With the broker of the machine's process told of what it may do meanwhile."""
        if grant is None:
            yield
            return
        if self._state == CLOSED:
            raise calls.closed(call)
        with self._brokered:
            try:
                with grant:
                    yield
            except (WireError, LateError) as err:
                if self.process.over:
                    raise self.process.gone(call) from None
                raise HostError(f"{call}: the broker of the machine's process: {err}") from None

    def _overlays(self) -> AbstractContextManager[None] | None:
        """That overlays may be made, where a disk has one."""
        config = self.config
        if config.root is None and not any(drive.snapshot for drive in config.drives):
            return None
        directory = os.environ.get("TMPDIR") or "/var/tmp"
        return grants.overlays(self.process.process.grants, directory)

    def checkpoint(self, *, disks: str = "rollback") -> None:
        """See `Machine.checkpoint`."""
        with self._granted("checkpoint", self._overlays()):
            self.call("checkpoint", disks, seconds=LONG)

    def rollback(self) -> None:
        """See `Machine.rollback`."""
        ended = self._ended.is_set()
        if ended and not self.process.over:
            self._reopen_events()
            self._tail.reopen()
            self._agent_link.revive()
            self._ended.clear()
            self._kept = self
        try:
            with self._granted("rollback", self._overlays()):
                self.call("rollback", seconds=LONG)
        finally:
            if ended and self._state == STOPPED and self.exit is not None:
                self._ended.set()

    def clone(self, count: int = 1) -> Copies:
        """StateError: copies would be in the machine's own process."""
        raise StateError(
            "clone: a machine in a process of its own is not copied; snapshot() keeps it, and "
            "Machine.restore(DIR, isolate=True) makes any number of machines of that"
        )

    # --- the program ------------------------------------------------------------------------------

    @property
    def _events(self) -> EventHub:
        with self._telling:
            if self._hub is None:
                from vmm.machine.event_hub import EventHub

                self._hub = EventHub(
                    self._notes, self._tail, lambda: None, self.monitor_failed,
                    self._state in (STOPPED, CLOSED),
                )  # fmt: skip
            return self._hub

    def bind_port(
        self, port: int, size: int = 1, *, read: Read | None = None, write: Write | None = None
    ) -> Callable[[], None]:
        """See `Machine.bind_port`; the functions are called in a thread of this process."""
        return self._bind("port", port, size, read, write)

    def bind_mmio(
        self, gpa: int, size: int, *, read: Read | None = None, write: Write | None = None
    ) -> Callable[[], None]:
        """See `Machine.bind_mmio`; the functions are called in a thread of this process."""
        return self._bind("mmio", gpa, size, read, write)

    def _bind(
        self, kind: str, base: int, size: int, read: Read | None, write: Write | None
    ) -> Callable[[], None]:
        from vmm.machine.binding import Bound, quiescent

        quiescent(self, f"bind_{kind}")
        bound = Bound(f"{kind} {base:#x}..{base + size - 1:#x}", read, write)
        server = FunctionServer(
            self.process, of_range(bound, size), self.monitor_failed, f"vmm-{kind}-{base:#x}"
        )
        try:
            number = need(
                self.call(
                    "bind", kind, base, size, [read is not None, write is not None],
                    fds=[server.theirs.fileno()],
                ),
                int,
            )  # fmt: skip
        except BaseException:
            server.close()
            raise
        finally:
            server.theirs.close()
        self._servers.append(server)

        def unbind() -> None:
            if self._state != CLOSED and not self.process.over:
                self.call("unbind", number)
            server.close()

        return unbind

    def claim_vsock(self, port: int, serve: Callable[[socket.socket], None]) -> ClaimedPort:
        """See `vmm.machine.vsock_binding.claim`."""
        server = FunctionServer(
            self.process, of_connections(serve), self.monitor_failed, f"vmm-vsock-{port}"
        )
        try:
            self.call("bind_vsock", port, fds=[server.theirs.fileno()])
        except BaseException:
            server.close()
            raise
        finally:
            server.theirs.close()
        self._servers.append(server)
        return ClaimedPort(self, server)

    # --- what does not cross ----------------------------------------------------------------------

    @property
    def vcpu_threads(self) -> tuple[VcpuThread, ...]:
        """None are this process's."""
        return ()

    def _elsewhere(self, name: str) -> NoReturn:
        raise StateError(
            f"{name}: the machine has a process of its own, where that is; a machine without "
            "isolate=True has it here"
        )

    @property
    def platform(self) -> NoReturn:  # type: ignore[override]
        """StateError: devices are the other process's."""
        self._elsewhere("platform")

    @property
    def kvm(self) -> NoReturn:  # type: ignore[override]
        """StateError, as of `platform`."""
        self._elsewhere("kvm")

    @property
    def vm(self) -> NoReturn:  # type: ignore[override]
        """StateError, as of `platform`."""
        self._elsewhere("vm")

    def pause_for(self, why: str) -> None:
        """StateError: it is for devices."""
        self._elsewhere("pause_for")

    def panicked(self, event: str) -> None:
        """StateError: it is for devices."""
        self._elsewhere("panicked")

    def vcpu_exit(self, thread: VcpuThread, reason: int) -> bool:
        """StateError: it is for vCPUs' threads."""
        self._elsewhere("vcpu_exit")

    def revive(self) -> None:
        """StateError: it is for `rollback`."""
        self._elsewhere("revive")

    def at_close(self, function: Callable[[], object]) -> None:
        """Have `function` called when the machine is closed."""
        self._closers.append(function)


class ClaimedPort:
    """A vsock port whose connections the program takes; `host.bind(port, None)` ends that."""

    def __init__(self, machine: IsolatedMachine, server: FunctionServer) -> None:
        self._machine = machine
        self._server = server
        self.host = self

    def bind(self, port: int, function: None) -> None:
        """Take no more connections."""
        machine = self._machine
        if machine.state not in (CLOSED, STOPPED) and not machine.process.over:
            with suppress(HostError):
                machine.call("unbind_vsock", port)
        self._server.close()


def check(config: MachineConfig) -> None:
    """UsageError where the configuration has what only a machine of this process can have."""
    if config.devices:
        raise UsageError(
            "devices: a program's own devices cannot be in a process of the machine's own; "
            "leave isolate=True out, or bind functions (bind_port, bind_mmio, bind_vsock)"
        )
    if config.console_where == "auto":
        raise UsageError(
            f"--console {config.console}: this process's terminal is not the machine's process's; "
            "with isolate=True it is one of none, file:PATH, pty"
        )
    for net in config.nets:
        if net.kind == "lan":
            raise UsageError(
                f"{net.what}: a LAN joins machines of one process, and isolate=True gives each its "
                "own; socket=PATH, bridge=BR or user"
            )


def restore(path: str, options: dict[str, Any], changed: dict[str, Any]) -> IsolatedMachine:
    """See `Machine.restore`, with `isolate`."""
    given = MachineConfig(**changed) if changed else MachineConfig()
    check(given)
    plain = config_paths.absolute(given).to_dict(defaults=True)
    unknown = changed.keys() - plain.keys()
    message = {
        "restore": [
            os.path.abspath(path), options,
            {key: plain[key] for key in changed if key not in unknown},
        ]
    }  # fmt: skip
    return IsolatedMachine(given, message=message)


def _sockets(config: MachineConfig) -> list[str]:
    """The sockets that the machine's process makes in the file system."""
    found = [port.socket for port in config.ports if port.socket]
    if config.vsock is not None and config.vsock.path and not config.vsock.vhost:
        found.append(config.vsock.path)
    return found
