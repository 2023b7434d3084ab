"""A command in the guest, for asyncio; as asyncio.subprocess.Process is on the host."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from contextlib import suppress
from subprocess import PIPE

from vmm.agent import wire
from vmm.agent.connection import SILENCE
from vmm.agent.pipes import too_much
from vmm.agent.process import (
    KILL_WITHIN,
    MAX_OUTPUT,
    check_options,
    flags_of,
    not_started,
    of_run,
    words,
)
from vmm.agent.wire import ERR, IN, OUT, Session
from vmm.aio.connection import AsyncConnection
from vmm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Self

    from vmm.agent.process import Args, Dialer, Word


LINE_MAX = 1 << 20
"""Bytes of a line: a guest could send one without end."""


class Output:
    """The command's output; `async for` gives its lines."""

    def __init__(self, connection: AsyncConnection, stream: int, maximum: int = MAX_OUTPUT) -> None:
        self._connection = connection
        self._stream = stream
        self._max = maximum
        self._rest = bytearray()
        self._over = False

    async def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, as soon as there are some; all until its end with -1. b"": the end.

        Raises:
            AgentError: the connection is lost, or all is over `max_output` bytes.
        """
        while not self._over and (size < 0 or not self._rest):
            await self._more()
        data = bytes(self._rest if size < 0 else self._rest[:size])
        del self._rest[: len(data)]
        return data

    async def readline(self) -> bytes:
        """A line with its end; what is left at the end of the output. ValueError: over LINE_MAX."""
        looked = 0
        while not self._over and self._rest.find(b"\n", looked) < 0:
            looked = len(self._rest)
            if looked > LINE_MAX:
                raise ValueError(f"a line of more than {LINE_MAX} bytes")
            await self._more()
        end = self._rest.find(b"\n") + 1 or len(self._rest)
        line = bytes(self._rest[:end])
        del self._rest[:end]
        return line

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    def rest(self) -> bytes:
        """What has come and was not read."""
        self.take()
        data = bytes(self._rest)
        self._rest.clear()
        return data

    def take(self) -> int:
        """Take what has come; how much. What there is to send is not sent."""
        data = self._connection.session.take(self._stream)
        self._rest += data
        if len(self._rest) > self._max:
            raise too_much(self._max)
        return len(data)

    async def _more(self) -> None:
        session, stream = self._connection.session, self._stream
        await self._connection.wait_for(
            lambda: bool(session.available(stream)) or session.ended[stream]
        )
        self._over = not self.take()
        self._connection.flush()


class Input:
    """The command's input."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Give it all of `data`, as far as it reads.

        Raises:
            BrokenPipeError: nobody reads it any more.
            AgentError: the connection is lost.
        """
        session, view = self._connection.session, memoryview(data).cast("B")
        while view:
            await self._connection.wait_for(lambda: session.room > 0 or session.refused)
            view = view[session.write(view) :]
            self._connection.flush()

    def close(self) -> None:
        """There is no more; harmless twice."""
        self._connection.session.end_input()
        self._connection.flush()


class AsyncGuestProcess:
    """A running command, made by `await AsyncGuestProcess.start(...)`.

    An asynchronous context manager, which waits at its end, and kills after an exception.

    Attributes:
        args, pid, returncode: as Popen's.
        stdin, stdout, stderr: `Input`, `Output`, of bytes; None where it has no pipe.
    """

    def __init__(
        self,
        args: Args,
        connection: AsyncConnection,
        pipes: Sequence[bool],
        text: tuple[str, str] | None,
        max_output: int = MAX_OUTPUT,
    ) -> None:
        session = connection.session
        self.args = args
        self.pid = session.pid
        self.stdin = Input(connection) if pipes[IN] else None
        self.stdout = Output(connection, OUT, max_output) if pipes[OUT] else None
        self.stderr = Output(connection, ERR, max_output) if pipes[ERR] else None
        self._connection = connection
        self._session = session
        self._text = text

    @classmethod
    async def start(
        cls,
        link: Dialer,
        args: Args,
        *,
        stdin: int = PIPE,
        stdout: int = PIPE,
        stderr: int = PIPE,
        env: Mapping[str, str | None] | None = None,
        cwd: Word | None = None,
        user: str | int | None = None,
        shell: bool = False,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
        tty: bool = False,
        size: tuple[int, int] = (24, 80),
        timeout: float | None = None,
        max_output: int = MAX_OUTPUT,
    ) -> AsyncGuestProcess:
        """Start it; the options and exceptions are `vmm.agent.process.GuestProcess`'s, but that
        `text`, `encoding` and `errors` are for `communicate`."""
        argv = words(args, shell)
        check_options(user, size)
        flags = flags_of(stdin, stdout, stderr, tty)
        session = Session(wire.EXECUTE, flags)
        whom = "" if user is None else str(user)
        session.out += wire.request(
            wire.EXECUTE, argv, directory=cwd or "", flags=flags, size=size, user=whom,
            environment=wire.environment(env, user=whom, tty=tty),
        )  # fmt: skip
        # Now: once it is started, a quick command's may have ended.
        pipes = (not session.refused, not session.ended[OUT], not session.ended[ERR])
        connection = AsyncConnection(link.connect(), session, link.why_lost)
        try:
            connection.flush()
            try:
                async with asyncio.timeout(SILENCE if timeout is None else min(timeout, SILENCE)):
                    await connection.wait_for(lambda: bool(session.pid or session.failed))
            except TimeoutError:
                raise not_started(args, timeout) from None
            failure = session.failure(argv, cwd, whom)
            if failure is not None:
                raise failure
        except BaseException:
            connection.abandon()
            raise
        as_text = (encoding or "utf-8", errors or "strict") if text or encoding or errors else None
        return cls(args, connection, pipes, as_text, max_output)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, *exc: object) -> None:
        try:
            if kind is None:
                if self.stdin is not None:
                    self.stdin.close()
                await self.wait()
        finally:
            self.abandon()

    def __repr__(self) -> str:
        return f"<AsyncGuestProcess: returncode: {self.returncode} args: {self.args!r}>"

    @property
    def returncode(self) -> int | None:
        """As subprocess has it; None while it runs."""
        return self._session.returncode

    async def wait(self) -> int:
        """Wait for its end; the return code. AgentError: the connection is lost."""
        session = self._session
        await self._connection.wait_for(lambda: session.returncode is not None)
        assert session.returncode is not None
        return session.returncode

    def send_signal(self, sig: int, *, group: bool = False) -> None:
        """Send a signal to the process, if it runs; or to its process group, even then."""
        if group or self.returncode is None:
            self._session.signal(int(sig), group)
            self._connection.flush()

    def terminate(self) -> None:
        """SIGTERM to the process."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to its process group: nothing it started in it is left."""
        self.send_signal(signal.SIGKILL, group=True)

    def interrupt(self) -> None:
        """What Ctrl-C does on a terminal: SIGINT to its process group."""
        self.send_signal(signal.SIGINT, group=True)

    def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal (`tty`) a new size."""
        self._session.resize(rows, columns)
        self._connection.flush()

    def close(self) -> None:
        """Hang up. A command that still runs gets a SIGHUP, its output is lost. Harmless twice."""
        self._connection.close()

    def abandon(self) -> None:
        """Kill its process group, if it runs, and hang up."""
        self._connection.abandon()

    async def communicate(self, input: Any = None) -> tuple[Any, Any]:
        """Give it all of `input`, wait for the end of its output and its own; (stdout, stderr).

        None stands for what is no pipe.
        """
        return self.decoded(*await self.exchange(input))

    async def exchange(self, input: Any = None) -> tuple[bytes | None, bytes | None]:
        """`communicate`, but that its output is bytes always."""
        data = input.encode(*self._text or ()) if isinstance(input, str) else input
        session, view = self._session, memoryview(data or b"").cast("B")

        def something() -> bool:
            left = bool(view) and session.room > 0 and not session.refused
            return (
                left or session.complete or bool(session.available(OUT) or session.available(ERR))
            )

        while True:
            if self.stdin is not None:
                if view and not session.refused:
                    view = view[session.write(view) :]
                if not view:
                    session.end_input()
            for output in (self.stdout, self.stderr):
                if output is not None:
                    output.take()
            self._connection.flush()
            if session.complete:
                return self.rest()
            await self._connection.wait_for(something)

    def rest(self) -> tuple[bytes | None, bytes | None]:
        """What has come of its outputs and was not read."""
        out = None if self.stdout is None else self.stdout.rest()
        return out, None if self.stderr is None else self.stderr.rest()

    def decoded(self, *outputs: bytes | None) -> tuple[Any, ...]:
        """`outputs` as text, if that was asked for."""
        return tuple(
            data if data is None or self._text is None
            else data.decode(*self._text).replace("\r\n", "\n").replace("\r", "\n")
            for data in outputs
        )  # fmt: skip


async def run(
    link: Dialer,
    args: Args,
    *,
    input: Any = None,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """`vmm.agent.process.run` as a coroutine; cancelled, it kills the command's process group."""
    timeout = of_run(options, input, timeout)
    begun = time.monotonic()
    process = await AsyncGuestProcess.start(link, args, timeout=timeout, **options)
    exchange = asyncio.ensure_future(process.exchange(input))
    try:
        left = None if timeout is None else max(timeout - (time.monotonic() - begun), 0)
        done, _ = await asyncio.wait([exchange], timeout=left)
        if not done:
            raise await _late(process, exchange, timeout or 0)
        out, err = process.decoded(*exchange.result())
    finally:
        process.abandon()
        exchange.cancel()
        await asyncio.wait([exchange])
    completed = subprocess.CompletedProcess(args, process.returncode or 0, out, err)
    if check:
        completed.check_returncode()
    return completed


async def _late(
    process: AsyncGuestProcess,
    exchange: asyncio.Future[tuple[bytes | None, bytes | None]],
    timeout: float,
) -> subprocess.TimeoutExpired:
    """Kill it, and wait for that; with the output there was."""
    process.kill()
    with suppress(TimeoutError, AgentError):
        async with asyncio.timeout(KILL_WITHIN):
            await process.wait()
            await asyncio.sleep(0)  # what it wrote last came before the news of its end
    exchange.cancel()  # who escaped from the group may hold the pipes
    await asyncio.wait([exchange])
    whole = not exchange.cancelled() and exchange.exception() is None
    outputs = exchange.result() if whole else process.rest()
    return subprocess.TimeoutExpired(process.args, timeout, *outputs)
