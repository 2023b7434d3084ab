"""`vmm exec` with a machine that has no Linux in it: the command runs on this host, by its agent.

    python -m tests.support.exec_on_host SOCKET ARGUMENT...    (of vmm exec)

All is as in the command but the way to the agent, which listens on the UNIX socket SOCKET.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

from vmm.machine.platform import Platform


class Agent:
    """As vmm.agent.link.Link."""

    ready = True

    def __init__(self, path: str) -> None:
        self._path = path

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self._path)
        return sock

    def why_lost(self) -> str:
        return "the agent on this host has gone"

    def when_ready(self, function: Callable[[], object]) -> None:
        function()

    def end(self, why: str) -> None:
        """The machine has ended."""

    def close(self) -> None:
        """It is closed."""


def main(path: str, words: list[str]) -> int:
    def add(self: Any, virtio: object) -> None:
        self.agent = Agent(path)

    Platform._add_vsock = add  # type: ignore[method-assign]
    from vmm.cli import main as vmm

    # The sandbox connects to nothing outside, as this stand-in has to.
    return vmm(["exec", "--sandbox", "off", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
