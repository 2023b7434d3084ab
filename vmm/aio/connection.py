"""A command's connection, for asyncio: a socket and a Session on the caller's loop, no thread."""

from __future__ import annotations

import asyncio
import signal

from vmm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmm.agent.wire import Session


RECEIVE = 64 << 10
"""Bytes sent or received at once: as many frames of little or nothing cost the loop some 10 ms."""


class AsyncConnection:
    """`sock` and `session`; closes the socket. `why` says why a connection was lost.

    Attributes:
        error: what ended it; waiting raises that.
    """

    def __init__(self, sock: socket.socket, session: Session, why: Callable[[], str]) -> None:
        sock.setblocking(False)
        self.session = session
        self.error: AgentError | None = None
        self._sock = sock
        self._why = why
        self._loop = asyncio.get_running_loop()
        self._waiters: list[asyncio.Future[None]] = []
        self._writing = False
        self._closed = False
        self._loop.add_reader(sock, self._receive)

    def close(self) -> None:
        """Hang up: the guest ends the command, if it runs. Harmless twice."""
        if self._closed:
            return
        self._closed = True
        self._lost(AgentError("this command's connection is closed"))
        self._sock.close()

    def abandon(self) -> None:
        """Kill the command's process group, if it runs, or may soon, and hang up."""
        session = self.session
        if self.error is None and session.failed is None and session.returncode is None:
            session.signal(signal.SIGKILL, group=True)
            self.flush()
        self.close()

    async def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready`. AgentError: the connection is lost, or the agent talks nonsense."""
        while not ready():
            if self.error is not None:
                raise self.error
            future = self._loop.create_future()
            self._waiters.append(future)
            await future

    def flush(self) -> None:
        """Send what the session has to send, as much as can be now and the rest when it can be."""
        out, blocked = self.session.out, False
        if self.error is not None:
            out.clear()
        while out and not blocked:
            try:
                with memoryview(out) as view, view[:RECEIVE] as part:
                    done = self._sock.send(part)
                del out[:done]
            except BlockingIOError:
                blocked = True
            except OSError:  # what can still be received says why
                out.clear()
        if blocked != self._writing:
            self._writing = blocked
            if blocked:
                self._loop.add_writer(self._sock, self.flush)
            else:
                self._loop.remove_writer(self._sock)

    def _receive(self) -> None:
        try:
            data = self._sock.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            if not data:
                raise AgentError(self._why())
            self.session.feed(data)
        except AgentError as err:
            self._lost(err)
        self._wake()

    def _lost(self, error: AgentError) -> None:
        if self.error is None:
            self.error = error
            self._loop.remove_reader(self._sock)
            self.flush()
            self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for future in waiters:
            if not future.done():
                future.set_result(None)
