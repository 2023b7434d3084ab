"""Coroutines as servers on vsock ports; see vmm.machine.vsock_binding."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

from vmm.events import Stopped
from vmm.machine.vsock_binding import CONNECTIONS_MAX, claim, failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmm.machine import Machine

    AsyncHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


class AsyncVsockServer:
    """The connections of one port as tasks of the loop it is made on."""

    def __init__(
        self,
        machine: Machine,
        port: int,
        handler: AsyncHandler,
    ) -> None:
        self._machine = machine
        self._port = port
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[None], socket.socket] = {}
        self._coming: set[socket.socket] = set()
        """Connections that the loop has been told of, and has no task for yet."""
        self._unbound = self._closed = False
        self._device = claim(machine, port, self._serve)
        self._leave = machine.subscribe(lambda event: self._soon(self._end), Stopped)

    def unbind(self) -> None:
        """Take no more connections; those there are stay. On any thread."""
        if not self._unbound:
            self._unbound = True
            self._device.host.bind(self._port, None)

    async def cancel(self) -> None:
        """The machine is closed: end what is left."""
        self.unbind()
        self._leave()
        self._closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _soon(self, function: Callable[..., object], *arguments: object) -> bool:
        """Have the loop call it; from any thread. False: it is closed."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True

    def _serve(self, sock: socket.socket) -> None:
        """On the device's loop, which may be quicker than ours."""
        if len(self._coming) + len(self._tasks) >= CONNECTIONS_MAX:
            sock.close()
            return
        self._coming.add(sock)
        if not self._soon(self._begin, sock):
            self._coming.discard(sock)
            sock.close()

    def _begin(self, sock: socket.socket) -> None:
        self._coming.discard(sock)
        if self._closed:
            sock.close()
            return
        task = self._loop.create_task(self._run(sock))
        self._tasks[task] = sock
        task.add_done_callback(self._tasks.pop)

    def _end(self) -> None:
        """The machine has ended: readers come to their end."""
        for sock in self._tasks.values():
            with suppress(OSError):  # it is closed already
                sock.shutdown(socket.SHUT_RDWR)

    async def _run(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        try:
            await self._handler(reader, writer)
            await writer.drain()
        except Exception as err:
            failed(self._machine, self._port, err)
        finally:
            writer.close()
