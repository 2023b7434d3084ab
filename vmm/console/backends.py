"""Where a console's output goes and its input comes from: `--console none|auto|file:PATH|pty`.

A back end's `write` is the UART's sink. It never raises: a reader that went away or a full disk
ends the output, not the machine. `input_fd` is what to read input from, -1 for none.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from vmm.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import select

    from vmm.fifo import Output

CHUNK = 4096
"""Bytes a write that was told "writable" hands over at once: a pipe takes these without
blocking (PIPE_BUF)."""
POLL_MS = 100
KEPT_MAX = 1 << 20
"""Bytes of output kept while a machine is paused and its reader takes nothing: each vCPU may have a
write under way, of some KiB."""
END_PATIENCE_MS = 1000
PTY_PATIENCE_MS = 1000
"""How long output waits for a slow reader of a pty before it is dropped."""


class Backend:
    """Output goes nowhere, input never comes: `none`, and the base of the others."""

    def __init__(self, name: str = "none") -> None:
        self.name = name
        self.input_fd = -1
        self.interactive = False
        """Whether a person types at `input_fd`: raw mode and the escape key are wanted."""
        self.error = ""
        """Why output ended early, for a person; empty while it works."""
        self._closed = False
        self._ending = False
        self._lock = allocate_lock()

    def begin(self) -> None:
        """The machine starts: output comes from here on. UsageError where it cannot go."""

    def write(self, data: bytes) -> None:
        """Put out all of `data`; may wait for a slow reader until `end` or `close`."""

    def ready(self, patience: float = 0) -> bool:
        """Whether a short write would not wait; it may become so within `patience` seconds."""
        return True

    def hold(self) -> None:
        """The machine pauses: from now on a write that would wait keeps what is left, and returns:
        a vCPU that waits for a reader could not park. At most KEPT_MAX bytes."""

    def go_on(self) -> None:
        """The machine goes on: what was kept is put out before what comes next."""

    def end(self) -> None:
        """The machine is ending: a reader that takes nothing for END_PATIENCE_MS is given up on,
        so that neither a vCPU nor `close` waits for it for ever."""
        self._ending = True

    def revive(self) -> None:
        """Take `end` back."""
        self._ending = False

    def close(self) -> None:
        """End both directions; a write that waits gives up."""
        self._closed = True

    def _fail(self, error: OSError) -> None:
        self.error = f"console {self.name}: {error.strerror}; further output is lost"

    def _give_up(self) -> None:
        self.error = f"console {self.name}: nobody reads it; the rest of the output is lost"


class FdBackend(Backend):
    """Writes to a descriptor that may block; gives way to `close` while it waits."""

    def __init__(self, name: str, fd: int) -> None:
        super().__init__(name)
        self.fd = fd
        self._poll: select.poll | None = None
        self._held = False
        self._kept = b""
        if fd >= 0:
            self._watch()

    def _watch(self) -> None:
        import select
        import stat

        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            self._poll = select.poll()
            self._poll.register(self.fd, select.POLLOUT)

    def hold(self) -> None:
        self._held = True

    def go_on(self) -> None:
        self._held = False

    def write(self, data: bytes) -> None:
        with self._lock:
            view = memoryview(self._kept + data if self._kept else data)
            self._kept = b""
            waited = 0
            while view and not self._closed and not self.error:
                held = self._held and not self._ending
                # Without this wait, a vCPU thread would sit in write(2), deaf to `end`.
                if self._poll is not None and not self._poll.poll(0 if held else POLL_MS):
                    if held:
                        self._kept = bytes(view[:KEPT_MAX])
                        return
                    waited += POLL_MS if self._ending else 0
                    if waited >= END_PATIENCE_MS:
                        self._give_up()
                    continue
                try:
                    view = view[self._put(view[:CHUNK]) :]
                except BlockingIOError:
                    pass
                except OSError as error:
                    self._fail(error)

    def _put(self, data: memoryview) -> int:
        """Bytes written of `data`; BlockingIOError for none now, OSError."""
        return os.write(self.fd, data)

    def ready(self, patience: float = 0) -> bool:
        if self._poll is None:
            return True
        if not self._lock.acquire(timeout=patience):
            return False
        try:
            return bool(self._poll.poll(patience * 1000))
        finally:
            self._lock.release()


class FileBackend(FdBackend):
    """A file, truncated when the machine starts: one that cannot start leaves the log of the one
    before alone. Or a FIFO: it need not have a reader yet, the pipe keeps what fits (64 KiB)."""

    def __init__(self, path: str) -> None:
        super().__init__(f"file:{path}", -1)
        self._path = path
        self._out: Output | None = None
        try:
            directory = os.path.isdir(path)
            there = directory or os.path.exists(path)
            if directory:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            parent = os.path.dirname(path) or "."
            if not os.access(path if there else parent, os.W_OK):
                missing = not there and not os.path.isdir(parent)
                number = errno.ENOENT if missing else errno.EACCES
                raise OSError(number, os.strerror(number))
        except OSError as error:
            raise self._cannot(error) from None

    def begin(self) -> None:
        if self.fd >= 0 or self._closed:
            return
        from vmm.fifo import Output

        try:
            self._out = Output(self._path)
        except OSError as error:
            raise self._cannot(error) from error
        self.fd = self._out.fd
        self._watch()

    def write(self, data: bytes) -> None:
        if self.fd < 0:
            self.begin()
        super().write(data)

    def close(self) -> None:
        super().close()
        with self._lock:
            if self._out is not None:
                self._out.close()
                if self._out.lost and not self.error:
                    self.error = (
                        f"console {self.name}: nobody read it; {self._out.lost} bytes of output "
                        "are lost"
                    )
                self._out = None
            self.fd = -1

    def _put(self, data: memoryview) -> int:
        assert self._out is not None
        return self._out.write(data)

    def _cannot(self, error: OSError) -> UsageError:
        return UsageError(
            f"--console file:{self._path}: {error.strerror}; give a file that can be written, "
            "in a directory that exists"
        )


class StdioBackend(FdBackend):
    """Standard input and output (or any two descriptors); they stay open after `close`.

    The end of a piped input ends the input only.
    """

    def __init__(self, input_fd: int = 0, output_fd: int = 1) -> None:
        try:
            super().__init__("stdio", output_fd)
        except OSError as error:  # started with standard output closed (`>&-`)
            raise UsageError(
                f"--console auto: standard output: {error.strerror}; try --console none"
            ) from error
        try:
            os.fstat(input_fd)
        except OSError:
            return
        self.input_fd = input_fd
        self.interactive = os.isatty(input_fd)


class PtyBackend(Backend):
    """A new pseudo-terminal; `path` is what to connect to (`screen PATH`).

    Output while nobody is connected is dropped, as on a serial line; connections may come and
    go.
    """

    def __init__(self) -> None:
        import select
        import termios
        import tty

        try:
            master, slave = os.openpty()
        except OSError as error:
            raise HostError(
                f"--console pty: {error.strerror}; is /dev/pts mounted? try --console file:PATH"
            ) from error
        self.path = os.ttyname(slave)
        super().__init__(f"pty {self.path}")
        tty.setraw(slave, termios.TCSANOW)
        os.close(slave)  # so that a hang-up tells whether anybody is connected
        os.set_blocking(master, False)
        self.input_fd = self.fd = master
        self._slow = False
        self._hangup = select.POLLHUP | select.POLLERR
        self._poll = select.poll()
        self._poll.register(master, select.POLLOUT)

    def write(self, data: bytes) -> None:
        with self._lock:
            view = memoryview(data)
            while view and not self._closed:
                ready = self._poll.poll(0 if self._slow else PTY_PATIENCE_MS)
                self._slow = not ready
                if not ready or ready[0][1] & self._hangup:
                    return
                try:
                    view = view[os.write(self.fd, view[:CHUNK]) :]
                except BlockingIOError:
                    pass
                except OSError as error:
                    if error.errno != errno.EIO:  # EIO: disconnected just now
                        self._fail(error)
                    return

    def close(self) -> None:
        super().close()
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = self.input_fd = -1


def open_backend(spec: str) -> Backend:
    """The back end `--console spec` names. UsageError where there is no such."""
    if spec in ("auto", "stdio"):
        return StdioBackend()
    if spec == "none":
        return Backend()
    if spec == "pty":
        return PtyBackend()
    kind, _, path = spec.partition(":")
    if kind == "file" and path:
        return FileBackend(path)
    raise UsageError(f"--console {spec}: no such console; use auto, none, file:PATH or pty")
