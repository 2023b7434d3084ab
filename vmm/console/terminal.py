"""The host's terminal in raw mode, and back, whatever happens.

As `qemu -nographic` does it: every key goes to the guest (no signals, no echo, no line editing),
while output processing (OPOST) stays on, so that the monitor's own messages look right. The
modes are put back when the context ends, at interpreter exit, and before a signal that ends the
process (FATAL) or SIGTSTP takes it, where nobody else handles that signal. SIGKILL, SIGSTOP and a
fault in C code leave the terminal raw; no program can help that.
"""

from __future__ import annotations

# The C module: `signal` wraps it in enums, which cost a millisecond to load.
import _signal  # type: ignore[import-not-found]
import os
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

FATAL = (
    *(_signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGABRT, _signal.SIGALRM),
    *(_signal.SIGUSR1, _signal.SIGUSR2, _signal.SIGVTALRM, _signal.SIGPROF, _signal.SIGXCPU),
    *(_signal.SIGIO, _signal.SIGPWR),
)
"""Signals that end a process which does not handle them, and that another process may send."""
JOB = (_signal.SIGTSTP, _signal.SIGCONT)
"""Stop and continue: from another process, as in raw mode Ctrl-Z is the guest's."""


def in_foreground(fd: int) -> bool:
    """Whether this process may change and read the terminal `fd` without being stopped.

    It may not under `&` or `timeout`, which put it into a background process group.
    """
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # not our controlling terminal: no job control, nothing stops us
        return True


class Terminal:
    """A context manager: the terminal `fd` is raw inside. Does nothing where it is none.

    `post`: whether output is processed still (a line feed goes to the beginning of the next line);
    a terminal in the guest has done that itself.
    """

    def __init__(self, fd: int = 0, *, post: bool = True) -> None:
        self.fd = fd
        self.post = post
        self.is_terminal = fd >= 0 and os.isatty(fd)
        self._saved: list[Any] | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Terminal:
        if self.is_terminal and self._saved is None:
            import atexit
            import termios

            self._saved = list(termios.tcgetattr(self.fd))
            atexit.register(self._modes, False)
            self._catch()
            self._modes(True)
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the modes and signal handlers back; harmless when repeated."""
        if self._saved is None:
            return
        import atexit

        self._modes(False)
        self._saved = None
        atexit.unregister(self._modes)
        for signum, handler in self._handlers.items():
            if _signal.getsignal(signum) == self._on_signal:  # unless replaced since
                _signal.signal(signum, handler)
        self._handlers.clear()

    def reclaim(self) -> None:
        """Make the terminal raw again, after a shell or another program had it."""
        self._modes(True)

    def _modes(self, raw: bool) -> None:
        import termios

        if self._saved is None or not in_foreground(self.fd):
            return  # the shell has the terminal, in modes of its own
        iflag, oflag, cflag, lflag, ispeed, ospeed, cc = self._saved
        if raw:
            iflag &= ~(
                termios.IGNBRK
                | termios.BRKINT
                | termios.PARMRK
                | termios.ISTRIP
                | termios.INLCR
                | termios.IGNCR
                | termios.ICRNL
                | termios.IXON
            )
            oflag = oflag | termios.OPOST if self.post else oflag & ~termios.OPOST
            lflag &= ~(
                termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG
            )
            cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            cc = list(cc)
            cc[termios.VMIN], cc[termios.VTIME] = 1, 0
        try:
            termios.tcsetattr(
                self.fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc]
            )
        except (OSError, termios.error):
            return  # the terminal is gone (hung up): nothing to restore

    def _catch(self) -> None:
        for signum in (*FATAL, *JOB):
            if _signal.getsignal(signum) != _signal.SIG_DFL:
                continue
            try:
                self._handlers[signum] = _signal.signal(signum, self._on_signal)
            except ValueError:  # not the main thread; the context's end and atexit remain
                return

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum == _signal.SIGCONT:
            self._modes(True)
            return
        self._modes(False)
        _signal.signal(signum, _signal.SIG_DFL)
        _signal.pthread_kill(get_ident(), signum)  # this thread: it takes effect here and now
        _signal.signal(signum, self._on_signal)  # continued after SIGTSTP
        self._modes(True)
