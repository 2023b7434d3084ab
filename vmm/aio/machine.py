"""A machine's calls as coroutines."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, TypeVar, overload

from vmm.aio.guest import AsyncGuestCalls
from vmm.aio.thread import in_thread
from vmm.errors import StateError
from vmm.events import Event, Stopped
from vmm.machine import Machine, MachineExit
from vmm.machine.copies import Copies
from vmm.machine.machine import UNSEEN_PATIENCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from vmm.agent.link import Link
    from vmm.aio.vsock import AsyncHandler, AsyncVsockServer
    from vmm.config import MachineConfig
    from vmm.console.tail import ConsoleTail, Pattern
    from vmm.kvm.vcpu import Vcpu
    from vmm.machine.binding import Read, Write
    from vmm.machine.event_hub import EventStream
    from vmm.memory import GuestMemory

T = TypeVar("T")
E = TypeVar("E", bound=Event)


class AsyncMachine(AsyncGuestCalls):
    """A `Machine` whose blocking calls are coroutines; an asynchronous context manager.

    >>> async def boot(config):  # doctest: +SKIP
    ...     async with AsyncMachine(config) as m:
    ...         await m.start()
    ...         await m.wait_for("login:", timeout=30)
    ...         return await m.shutdown()

    Args:
        what: a configuration; the machine is built on entering `async with`. Or a function that
            makes a machine (it may block), or a `Machine`; it is closed on leaving all the same.
        isolate: as of `Machine`, where it is a configuration.
    """

    def __init__(
        self, what: MachineConfig | Machine | Callable[[], Machine], *, isolate: bool = False
    ) -> None:
        self._what = what
        self._isolate = isolate
        self._machine = what if isinstance(what, Machine) else None
        self._servers: list[AsyncVsockServer] = []

    async def __aenter__(self) -> Self:
        if self._machine is None:
            try:
                await in_thread(self._make)
            except asyncio.CancelledError:
                await self.close()
                raise
        return self

    def _make(self) -> None:
        what = self._what
        assert not isinstance(what, Machine)
        self._machine = what() if callable(what) else Machine(what, isolate=self._isolate)

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def machine(self) -> Machine:
        """The machine itself, for what needs no waiting. StateError before it is built."""
        if self._machine is None:
            raise StateError("the machine is built on entering `async with`, and was not yet")
        return self._machine

    async def call(
        self,
        function: Callable[..., T],
        *arguments: object,
        abort: Callable[[], object] | None = None,
    ) -> T:
        """Call a blocking function in a thread of its own, as `m.call(m.machine.method, x)`.

        Where the caller is cancelled, `abort` is called, to make the function return soon; the
        cancellation goes on when it has.
        """
        return await in_thread(function, *arguments, abort=abort)

    # --- without waiting --------------------------------------------------------------------------

    @property
    def config(self) -> MachineConfig:
        """See `Machine.config`."""
        return self.machine.config

    @property
    def state(self) -> str:
        """See `Machine.state`."""
        return self.machine.state

    @property
    def exit(self) -> MachineExit | None:
        """See `Machine.exit`."""
        return self.machine.exit

    @property
    def console(self) -> ConsoleTail:
        """See `Machine.console`; its `wait_for` blocks, this class's does not."""
        return self.machine.console

    @property
    def memory(self) -> GuestMemory:
        """See `Machine.memory`."""
        return self.machine.memory

    @property
    def vcpus(self) -> list[Vcpu]:
        """See `Machine.vcpus`."""
        return self.machine.vcpus

    @property
    def event_log(self) -> list[Event]:
        """See `Machine.event_log`."""
        return self.machine.event_log

    @overload
    def events(self, *, history: bool = False) -> EventStream[Event]: ...
    @overload
    def events(self, *kinds: type[E], history: bool = False) -> EventStream[E]: ...

    def events(self, *kinds: type[Event], history: bool = False) -> EventStream[Any]:
        """See `Machine.events`."""
        return self.machine.events(*kinds, history=history)

    def subscribe(self, listener: Callable[[E], object], *kinds: type[E]) -> Callable[[], None]:
        """See `Machine.subscribe`; `listener` is called in other threads than the loop's."""
        return self.machine.subscribe(listener, *kinds)

    def emit(self, event: Event) -> None:
        """See `Machine.emit`."""
        self.machine.emit(event)

    def send(self, text: str | bytes) -> None:
        """See `Machine.send`."""
        self.machine.send(text)

    def bind_port(
        self, port: int, size: int = 1, *, read: Read | None = None, write: Write | None = None
    ) -> Callable[[], None]:
        """See `Machine.bind_port`; the functions are called in other threads than the loop's."""
        return self.machine.bind_port(port, size, read=read, write=write)

    def bind_mmio(
        self, gpa: int, size: int, *, read: Read | None = None, write: Write | None = None
    ) -> Callable[[], None]:
        """See `Machine.bind_mmio`; the functions are called in other threads than the loop's."""
        return self.machine.bind_mmio(gpa, size, read=read, write=write)

    def bind_vsock(
        self,
        port: int,
        handler: AsyncHandler,
    ) -> Callable[[], None]:
        """See `Machine.bind_vsock`; but `handler(reader, writer)` is a coroutine, run as a task of
        this loop. What still runs when the machine is closed is cancelled."""
        from vmm.aio.vsock import AsyncVsockServer

        server = AsyncVsockServer(self.machine, port, handler)
        self._servers.append(server)
        return server.unbind

    def _agent(self) -> Link:
        return self.machine._agent()

    def press_power_button(self) -> None:
        """See `Machine.press_power_button`."""
        self.machine.press_power_button()

    # --- with -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """See `Machine.start`."""
        await in_thread(self.machine.start)

    async def pause(self) -> None:
        """See `Machine.pause`."""
        await in_thread(self.machine.pause)

    async def resume(self) -> None:
        """See `Machine.resume`."""
        await in_thread(self.machine.resume)

    async def checkpoint(self, *, disks: str = "rollback") -> None:
        """See `Machine.checkpoint`."""
        await in_thread(lambda: self.machine.checkpoint(disks=disks))

    async def rollback(self) -> None:
        """See `Machine.rollback`."""
        await in_thread(self.machine.rollback)

    async def clone(self, count: int = 1) -> list[AsyncMachine]:
        """See `Machine.clone`."""
        made = Copies()
        try:
            await in_thread(lambda: made.extend(self.machine.clone(count)))
        except asyncio.CancelledError:
            await in_thread(made.close)  # in one call, whatever else is cancelled
            raise
        return [AsyncMachine(machine) for machine in made]

    async def snapshot(
        self, path: str, *, base: str | None = None, disks: str = "copy", track: bool = False
    ) -> None:
        """See `Machine.snapshot`."""
        machine = self.machine

        def save() -> None:
            machine.snapshot(path, base=base, disks=disks, track=track)

        await in_thread(save)

    async def stop(self) -> MachineExit:
        """See `Machine.stop`."""
        return await in_thread(self.machine.stop)

    async def close(self) -> None:
        """See `Machine.close`."""
        if self._machine is not None:
            try:
                await in_thread(self._machine.close)
            finally:
                for server in self._servers:
                    await server.cancel()

    async def wait_for(
        self, pattern: Pattern, timeout: float | None = None, since: int | None = None
    ) -> str:
        """See `Machine.wait_for`."""
        tail, given_up = self.console, threading.Event()

        def abort() -> None:
            given_up.set()
            tail.wake()

        return await in_thread(tail.wait_for, pattern, timeout, since, given_up.is_set, abort=abort)

    async def wait(self, timeout: float | None = None) -> MachineExit:
        """See `Machine.wait`."""
        machine = self.machine
        with machine.events(Stopped) as stream:
            if machine.exit is None and machine.state in ("running", "paused"):
                try:
                    async with asyncio.timeout(timeout):
                        async for _ in stream:
                            pass
                except TimeoutError:
                    raise TimeoutError(f"the machine has not ended within {timeout:g} s") from None
        return await in_thread(machine.wait)

    async def shutdown(self, timeout: float | None = 30.0) -> MachineExit:
        """See `Machine.shutdown`."""
        machine = self.machine
        if machine.state != "paused":
            machine.need("shutdown", "running")
        machine.press_power_button()
        unseen = machine.power_button_unseen()
        if unseen and machine.state == "running":  # perhaps it is just about to look
            await asyncio.sleep(UNSEEN_PATIENCE)
            unseen = machine.power_button_unseen() if machine.exit is None else ""
        if unseen:
            return await self.stop()
        try:
            return await self.wait(timeout)
        except TimeoutError:
            return await self.stop()
