"""Helper programs (passt, virtiofsd, qemu-storage-daemon) that end when this process does.

However it ends: a shell beside it waits for the end of a pipe, which the kernel closes with us, and
ends the program then. (PR_SET_PDEATHSIG would tell of the death of the thread that started it, not
of the process.) The program begins only once that shell is there: there is no moment in which our
end would leave it behind.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_STARTER = 'read -r _ && exec "$@" </dev/null'
_KEEPER = 'read -r _; kill -s TERM "$1" 2>/dev/null'
STDERR_MAX = 2000
GRACE = 5.0
"""Seconds a program has to end when it is told to."""


def find(name: str, package: str, *elsewhere: str) -> str:
    """The path of program `name`; HostError names the Debian package that has it."""
    path = shutil.which(name) or next((p for p in elsewhere if os.access(p, os.X_OK)), None)
    if path is None:
        raise HostError(f"{name} is not installed; apt-get install {package}")
    return path


class Child:
    """A running helper program.

    Args:
        argv: the command.
        pass_fds: descriptors it inherits, under their numbers.

    Attributes:
        name: the program's name, for messages.
    """

    def __init__(self, argv: Sequence[str], *, pass_fds: Sequence[int] = ()) -> None:
        import subprocess

        self.name = os.path.basename(argv[0])
        self._stderr = os.memfd_create("vmm-child-stderr", os.MFD_CLOEXEC)
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _STARTER, "sh", *argv],
            stdin=subprocess.PIPE,
            stdout=self._stderr,
            stderr=self._stderr,
            pass_fds=pass_fds,
            start_new_session=True,  # Ctrl-C on the terminal is for the machine
        )
        # Without `pass_fds`: a socket's other end must see it close when the program ends.
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "sh", str(self._process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the shell was killed
            self._process.stdin.write(b"go\n")
            self._process.stdin.close()

    def said(self) -> str:
        """The last line it wrote to standard error, or an empty string."""
        size = os.fstat(self._stderr).st_size
        text = os.pread(self._stderr, STDERR_MAX, max(size - STDERR_MAX, 0)).decode(
            errors="replace"
        )
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""

    def close(self) -> None:
        """End it, and wait until it has ended. Harmless twice."""
        if self._keeper.stdin is None or self._keeper.stdin.closed:
            return
        import subprocess

        # The keeper first: once the program is waited for, its number may be another's.
        self._keeper.kill()
        self._keeper.wait()
        self._keeper.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._stderr)
