"""A cgroup of a helper program's own (cgroup v2), below this process's, where that may be made.

All that the program starts is in it, so that none of it is left when the program is ended, and the
host's tools show what the program uses. Where the hierarchy is not there, or is not this user's to
divide (systemd delegates the one of `user@.service`), there is none, and nothing else is different.
"""

from __future__ import annotations

import itertools
import os
import time
from contextlib import suppress

PREFIX = "vmm-"
EMPTY_WITHIN = 2.0
"""Seconds for what was killed to be gone."""
_numbers = itertools.count()


def directory() -> str:
    """The directory of this process's cgroup; empty: no such hierarchy is mounted."""
    mount = root = ""
    with suppress(OSError), open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            words = line.split()
            if b"cgroup2" in words[6:]:  # after the optional fields and a dash
                root, mount = (_unescaped(word) for word in words[3:5])
                break
    if not mount:
        return ""
    with suppress(OSError), open("/proc/self/cgroup", encoding="utf-8") as groups:
        for group in groups:
            number, _, path = group.rstrip("\n").split(":", 2)
            if number == "0" and not path.startswith("/.."):
                path = path.removeprefix(root.rstrip("/"))
                return os.path.normpath(f"{mount}/{path}")
    return ""


def _unescaped(word: bytes) -> str:
    """As mountinfo(5) writes paths: a blank is \\040."""
    first, *others = word.split(b"\\")
    parts = [bytes([int(each[:3], 8)]) + each[3:] for each in others]
    return os.fsdecode(first + b"".join(parts))


def _sweep(top: str) -> None:
    """Remove what a process that was killed while it started a helper has left."""
    with suppress(OSError):
        for name in os.listdir(top):
            if name.startswith(PREFIX) and not os.path.exists(f"/proc/{name.split('-')[1]}"):
                with suppress(OSError):  # somebody is in it: its keeper sees to it
                    os.rmdir(f"{top}/{name}")


class Cgroup:
    """One, empty. Raises OSError where it cannot be made.

    Attributes:
        path: its directory.
    """

    def __init__(self, name: str) -> None:
        top = directory()
        if not top:
            raise FileNotFoundError("no cgroup2 is mounted")
        _sweep(top)
        self.path = f"{top}/{PREFIX}{os.getpid()}-{next(_numbers)}-{name}"
        os.mkdir(self.path)

    def add(self, pid: int) -> None:
        """Have process `pid`, and what it starts from now on, be in it. Raises OSError."""
        self._write("cgroup.procs", str(pid))

    def _write(self, name: str, text: str) -> None:
        with open(f"{self.path}/{name}", "w", encoding="ascii") as file:
            file.write(text)

    def close(self) -> None:
        """Kill what is in it (Linux 5.14), and remove it. Harmless twice."""
        path, self.path = self.path, ""
        if not path:
            return
        with suppress(OSError), open(f"{path}/cgroup.kill", "w", encoding="ascii") as file:
            file.write("1")
        limit = time.monotonic() + EMPTY_WITHIN
        while True:
            try:
                os.rmdir(path)
                return
            except OSError as err:
                if isinstance(err, FileNotFoundError) or time.monotonic() > limit:
                    return
            time.sleep(0.001)
