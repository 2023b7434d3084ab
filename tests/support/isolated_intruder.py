"""A zygote whose machines' processes turn on the program once their guest writes to the exit port:
the probes of tests.support.intruder, and some of their own, in a vCPU's thread."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import intruder
from tests.support.confined import outcome
from vmm.devices.debugexit import DebugExit
from vmm.isolated import grants, server, zygote
from vmm.isolated.wire import Channel, dumps

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    f"sys.path.insert(0, {str(ROOT)!r}); "
    "from tests.support.isolated_intruder import main; main(int(sys.argv[1]))"
)
"""What the program starts in place of the zygote (`nursery._PROGRAM`)."""

PEERS = ("program", "zygote", "other", "broker")
"""Processes that `facts` has the numbers of."""
original = server._make
grants_link = ""


def memory_of(name: str) -> Callable[[], object]:
    return lambda: intruder.opened(f"/proc/{intruder.facts[name]}/mem", os.O_RDWR)


def end(name: str) -> Callable[[], object]:
    return lambda: os.kill(intruder.facts[name], 9)


def link(fd: str | int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # listdir's own
        return ""


def ask_the_broker() -> None:
    """As the program does: with a connection that was this process's before it was locked down."""
    found = [name for name in os.listdir("/proc/self/fd") if link(name) == grants_link]
    if not found:
        raise OSError(errno.EBADF, "the connection is not there any more")
    channel = Channel(socket.socket(fileno=os.dup(int(found[0]))))
    with grants.making(channel, intruder.facts["directory"] + "/snapshot", None):
        os.mkdir(intruder.facts["directory"] + "/snapshot")


OWN: dict[str, Callable[[], object]] = {
    **{f"open the {name}'s memory": memory_of(name) for name in PEERS},
    **{f"kill the {name}": end(name) for name in PEERS},
    "ask the broker for a directory": ask_the_broker,
    "make a nameless file in /var/tmp": lambda: intruder.opened(
        "/var/tmp", os.O_RDWR | os.O_TMPFILE
    ),
}


def intrude() -> dict[str, Any]:
    found = {name: outcome(probe) for name, probe in {**OWN, **harmless()}.items()}
    found["threads"] = intruder.threads()
    return found


def harmless() -> dict[str, Callable[[], object]]:
    """Probes that do not end the process."""
    return {
        name: probe for name, probe in intruder.PROBES.items() if name in intruder.facts["probes"]
    }


def make(message: Any) -> Any:
    told = json.loads(Path(message["machine"]["append"]).read_text())
    intruder.facts.update(told)
    made: list[Any] = []
    write = DebugExit.write

    def intruded(self: DebugExit, *arguments: Any) -> Any:
        if not told["probes"]:
            return write(self, *arguments)
        made[0].device_error(dumps(intrude()).decode())
        time.sleep(0.2)  # for the program to hear of it, where the process is about to end
        return write(self, *arguments)

    DebugExit.write = intruded  # type: ignore[method-assign]
    made.append(original(message))
    intruder.facts["broker"] = broker()
    return made[0]


def broker() -> int:
    [pid] = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return int(pid)


def main(fd: int) -> None:
    serve = server.serve

    def served(control_fd: int, stream_fd: int, fd: int) -> None:
        global grants_link
        grants_link = link(fd)
        serve(control_fd, stream_fd, fd)

    server.serve, server._make = served, make
    zygote.main(fd)
