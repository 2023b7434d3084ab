"""What an intruder (tests/support/intruder.py) tries to get at: a file, a process, sockets."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support import tiny


@contextmanager
def targets(directory: Path) -> Iterator[dict[str, Any]]:
    """What there is to be attacked, below `directory` and beside it; unharmed at the end."""
    with ExitStack() as stack:
        victim = subprocess.Popen(["sleep", "600"])
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        (directory / "secret").write_text("kept")
        (directory / "directory").mkdir()
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        named = stack.enter_context(socket.socket(socket.AF_UNIX))
        named.bind(str(directory / "socket"))
        named.listen()
        hidden = stack.enter_context(socket.socket(socket.AF_UNIX))
        hidden.bind(f"\0vmm-intruder-{os.getpid()}")
        hidden.listen()
        yield {
            "kernel": tiny.kernel(directory, tiny.exits(9)),
            "victim": victim.pid,
            "secret": str(directory / "secret"),
            "directory": str(directory / "directory"),
            "tcp": server.getsockname()[1],
            "unix": named.getsockname(),
            "abstract": f"\0vmm-intruder-{os.getpid()}",
        }
        assert victim.poll() is None
        assert (directory / "secret").read_text() == "kept"
        assert not os.listdir(directory / "directory")
