"""What the main thread of `vmm exec` does: carries bytes and signals between here and the command.

One poll loop. It reads no more than the command's window takes, and writes only what would not
wait: neither a slow reader here nor a slow command holds up a signal.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select
import stat
import time
from contextlib import suppress

from vmm.agent.connection import AFTER, SILENCE
from vmm.agent.wire import ERR, EXECUTE, IN, OUT, TERMINAL, Session
from vmm.cli.say import say
from vmm.cli.supervise import GRACE, MOMENT
from vmm.errors import AgentError
from vmm.machine import exits
from vmm.machine.exits import MachineExit

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Self

    from vmm.cli.supervise import Signals
    from vmm.machine import Machine

LOOK = 500
"""Milliseconds between looks at what the agent says on the console."""
CHUNK = 64 << 10
PIPE_CHUNK = 4096
"""PIPE_BUF: what a pipe or terminal that is ready takes without waiting."""
PATIENCE = 3
"""Of these, Ctrl-C or SIGTERM, the last ends the machine. A SIGTERM in the moment after another is
the same: timeout(1) sends two at once."""
NAMES = {
    _signal.SIGINT: "SIGINT",
    _signal.SIGTERM: "SIGTERM",
    _signal.SIGHUP: "SIGHUP",
    _signal.SIGQUIT: "SIGQUIT",
}


class Relay:
    """Between this process and a command in the guest of `machine`. A context manager.

    Attributes:
        session: the command's.
    """

    def __init__(self, machine: Machine, signals: Signals, tty: bool, grace: float = GRACE) -> None:
        self.session = Session(EXECUTE, TERMINAL if tty else 0)
        self._machine = machine
        self._signals = signals
        self._tty = tty
        self._asked = 0
        self._grace = grace
        self._terminated: float | None = None  # when the first SIGTERM came
        self._counted = 0.0  # when the last one did that counts
        self._asked_for = 0.0  # when the command was
        self._late = 0  # turns in which it should have been started
        self._pending = {OUT: b"", ERR: b""}
        self._chunk = {stream: _chunk(stream) for stream in (OUT, ERR)}
        self._input = True
        self._changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        machine.listen(self._on_event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._machine.listen(None)
        changed, self._changed = self._changed, -1
        os.close(changed)

    def _on_event(self, event: str) -> None:
        if event in ("stopped", "agent"):
            os.eventfd_write(self._changed, 1)

    # --- before the command -----------------------------------------------------------------------

    def wait_for_agent(self) -> None:
        """Until the agent is there or the machine has ended; AgentError where it never will be."""
        agent = self._machine.platform.agent
        assert agent is not None
        poll = select.poll()
        poll.register(self._changed, select.POLLIN)
        poll.register(self._signals.fd, select.POLLIN)
        agent.when_ready(self._agent_ready)
        try:
            while self._machine.exit is None and not agent.ready:
                for fd, _ in poll.poll(LOOK):
                    if fd == self._changed:
                        os.eventfd_read(fd)
                for signum in self._signals.read():
                    if signum in NAMES:
                        self._end(signum)
        except AgentError:
            if self._machine.exit is None:
                raise

    def _agent_ready(self) -> None:
        with suppress(OSError):  # it came too late
            os.eventfd_write(self._changed, 1)

    def _end(self, signum: int, why: str = "") -> None:
        reason = f"ended by {NAMES.get(signum, signum)}{why}"
        self._machine.end(MachineExit(exits.STOPPED, reason, status=128 + signum))

    # --- the command ------------------------------------------------------------------------------

    def serve(self, first: bytes) -> None:
        """Run the command whose request is `first` to its end, or the machine's.

        Raises:
            AgentError: the connection to the agent is lost, or it does not start the command.
        """
        agent = self._machine.platform.agent
        assert agent is not None
        self.session.out += first
        self._asked_for = time.monotonic()
        with agent.connect() as sock:
            sock.setblocking(False)
            while not self._done():
                self._turn(sock)
                if self._machine.exit is not None and not self.session.complete:
                    return

    def _done(self) -> bool:
        session = self.session
        written = not (session.available(OUT) or session.available(ERR))
        written = written and not any(self._pending.values())
        return session.failed is not None or (session.complete and written)

    def _turn(self, sock: socket.socket) -> None:
        session = self.session
        poll = select.poll()
        poll.register(self._changed, select.POLLIN)
        poll.register(self._signals.fd, select.POLLIN)
        if not session.complete:
            poll.register(sock, select.POLLIN | (select.POLLOUT if session.out else 0))
        if self._input and session.pid and session.room > 0 and not session.refused:
            poll.register(IN, select.POLLIN)
        for stream, pending in self._pending.items():
            if pending or session.available(stream):
                poll.register(stream, select.POLLOUT)
        waits = [wait for wait in (self._patience(), self._starts_within()) if wait is not None]
        ready = dict(poll.poll(min(waits, default=None)))
        if sock.fileno() in ready:
            self._exchange(sock)
        for stream in self._pending:
            if stream in ready:
                self._write(stream)
        if IN in ready:
            self._read()
        if self._signals.fd in ready:
            for signum in self._signals.read():
                self._signal(signum)
        if session.out:
            self._send(sock)

    def _exchange(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(CHUNK * 4)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            agent = self._machine.platform.agent
            assert agent is not None
            raise AgentError(agent.why_lost())
        self.session.feed(data)

    def _send(self, sock: socket.socket) -> None:
        out = self.session.out
        try:
            with memoryview(out) as view:
                done = sock.send(view)
        except BlockingIOError:
            return
        except OSError:  # what can still be received says why
            out.clear()
            return
        del out[:done]

    def _read(self) -> None:
        session = self.session
        try:
            data = os.read(IN, min(CHUNK, session.room))
        except BlockingIOError:  # who shares the descriptor has it so
            return
        except OSError:
            data = b""
        if data:
            session.write(data)
        else:
            self._input = False
            session.end_input()

    def _write(self, stream: int) -> None:
        pending = self._pending[stream] or self.session.take(stream, CHUNK)
        try:
            done = os.write(stream, pending[: self._chunk[stream]])
        except BlockingIOError:
            done = 0
        except OSError:  # nobody reads it any more: so the command finds it too
            self.session.drop(stream)
            self.session.take(stream)
            pending, done = b"", 0
        self._pending[stream] = pending[done:]

    def _signal(self, signum: int) -> None:
        if signum == _signal.SIGWINCH:
            if self._tty:
                with suppress(OSError):
                    size = os.get_terminal_size(IN)
                    self.session.resize(size.lines, size.columns)
            return
        if signum == _signal.SIGCONT:
            return
        if signum == _signal.SIGTERM:
            self._terminate()
        elif signum == _signal.SIGINT:
            self._asked += 1
        if self._asked >= PATIENCE or not self.session.pid:
            self._end(signum)
            return
        self.session.signal(signum, group=True)

    def _terminate(self) -> None:
        """Count a SIGTERM; the first begins the time of grace."""
        now = time.monotonic()
        if self._terminated is None:
            self._terminated = self._counted = now
            if self.session.pid:
                say(
                    f"SIGTERM: sent to the command; the machine ends in {self._grace:g} s at the "
                    "latest (--grace), or at the third SIGTERM"
                )
        elif now - self._counted < MOMENT:
            return
        self._counted = now
        self._asked += 1

    def _patience(self) -> int | None:
        """Milliseconds until the machine of a command that has got SIGTERM ends; None: never.

        The end, where it has come, is asked for here.
        """
        if self._terminated is None or self._terminated + self._grace > time.monotonic() + 1e6:
            return None
        left = self._terminated + self._grace - time.monotonic()
        if left <= 0:
            self._terminated = None
            why = f": the command was still there after {self._grace:g} s (--grace)"
            self._end(_signal.SIGTERM, why)
            return 0
        return int(left * 1000) + 1

    def _starts_within(self) -> int | None:
        """Milliseconds the agent has left to start the command; None: it has."""
        if self.session.pid or self.session.failed:
            return None
        left = self._asked_for + SILENCE - time.monotonic()
        if left > 0:
            return int(left * 1000) + 1
        self._late += 1  # it may have come while this process was stopped
        if self._late > AFTER:
            raise AgentError(f"the guest's agent has not started the command within {SILENCE:g} s")
        return 0


def _chunk(fd: int) -> int:
    """Bytes that can be written to `fd` at once without waiting, when it is ready."""
    with suppress(OSError):
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return CHUNK
    return PIPE_CHUNK
