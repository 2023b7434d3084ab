"""A command's connection, for threads: a socket and a Session, used by any number of them at once.

There is no thread of its own. Whoever waits for something receives what comes, for all; the others
wait for that one.
"""

from __future__ import annotations

import select
import socket
import threading
import time

from vmm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.agent.wire import Session

RECEIVE = 256 << 10
"""Bytes received at once."""
AFTER = 8
"""Times that is received once the time is up: more than the windows let a guest send at once."""
SILENCE = 60.0
"""Seconds an agent has to take what is sent to it, to start a command, or to bring a transfer on.
A guest takes milliseconds, or seconds where it is emulated."""


class Connection:
    """`sock` and `session`; closes the socket. `why` says why a connection was lost."""

    def __init__(self, sock: socket.socket, session: Session, why: Callable[[], str]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.session = session
        self._why = why
        self._changed = threading.Condition()
        self._receiving = False
        self._closed = False
        self.error: AgentError | None = None

    def close(self) -> None:
        """Hang up: the guest ends the command, if it runs. Harmless twice."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            if self.error is None:
                self.error = AgentError("this command's connection is closed")
            if self._receiving:
                # Its receiver may be asleep with the descriptor, and closes it on leaving.
                self._sock.shutdown(socket.SHUT_RDWR)
            else:
                self._sock.close()
            self._changed.notify_all()

    def wait_for(self, ready: Callable[[], bool], until: float | None) -> bool:
        """Receive until `ready`, or until that time (of time.monotonic) has come: False.

        Raises:
            AgentError: the connection is lost, or the agent talks nonsense.
        """
        more, late = True, 0
        with self._changed:
            while not ready():
                if self.error is not None:
                    raise self.error
                left = None if until is None else max(until - time.monotonic(), 0)
                if left == 0:
                    late += 1
                    if not more or late > AFTER:
                        return False
                if not self._receiving:
                    more = self._receive(left)
                else:
                    more = left != 0
                    self._changed.wait(left)
            return True

    def _receive(self, left: float | None) -> bool:
        """Receive what comes within `left` seconds; whether something came.

        With the lock, which is given up meanwhile.
        """
        self._receiving = True
        self._changed.release()
        data: bytes | None = None
        try:
            if _wait(self._sock, select.POLLIN, left):
                try:
                    data = self._sock.recv(RECEIVE)
                except BlockingIOError:
                    pass
                except OSError:
                    data = b""
        finally:
            self._changed.acquire()
            self._receiving = False
            if self._closed:
                self._sock.close()
            self._changed.notify_all()
        if data is None or self._closed:
            return False
        try:
            if not data:
                raise AgentError(self._why())
            self.session.feed(data)
            if self.session.complete:  # nothing more will come: it needs no `close`
                self._closed = True
                self.error = AgentError("the command has ended")
                self._sock.close()
        except AgentError as err:
            self.error = err
        return True

    def send(self, until: float | None = None) -> bool:
        """Send what the session has to send; False where that time came first.

        Without a time the agent has `SILENCE` seconds, and the connection is lost then.
        """
        out = self.session.out
        limit = time.monotonic() + SILENCE if until is None else until
        while True:
            with self._changed:
                if self._closed or not out:
                    return True
                try:
                    with memoryview(out) as view:
                        done = self._sock.send(view[:RECEIVE])
                    del out[:done]
                    continue
                except BlockingIOError:
                    pass
                except OSError:  # what can still be received says why
                    out.clear()
                    return True
            if not _wait(self._sock, select.POLLOUT, max(limit - time.monotonic(), 0)):
                if until is None:
                    with self._changed:
                        out.clear()
                        self.error = self.error or AgentError(
                            f"the guest's agent has taken nothing for {SILENCE:g} s"
                        )
                return False

    def do(self, function: Callable[[], object], until: float | None = None) -> None:
        """Call `function`, which has the session say something, and send that."""
        with self._changed:
            function()
        self.send(until)

    def take(self, stream: int, size: int = -1, until: float | None = None) -> bytes:
        """Output there is, see `Session.take`. What the session has to say of it is sent as by
        `send`; what could not be sent by `until` is sent later."""
        with self._changed:
            data = self.session.take(stream, size)
        if self.session.out:
            self.send(until)
        return data


def _wait(sock: socket.socket, event: int, seconds: float | None) -> bool:
    """Whether `event` (or an end) came within so many seconds."""
    poll = select.poll()
    try:
        poll.register(sock, event)
    except ValueError:  # closed by another thread
        return True
    return bool(poll.poll(None if seconds is None else seconds * 1000 + 1 if seconds else 0))
