"""A command in the guest, as `subprocess` has one on the host: `GuestProcess` and `run`."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Protocol

from vmm.agent import wire
from vmm.agent.connection import SILENCE, Connection
from vmm.agent.pipes import BoundedReader, BoundedText, Reader, Writer, too_much
from vmm.agent.wire import ERR, IN, OUT, Session
from vmm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from socket import socket
    from typing import IO, Any, Self

    Word = str | bytes | os.PathLike[str]
    Args = str | bytes | os.PathLike[str] | Sequence[Word]

KILL_WITHIN = 1.0
"""Seconds waited, after a kill, for the news of it."""
GRACE = 0.25
"""Seconds past its timeout in which a command that goes on writing may still end."""
MAX_OUTPUT = 256 << 20
"""Bytes of a command's output, of both streams together, that are kept for its caller."""


class Dialer(Protocol):
    """Where connections come from (vmm.agent.link.Link)."""

    def connect(self) -> socket:
        """A new one; AgentError."""

    def why_lost(self) -> str:
        """Why one has ended."""


def words(args: Args, shell: bool = False) -> list[Word]:
    """`args` as a list; a string is the program, or with `shell` what sh -c gets."""
    if isinstance(args, (str, bytes, os.PathLike)):
        return ["/bin/sh", "-c", args] if shell else [args]
    listed = list(args)
    if not listed:
        raise ValueError("no command given")
    return ["/bin/sh", "-c", *listed] if shell else listed


def not_started(args: Args, timeout: float | None) -> Exception:
    """What is raised where the agent does not say that it has started a command."""
    if timeout is not None and timeout <= SILENCE:
        return subprocess.TimeoutExpired(args, timeout)
    return AgentError(f"the guest's agent has not started {args!r} within {SILENCE:g} s")


def check_options(user: str | int | None, size: tuple[int, int]) -> None:
    """ValueError for what no command can have."""
    if user == "":
        raise ValueError("user='' names nobody; None is root")
    rows, columns = size
    if not (0 <= rows <= 0xFFFF and 0 <= columns <= 0xFFFF):
        raise ValueError(f"size={size!r} is not (rows, columns), each from 0 to 65535")


def of_run(options: dict[str, Any], input: Any, timeout: float | None) -> float | None:
    """What `run` takes as subprocess.run does, made into options of GuestProcess; the timeout.

    Raises:
        ValueError, TypeError: what contradicts itself, or is of another type.
    """
    if isinstance(input, str):
        options["text"] = True
    if input is None:
        options.setdefault("stdin", DEVNULL)
    elif "stdin" in options:
        raise ValueError("stdin and input arguments may not both be used.")
    elif not isinstance(input, (str, bytes)):
        memoryview(input).cast("B")
    if "universal_newlines" in options:
        options["text"] = options.pop("universal_newlines") or options.get("text", False)
    if not options.pop("capture_output", True):
        raise ValueError("capture_output=False: the output is always captured; stdout=DEVNULL")
    if timeout is None or timeout == float("inf"):
        return None
    if timeout != timeout:
        raise ValueError("timeout=nan is not a number of seconds")
    return timeout


def flags_of(stdin: int, stdout: int, stderr: int, tty: bool) -> int:
    """The request's flags; ValueError for what a stream cannot be."""
    for name, given, possible in (
        ("stdin", stdin, (PIPE, DEVNULL)),
        ("stdout", stdout, (PIPE, DEVNULL)),
        ("stderr", stderr, (PIPE, DEVNULL, STDOUT)),
    ):
        if given not in possible:
            raise ValueError(f"{name}={given!r} is not PIPE or DEVNULL (or STDOUT, for stderr)")
    if tty:
        return wire.TERMINAL
    flags = wire.NULL_IN if stdin == DEVNULL else 0
    flags |= wire.NULL_OUT if stdout == DEVNULL else 0
    flags |= wire.NULL_ERR if stderr == DEVNULL else 0
    return flags | (wire.ERR_TO_OUT if stderr == STDOUT else 0)


class GuestProcess:
    """A running command; use it as subprocess.Popen. A context manager, which waits at its end.

    Args:
        link: the way to the agent, which is there.
        args: the command and its arguments.
        stdin, stdout, stderr: PIPE or DEVNULL; stderr also STDOUT.
        env: added to the guest's usual variables (PATH, HOME, USER, ...); None takes one out.
        cwd: its directory; `/` otherwise.
        user: whom it runs as: USER or USER:GROUP, names or numbers in the guest; root otherwise.
        text, encoding, errors: strings instead of bytes.
        tty: it gets a terminal of its own; its output all comes by stdout.
        size: the terminal's rows and columns.
        timeout: seconds within which it must be started; None: SILENCE (60).
        max_output: bytes that `communicate`, and `read()` of a whole stream, keep at most.

    Attributes:
        args, pid, returncode, stdin, stdout, stderr: as Popen's.

    Raises:
        FileNotFoundError, PermissionError, OSError: it cannot be executed, as Popen's.
        subprocess.TimeoutExpired: it was not started within `timeout`.
        LookupError: the guest has no such user or group.
        AgentError: the agent cannot be reached, or does not answer.
    """

    def __init__(
        self,
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
        bufsize: int = -1,
        timeout: float | None = None,
        max_output: int = MAX_OUTPUT,
    ) -> None:
        self.args = args
        self.max_output = max_output
        begun = time.monotonic()
        argv = words(args, shell)
        check_options(user, size)
        flags = flags_of(stdin, stdout, stderr, tty)
        whom = "" if user is None else str(user)
        first = wire.request(
            wire.EXECUTE, argv, directory=cwd or "", flags=flags, size=size, user=whom,
            environment=wire.environment(env, user=whom, tty=tty),
        )  # fmt: skip
        self.returncode: int | None = None
        self._collected = [bytearray(), bytearray(), bytearray()]
        self._input_done = 0
        session = Session(wire.EXECUTE, flags)
        session.out += first
        without = [session.refused, session.ended[OUT], session.ended[ERR]]
        self._connection = Connection(link.connect(), session, link.why_lost)
        self._session = session
        try:
            until = begun + (SILENCE if timeout is None else min(timeout, SILENCE))
            started = self._connection.send(until) and self._connection.wait_for(
                lambda: bool(session.pid or session.failed), until
            )
            if not started:
                raise not_started(args, timeout)
            failure = session.failure(argv, cwd, whom)
            if failure is not None:
                raise failure
        except BaseException:
            if self._connection.error is None and session.failed is None:
                # Interrupted, and it may have been started.
                kill = partial(session.signal, signal.SIGKILL, group=True)
                self._connection.do(kill, time.monotonic())
            self._connection.close()
            raise
        self.pid = session.pid
        self._text = bool(text or encoding or errors)
        self._encoding, self._errors = encoding or "utf-8", errors or "strict"
        self.stdin: IO[Any] | None = None if without[IN] else self._file(IN, bufsize)
        self.stdout: IO[Any] | None = None if without[OUT] else self._file(OUT, bufsize)
        self.stderr: IO[Any] | None = None if without[ERR] else self._file(ERR, bufsize)

    def _file(self, stream: int, bufsize: int) -> IO[Any]:
        raw: io.RawIOBase
        if stream == IN:
            raw = self._writer = Writer(self._connection)
        else:
            raw = reader = Reader(self._connection, stream, self.max_output)
        if bufsize == 0 and not self._text:
            return raw  # type: ignore[return-value]
        size = bufsize if bufsize > 1 else io.DEFAULT_BUFFER_SIZE
        buffered = io.BufferedWriter(raw, size) if stream == IN else BoundedReader(reader, size)
        if not self._text:
            return buffered
        line = bufsize == 1 and stream == IN
        return BoundedText(
            buffered,
            self.max_output,
            encoding=self._encoding,
            errors=self._errors,
            line_buffering=line,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        files = [file for file in (self.stdin, self.stdout, self.stderr) if file is not None]
        try:
            if kind is None:
                for file in files:
                    file.close()
                self.wait()
            elif self.returncode is None:
                _kill(self)
        finally:
            self.close()
            for file in files:
                with suppress(AgentError, OSError):  # input that nobody takes any more
                    file.close()

    def __repr__(self) -> str:
        return f"<GuestProcess: returncode: {self.returncode} args: {self.args!r}>"

    # --- its end ----------------------------------------------------------------------------------

    def poll(self) -> int | None:
        """The return code, if it has ended."""
        self._ended(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the return code. Raises subprocess.TimeoutExpired, AgentError."""
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(self._named(), timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def _ended(self, timeout: float | None) -> bool:
        if self.returncode is None:
            session = self._session
            until = None if timeout is None else time.monotonic() + timeout
            if not self._connection.wait_for(lambda: session.returncode is not None, until):
                return False
            self.returncode = session.returncode
        return True

    def send_signal(self, sig: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to its process group; nothing once it has ended.

        A group, which all it starts belongs to, gets it even then: what it left behind.
        """
        if group or self.poll() is None:
            self._connection.do(lambda: self._session.signal(int(sig), group))

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
        self._connection.do(lambda: self._session.resize(rows, columns))

    def close(self) -> None:
        """Hang up. A command that still runs gets a SIGHUP, its output is lost. Harmless twice."""
        self._connection.close()

    # --- everything at once -----------------------------------------------------------------------

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """Give it all of `input`, wait for the end of its output and its own; (stdout, stderr).

        None stands for what is no pipe. After a TimeoutExpired it may be called again.
        """
        if self._text and isinstance(input, str):
            input = input.encode(self._encoding, self._errors)
        data = memoryview(input if input is not None else b"").cast("B")
        until = None if timeout is None else time.monotonic() + timeout
        done = self._flush_input(until) and self._exchange(data, until)
        out = self._decoded(OUT) if self.stdout is not None else None
        err = self._decoded(ERR) if self.stderr is not None else None
        if not done:
            raw = [bytes(part) for part in self._collected]
            raise subprocess.TimeoutExpired(
                self._named(), timeout or 0, raw[OUT] if self.stdout else None,
                raw[ERR] if self.stderr else None,
            )  # fmt: skip
        return out, err

    def _flush_input(self, until: float | None) -> bool:
        """Give the command what was written before and is buffered here; False: not in time."""
        if self.stdin is None or self.stdin.closed or self._input_done:
            return True
        self._writer.until = until
        try:
            self.stdin.flush()
        except BrokenPipeError:
            pass
        except BlockingIOError:
            return False
        finally:
            self._writer.until = None
        return True

    def _exchange(self, data: memoryview, until: float | None) -> bool:
        session, connection = self._session, self._connection

        def write() -> None:
            if not session.refused and self.stdin is not None and not self.stdin.closed:
                if self._input_done < len(data):
                    self._input_done += session.write(data[self._input_done :])
                if self._input_done >= len(data):
                    session.end_input()

        def something() -> bool:
            if session.complete or session.available(OUT) or session.available(ERR):
                return True
            left = self._input_done < len(data) and not session.refused
            return left and session.room > 0 and self.stdin is not None

        while True:
            connection.do(write, until)
            for stream in (OUT, ERR):
                self._collected[stream] += connection.take(stream, until=until)
            if sum(map(len, self._collected)) > self.max_output:
                raise too_much(self.max_output)
            if session.complete:
                self.returncode = session.returncode
                return True
            if until is not None and time.monotonic() > until + GRACE:
                return False  # it goes on writing
            if not connection.wait_for(something, until):
                return False

    def _decoded(self, stream: int) -> bytes | str:
        data = bytes(self._collected[stream])
        if not self._text:
            return data
        text = data.decode(self._encoding, self._errors)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _named(self) -> Any:
        return self.args


def run(
    link: Dialer,
    args: Args,
    *,
    input: Any = None,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end; as subprocess.run with capture_output.

    Args:
        input: what it reads; None: nothing, /dev/null.
        timeout: seconds from the first byte sent to the agent, its start included, after which
            its process group is killed.
        check: raise CalledProcessError where it ends with another status than 0.
        options: see GuestProcess.

    Raises:
        subprocess.TimeoutExpired, subprocess.CalledProcessError: with the output so far.
        AgentError: the agent cannot be reached, or the machine ended.
    """
    timeout = of_run(options, input, timeout)
    begun = time.monotonic()
    process = GuestProcess(link, args, timeout=timeout, **options)
    try:
        left = None if timeout is None else max(timeout - (time.monotonic() - begun), 0)
        out, err = process.communicate(input, left)
    except subprocess.TimeoutExpired as late:
        late.timeout = timeout or 0
        late.output, late.stderr = _kill(process)
        raise
    except BaseException:
        if process._connection.error is None:
            kill = partial(process._session.signal, signal.SIGKILL, group=True)
            process._connection.do(kill, time.monotonic() + KILL_WITHIN)
        raise
    finally:
        process.close()
    done = subprocess.CompletedProcess(args, process.returncode or 0, out, err)
    if check:
        done.check_returncode()
    return done


def _kill(process: GuestProcess) -> tuple[bytes | None, bytes | None]:
    """Kill it, and wait for that; the output there was."""
    until = time.monotonic() + KILL_WITHIN
    session = process._session
    try:
        process._connection.do(lambda: session.signal(signal.SIGKILL, group=True), until)
        process._connection.wait_for(lambda: session.returncode is not None, until)
        # What it wrote last comes before its end; who escaped from the group may hold the pipes.
        for stream in (OUT, ERR):
            process._collected[stream] += process._connection.take(stream, until=until)
    except AgentError:
        pass
    out = bytes(process._collected[OUT]) if process.stdout is not None else None
    err = bytes(process._collected[ERR]) if process.stderr is not None else None
    return out, err
