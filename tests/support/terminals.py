"""Commands on terminals of their own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def on_a_terminal(
    words: list[str], **options: Any
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command with a terminal of its own, of 33 lines and 101 columns, and its other end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("<4H", 33, 101, 0, 0))
    with subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # controls this session
        **options,
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def shown(data: bytes) -> str:
    """What is left on the terminal, line ends as `\\n`: without the status lines that have gone."""
    data = re.sub(rb"\r\x1b\[Kvmm: [^\r\n]*(?=\r\x1b)", b"", data).replace(b"\r\x1b[K", b"")
    return data.decode().replace("\r", "")


def read_until(fd: int, wanted: bytes | None) -> bytes:
    """Output up to `wanted`, or (None) to its end."""
    data = b""
    while wanted is None or wanted not in data:
        try:
            part = os.read(fd, 4096)
        except OSError:  # EIO: nobody has the terminal open any more
            part = b""
        if not part:
            assert wanted is None, data.decode(errors="replace")
            return data
        data += part
    return data
