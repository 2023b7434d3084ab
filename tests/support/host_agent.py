"""The guest's agent, run on the host itself: a UNIX socket in place of the socket device."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vmm.agent import binary


class HostAgent:
    """A running agent; `connect` as of vmm.agent.link.Link. A context manager.

    Args:
        within: a command that runs another one.
    """

    def __init__(self, directory: Path, within: Sequence[str] = ()) -> None:
        self.path = str(directory / "agent.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen(128)
            fd = listener.fileno()
            command = [*within, binary.program(), "listen", str(fd)]
            self.process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        return sock

    def why_lost(self) -> str:
        return "the agent on this host has gone"

    ready = True

    def wait(self, timeout: float | None = None) -> None:
        """It is there."""

    def __enter__(self) -> HostAgent:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.unlink(self.path)
