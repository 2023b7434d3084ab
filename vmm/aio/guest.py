"""Commands and files in the guest, as coroutines: `AsyncMachine` has these (docs/exec.md)."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import suppress

from vmm.aio.thread import in_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    import subprocess
    from collections.abc import Callable
    from typing import Any, BinaryIO

    from vmm.agent.link import Link
    from vmm.agent.process import Args, Dialer
    from vmm.aio.process import AsyncGuestProcess


class OnLoop:
    """Calls `progress` on the running event loop with counts that a thread tells.

    Of counts that come faster than the loop takes them the newest is passed on. What `progress`
    raises calls `stop`, and `close` raises it.
    """

    def __init__(self, progress: Callable[[int], object], stop: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._progress = progress
        self._stop = stop
        self._lock = threading.Lock()
        self._newest: int | None = None
        self._error: BaseException | None = None

    def tell(self, size: int) -> None:
        """The thread has come to `size`."""
        with self._lock:
            waiting, self._newest = self._newest is not None, size
        if not waiting:
            self._loop.call_soon_threadsafe(self._pass_on)

    def _pass_on(self) -> None:
        with self._lock:
            size, self._newest = self._newest, None
        if size is None or self._error is not None:
            return
        try:
            self._progress(size)
        except BaseException as err:
            self._error = err
            self._stop()

    def close(self) -> None:
        """Raise what `progress` has raised."""
        error, self._error = self._error, None  # no cycle with its traceback
        if error is not None:
            try:
                raise error
            finally:
                del error


class Line:
    """A way to the agent that can be cut: what goes on over it then ends at once."""

    def __init__(self, link: Dialer) -> None:
        self._link = link
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._cut = False

    def connect(self) -> socket.socket:
        """See `Link.connect`."""
        sock = self._link.connect()
        with self._lock:
            self._sockets.append(sock)
            if self._cut:
                sock.shutdown(socket.SHUT_RDWR)
        return sock

    def why_lost(self) -> str:
        """See `Link.why_lost`."""
        return "the call was cancelled" if self._cut else self._link.why_lost()

    def cut(self) -> None:
        """Hang up: the guest ends the command."""
        with self._lock:
            self._cut = True
            for sock in self._sockets:
                with suppress(OSError):  # it is closed already
                    sock.shutdown(socket.SHUT_RDWR)


class AsyncGuestCalls:
    """`GuestCalls` for asyncio. A call that is cancelled hangs up, and what it did in the guest
    ends."""

    def _agent(self) -> Link:
        """The way to the agent; StateError."""
        raise NotImplementedError

    async def wait_for_agent(self, timeout: float | None = None) -> None:
        """See `Machine.wait_for_agent`."""
        from vmm.agent.link import BOOT_WITHIN, LOOK

        link, loop, changed = self._agent(), asyncio.get_running_loop(), asyncio.Event()
        limit = BOOT_WITHIN if timeout is None else timeout
        until = time.monotonic() + limit
        asked = False

        def tell() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)

        while not await in_thread(lambda: link.ready):
            if not asked or changed.is_set():
                changed.clear()
                link.when_ready(tell)
                asked = True
            left = until - time.monotonic()
            if left <= 0:
                raise link.late(limit)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, LOOK)):
                    await changed.wait()

    async def run(self, args: Args, **options: Any) -> subprocess.CompletedProcess[Any]:
        """See `Machine.run`. Cancelled, it kills the command's process group."""
        from vmm.aio.process import run

        await self.wait_for_agent()
        return await run(self._agent(), args, **options)

    async def popen(self, args: Args, **options: Any) -> AsyncGuestProcess:
        """Start a command in the guest, as asyncio.create_subprocess_exec on the host with pipes.

        See vmm.aio.process.AsyncGuestProcess for the options and what can be done with it.
        """
        from vmm.aio.process import AsyncGuestProcess

        await self.wait_for_agent()
        return await AsyncGuestProcess.start(self._agent(), args, **options)

    async def put(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        target: str | os.PathLike[str],
        *,
        timeout: float | None = None,
        mode: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """See `Machine.put`. `progress` is called on the event loop."""
        from vmm.agent.copy import put

        await self._over_a_line(
            lambda line, tell: put(line, source, target, timeout=timeout, mode=mode, progress=tell),
            progress,
        )

    async def get(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str] | BinaryIO,
        *,
        timeout: float | None = None,
        max_bytes: int = 64 << 30,
        filter: str = "data",
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """See `Machine.get`. `progress` is called on the event loop."""
        from vmm.agent.copy import get

        await self._over_a_line(
            lambda line, tell: get(
                line,
                source,
                target,
                timeout=timeout,
                max_bytes=max_bytes,
                filter=filter,
                progress=tell,
            ),
            progress,
        )

    async def _over_a_line(
        self,
        function: Callable[[Line, Callable[[int], object] | None], None],
        progress: Callable[[int], object] | None,
    ) -> None:
        """Call `function` in a thread with a way to the agent, and what it is to call with its
        progress."""
        await self.wait_for_agent()
        line = Line(self._agent())
        if progress is None:
            await in_thread(function, line, None, abort=line.cut)
            return
        on_loop = OnLoop(progress, line.cut)
        try:
            await in_thread(function, line, on_loop.tell, abort=line.cut)
        finally:
            on_loop.close()
