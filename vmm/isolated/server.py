"""The machine's process: one machine, served to the program at the other end of its connections.

The first frame on the control connection says which machine to make. Once it is made the process is
locked down, and each further frame brings a connection, which a thread of its own serves: one call
after the other. Events and console output go the other way by `Outgoing`. When the program has gone
the machine is closed, and the process ends.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from contextlib import suppress

from vmm.errors import StateError, UsageError, VmmError
from vmm.isolated import kvm_calls, values, wire
from vmm.isolated.wire import Channel, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.events import Event
    from vmm.machine import Machine, MachineExit

END_WITHIN = 1.0
"""Seconds the machine has to close once the program has gone."""
CONSOLE_MAX = 4 << 20
"""Bytes of console output that wait for the program; of more, the oldest are dropped."""
EVENTS_MAX = 10_000
"""Frames that wait for the program; of more, the oldest are dropped."""
AGENT_LOOK = 0.5
"""Seconds one call waits for the agent."""


def preload() -> None:
    """Load, in the zygote, what machines' processes need."""
    import importlib

    for name in (
        *("vmm.libc", "vmm.config_file", "vmm.config_paths", "vmm.events", "vmm.machine"),
        *("vmm.machine.platform", "vmm.machine.virtio", "vmm.machine.failure"),
        *("vmm.machine.halted", "vmm.machine.event_hub", "vmm.machine.peers", "vmm.boot"),
        *(
            "vmm.boot.registers",
            "vmm.boot.loader",
            "vmm.cpu",
            "vmm.tables.acpi",
            "vmm.tables.mptable",
        ),
        *("vmm.kvm", "vmm.block.drive", "vmm.block.raw", "vmm.virtio.blk", "vmm.virtio.net"),
        *("vmm.virtio.console", "vmm.virtio.rng", "vmm.virtio.balloon", "vmm.virtio.vsock"),
        *("vmm.virtio.loop", "vmm.virtio.vsock_host", "vmm.agent.link", "vmm.agent.archive"),
        *("vmm.block.vhost_user", "vmm.virtio.vhost_user"),
        *("vmm.virtio.fs", "vmm.net.config", "vmm.snapshot.checkpoint", "vmm.snapshot.store"),
        *("vmm.snapshot.restore", "vmm.faults", "vmm.isolated.values", "vmm.isolated.grants"),
        *("vmm.machine.confined", "vmm.sandbox.broker", "vmm.sandbox.filter_build"),
        *("vmm.snapshot.chain", "vmm.report", "traceback"),
    ):
        importlib.import_module(name)


def serve(control_fd: int, stream_fd: int, grants_fd: int) -> None:
    """Make the machine, and serve it until the program has gone."""
    from vmm.isolated import grants
    from vmm.machine import confined
    from vmm.sandbox.broker import Broker
    from vmm.snapshot import trust

    broker = Broker(grants.serve)
    control = Channel(socket.socket(fileno=control_fd))
    outgoing = Outgoing(Channel(socket.socket(fileno=stream_fd)))
    message, _, _ = control.receive()
    try:
        machine = _make(message)
        server = Server(machine, outgoing)
        trust.prepare(machine.config, machine.directory)  # for its snapshots
        broker.hand_over(grants_fd)
        lacks = confined.confine(machine, broker=broker, leases=True)
        os.close(grants_fd)
    except Exception as err:
        control.send({"error": values.pack_error(err)})
        return
    outgoing.start()
    control.send({"ok": {**server.facts(), "lacks": [str(lack) for lack in lacks]}})
    try:
        while True:
            _, _, fds = control.receive()
            for fd in fds:
                channel = Channel(socket.socket(fileno=fd))
                threading.Thread(target=server.answer, args=(channel,), daemon=True).start()
    except WireError:
        pass  # the program has gone, or is done with the machine
    limit = threading.Timer(END_WITHIN, os._exit, (0,))
    limit.daemon = True
    limit.start()
    machine.close()


def _make(message: Any) -> Machine:
    """The machine that the program asks for."""
    from vmm.config import MachineConfig
    from vmm.machine import Machine

    if "restore" in message:
        path, options, changed = message["restore"]
        from vmm.config_file import keywords

        return Machine.restore(path, **options, **keywords(changed))  # type: ignore[arg-type]
    return Machine(MachineConfig.from_dict(message["machine"]))


class Outgoing:
    """What the program is told without asking: frames in order, written by a thread of their own.

    Who tells never waits: a program that does not listen loses the oldest, as it does with an
    event stream that it does not read.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._waiting: deque[tuple[dict[str, Any], bytearray]] = deque()
        self._bytes = 0
        self._number = 0
        self._lock = threading.Lock()
        self._some = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._write, name="vmm-events", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    @property
    def mark(self) -> int:
        """The number of the last frame; frames count from 1."""
        with self._lock:
            return self._number

    def tell(self, frame: dict[str, Any]) -> None:
        """One more frame."""
        with self._some:
            self._put(frame, bytearray())

    def console(self, data: bytes) -> None:
        """Output of the guest."""
        with self._some:
            view = memoryview(data)
            while view:
                part = view[: 64 << 10]
                last = self._waiting[-1] if self._waiting else None
                if last is not None and "console" in last[0] and len(last[1]) < 64 << 10:
                    last[1].extend(part)
                    self._number += 1
                    last[0]["n"] = self._number
                    self._some.notify()
                else:
                    self._put({"console": 1}, bytearray(part))
                self._bytes += len(part)
                view = view[len(part) :]
            while self._bytes > CONSOLE_MAX:
                self._drop(lambda frame: "console" in frame)

    def _put(self, frame: dict[str, Any], data: bytearray) -> None:
        self._number += 1
        frame["n"] = self._number
        if len(self._waiting) >= EVENTS_MAX:
            self._drop(lambda frame: frame.get("event", [""])[0] != "stopped")
        self._waiting.append((frame, data))
        self._some.notify()

    def _drop(self, which: Callable[[dict[str, Any]], bool]) -> None:
        for place, (frame, data) in enumerate(self._waiting):
            if which(frame):
                self._bytes -= len(data)
                del self._waiting[place]
                return
        self._bytes = 0

    def _write(self) -> None:
        while True:
            with self._some:
                while not self._waiting:
                    self._some.wait()
                frame, data = self._waiting.popleft()
                self._bytes -= len(data)
            try:
                self._channel.send(frame, bytes(data))
            except WireError:
                return  # the program has gone, which the main thread finds out


class Server:
    """Answers calls on `machine`, from any number of connections at once."""

    def __init__(self, machine: Machine, outgoing: Outgoing) -> None:
        from vmm.machine.event_hub import KINDS

        self.machine = machine
        self._outgoing = outgoing
        self._lock = threading.Lock()
        self._stamps = 0
        self._bound: dict[int, tuple[Callable[[], object], Channel]] = {}
        self._faults: dict[int, Any] = {}
        self._fault_events = False
        machine.subscribe(self._happened, *KINDS.values())
        machine.console.on_write = outgoing.console

    # --- what the program is told -----------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What the program knows of the machine from its beginning."""
        machine = self.machine
        return {
            "config": machine.config.to_dict(defaults=True),
            "restored": machine.restored,
            "regions": [[region.gpa, region.size] for region in machine.memory.regions],
            "stamp": self._stamp(),
        }

    def _stamp(self) -> list[object]:
        """[number, state, why it is paused, its end]: of two stamps the one with the higher number
        was taken later."""
        with self._lock:
            self._stamps += 1
            machine = self.machine
            end = machine.exit
            return [
                self._stamps, machine.state, machine.paused_for, None if end is None else _end(end)
            ]  # fmt: skip

    def _happened(self, event: Event) -> None:
        if event.name == "stopped":
            self.machine.platform.flush()  # what was printed before comes before
            told: list[object] = []
        else:
            told = list(event.values().values())
        self._outgoing.tell(
            {"event": [event.name, *told], "time": event.time, "stamp": self._stamp()}
        )

    def _fault_event(self, event: Any) -> None:
        plain = event.to_dict()
        told = [event.device, event.kind, event.what, plain["details"]]
        self._outgoing.tell({"fault": told, "time": event.time})

    # --- calls ------------------------------------------------------------------------------------

    def answer(self, channel: Channel) -> None:
        """Answer the calls that come on one connection, until it is closed."""
        while True:
            try:
                message, data, fds = channel.receive()
            except WireError:
                channel.close()
                return
            answer: dict[str, Any] = {}
            out, out_fds, after = b"", [], None
            try:
                call = _CALLS[message["call"]]
                result = call(self, data, fds, *message["args"])
                if isinstance(result, Handed):
                    out_fds, after = [result.fd], result.close
                elif isinstance(result, (bytes, bytearray)):
                    out = bytes(result)
                else:
                    answer["ok"] = result
                wire.dumps(answer)
            except BaseException as err:
                answer = {"error": values.pack_error(err)}
            answer["stamp"], answer["mark"] = self._stamp(), self._outgoing.mark
            try:
                channel.send(answer, out, out_fds)
            except WireError:
                channel.close()
                return
            finally:
                if after is not None:
                    after()

    def _end_call(self, data: bytes, fds: list[int], *told: Any) -> None:
        from vmm.machine import MachineExit

        kind, message, status, report = told
        self.machine.end(MachineExit(kind, message, status=status, report=report))

    def _join(self, data: bytes, fds: list[int]) -> None:
        """The machine has ended: bring out the last of its output."""
        self.machine.wait(0)

    def _memory_read(self, data: bytes, fds: list[int], gpa: int, size: int) -> bytes:
        return self.machine.memory.read(gpa, size)

    def _memory_write(self, data: bytes, fds: list[int], gpa: int) -> None:
        self.machine.memory.write(gpa, data)

    def _memory_fill(self, data: bytes, fds: list[int], gpa: int, size: int, byte: int) -> None:
        self.machine.memory.fill(gpa, size, byte)

    def _vcpu(self, data: bytes, fds: list[int], number: int, name: str, *args: Any) -> object:
        from vmm.kvm.ffi import ffi, new

        call = getattr(self.machine.vcpus[number], name)
        way, _, what = name.partition("_")
        if what in kvm_calls.STRUCTS:
            if way == "get":
                return bytes(ffi.buffer(call()))
            struct = new(kvm_calls.STRUCTS[what])
            ffi.buffer(struct)[:] = data
            call(struct)
            return None
        if name in kvm_calls.AREAS_OUT:
            return bytes(call())
        if name in kvm_calls.AREAS_IN:
            call(bytearray(data))
            return None
        if name == "get_msrs":
            return list(map(list, call(*args).items()))
        if name not in kvm_calls.PLAIN:
            raise UsageError(f"vcpus[{number}].{name} does not cross")
        return call(*args)

    def _balloon(self, data: bytes, fds: list[int], name: str, *args: Any) -> object:
        balloon = self.machine.balloon
        if name in ("target", "stats"):
            return getattr(balloon, name)(*args)
        return int(getattr(balloon, name)) if name in ("wanted", "actual", "given_back") else None

    def _device(self, data: bytes, fds: list[int], name: str) -> str:
        return type(self.machine.virtio_device(name)).__name__

    def _resize(self, data: bytes, fds: list[int], name: str, *size: int) -> int:
        device = self.machine.virtio_device(name)
        if not hasattr(device, "resize"):
            raise StateError(f"{name}: a {type(device).__name__} has no size")
        return int(device.resize(*size))

    def _limit(self, data: bytes, fds: list[int], name: str, which: str, rates: Any) -> list[int]:
        limit = getattr(self.machine.virtio_device(name), which, None)
        if which not in ("limit", "rx_limit", "tx_limit") or limit is None:
            raise StateError(f"{name} has no {which}")
        if rates:
            limit.change(**rates)
        return list(limit.rates)

    def _snapshot(self, data: bytes, fds: list[int], path: str, options: dict[str, Any]) -> None:
        self.machine.snapshot(path, **options)

    # --- the agent --------------------------------------------------------------------------------

    def _agent_wait(self, data: bytes, fds: list[int], seconds: float) -> bool:
        """Whether the agent is there, within `seconds` or AGENT_LOOK."""
        link = self.machine._agent()
        until = time.monotonic() + min(seconds, AGENT_LOOK)
        changed = threading.Event()
        while not link.ready:
            left = until - time.monotonic()
            if left <= 0:
                return False
            link.when_ready(changed.set)
            if not link.ready:
                changed.wait(left)
            changed.clear()
        return True

    def _agent_watch(self, data: bytes, fds: list[int]) -> None:
        self.machine._agent().when_ready(lambda: self._outgoing.tell({"agent": 1}))

    def _agent_connect(self, data: bytes, fds: list[int]) -> Handed:
        sock = self.machine._agent().connect()
        return Handed(sock.fileno(), sock.close)

    # --- functions of the program -----------------------------------------------------------------

    def _bind(
        self, data: bytes, fds: list[int], kind: str, base: int, size: int, how: list[bool]
    ) -> int:
        remote = RemoteFunction(fds)
        machine = self.machine
        bind = machine.bind_port if kind == "port" else machine.bind_mmio
        read = remote.read if how[0] else None
        write = remote.write if how[1] else None
        try:
            unbind = bind(base, size, read=read, write=write)
        except BaseException:
            remote.channel.close()
            raise
        with self._lock:
            number = len(self._bound) + 1
            while number in self._bound:
                number += 1
            self._bound[number] = unbind, remote.channel
        return number

    def _unbind(self, data: bytes, fds: list[int], number: int) -> None:
        with self._lock:
            found = self._bound.get(number)
        if found is not None:
            found[0]()
            with self._lock:
                self._bound.pop(number, None)
            found[1].close()

    def _bind_vsock(self, data: bytes, fds: list[int], port: int) -> None:
        from vmm.machine.vsock_binding import claim

        channel = Channel(socket.socket(fileno=fds[0]))

        def serve(sock: socket.socket) -> None:
            """On the device's loop: the program takes a few frames before it must read any."""
            with suppress(VmmError):  # it has gone, or takes none
                channel.send({"n": port}, fds=[sock.fileno()], patience=wire.Patience(wire.SLICE))
            sock.close()

        try:
            claim(self.machine, port, serve)
        except BaseException:
            channel.close()
            raise

    def _unbind_vsock(self, data: bytes, fds: list[int], port: int) -> None:
        from vmm.machine.vsock_binding import device_of

        device_of(self.machine).host.bind(port, None)

    # --- faults -----------------------------------------------------------------------------------

    def _fault(
        self, data: bytes, fds: list[int], path: list[Any], name: str, args: Any, options: Any
    ) -> object:
        functions = list(fds)

        def special(kind: str, inner: Any) -> object:
            if kind == "$function":
                return RemoteFunction([functions.pop(0)]).match
            raise WireError(f"{kind} is no kind of value")

        faults: Any = self.machine.faults
        if not self._fault_events:
            from vmm.faults import FaultEvent

            self._fault_events = True
            self.machine.subscribe(self._fault_event, FaultEvent)
        target = getattr(faults, path[0])(*path[1:]) if path else faults
        found = getattr(target, name)
        if callable(found):
            found = found(
                *(values.unpack(each, special) for each in args),
                **{key: values.unpack(each, special) for key, each in options.items()},
            )
        return values.pack(found, self._packed)

    def _packed(self, value: object) -> object:
        from vmm.faults import Fault
        from vmm.faults.volatile import Cut

        if isinstance(value, Fault):
            with self._lock:
                self._faults[id(value)] = value
            details = {key: values.pack(each, _named) for key, each in value._details.items()}
            return {"$fault": [id(value), value.device, value.kind, details]}
        if isinstance(value, Cut):
            return {"$cut": [value.lost, value.kept, value.torn]}
        raise TypeError(f"{value!r} does not cross")

    def _of_fault(self, data: bytes, fds: list[int], number: int, name: str) -> object:
        fault = self._faults[number]
        if name == "clear":
            fault.clear()
            return None
        if name == "log":
            return values.pack(list(fault.log)[-1000:], _named)
        return fault.count if name == "count" else fault.active

    def _close(self, data: bytes, fds: list[int]) -> None:
        self.machine.close()


class Handed:
    """An answer that is a descriptor; `close` is called when it was sent."""

    __slots__ = ("close", "fd")

    def __init__(self, fd: int, close: Callable[[], object]) -> None:
        self.fd = fd
        self.close = close


class RemoteFunction:
    """A function of the program, called over a connection of its own; one call at a time."""

    def __init__(self, fds: list[int]) -> None:
        self.channel = Channel(socket.socket(fileno=fds.pop(0)))
        self._lock = threading.Lock()

    def _call(self, message: object, data: bytes = b"") -> Any:
        with self._lock:
            self.channel.send(message, data)
            answer, _, _ = self.channel.receive()
        if "ok" not in answer:
            raise VmmError("a function of the program has raised")
        return answer["ok"]

    def read(self, offset: int, size: int) -> int:
        """What the guest reads."""
        return self._call(["read", offset, size])  # type: ignore[no-any-return]

    def write(self, offset: int, size: int, value: int) -> None:
        """What it writes."""
        self._call(["write", offset, size, value])

    def match(self, frame: bytes) -> bool:
        """Whether a frame of a network card is meant."""
        return bool(self._call(["match"], bytes(frame)))


def _end(end: MachineExit) -> list[object]:
    return [end.kind, end.message[:4096], end.status, end.report[: 64 << 10]]


def _named(value: object) -> object:
    """Of a function, or another thing of no value, its name."""
    return getattr(value, "__name__", repr(value))


def _simple(name: str) -> Callable[..., object]:
    """A call of the machine without an answer."""

    def call(server: Server, data: bytes, fds: list[int], *args: Any) -> None:
        getattr(server.machine, name)(*args)

    return call


def _answering(name: str) -> Callable[..., object]:
    """A call of the machine whose answer is plain."""

    def call(server: Server, data: bytes, fds: list[int], *args: Any) -> object:
        return getattr(server.machine, name)(*args)

    return call


_CALLS: dict[str, Callable[..., Any]] = {
    **{
        name: _simple(name)
        for name in (
            *("start", "start_parked", "let_go", "pause", "resume", "stop", "wait_parked"),
            *("press_power_button", "resize_console", "rollback", "unplug"),
        )
    },
    "power_button_unseen": _answering("power_button_unseen"),
    "checkpoint": lambda server, data, fds, disks: server.machine.checkpoint(disks=disks),
    "send": lambda server, data, fds: server.machine.send(data),
    "flush": lambda server, data, fds: server.machine.platform.flush(),
    "end": Server._end_call,
    "join": Server._join,
    "memory.read": Server._memory_read,
    "memory.write": Server._memory_write,
    "memory.fill": Server._memory_fill,
    "vcpu": Server._vcpu,
    "balloon": Server._balloon,
    "device": Server._device,
    "resize": Server._resize,
    "limit": Server._limit,
    "snapshot": Server._snapshot,
    "agent.wait": Server._agent_wait,
    "agent.watch": Server._agent_watch,
    "agent.connect": Server._agent_connect,
    "bind": Server._bind,
    "unbind": Server._unbind,
    "bind_vsock": Server._bind_vsock,
    "unbind_vsock": Server._unbind_vsock,
    "fault": Server._fault,
    "fault.of": Server._of_fault,
    "close": Server._close,
}
