"""Requests on a machine's control socket (needs /dev/kvm)."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable

from tests.fuzz.source import Source
from tests.fuzz.target import Target, scratch
from tests.support import host
from vmm.sandbox import landlock, privileges

REQUESTS: list[object] = [
    {"snapshot": {"path": "/nonexistent/x", "disks": "none", "track": True, "stop": False}},
    {"resize": {"disk": "blk0", "size": 4096}},
    {"resize": {"disk": "rng", "size": None}},
    {"snapshot": {"path": "", "base": "/x"}},
]


def control() -> Callable[[bytes], None]:
    """A line is sent as it is, or made of a request with edits; every line has an answer.

    A request may name any directory for a snapshot: Landlock keeps this process to its own.
    """
    from tests.support.bare import bare_machine
    from vmm.cli.control import Control

    directory = scratch()
    os.chdir(directory)
    read = landlock.READ | landlock.EXECUTE
    device = landlock.READ | landlock.WRITE | landlock.IOCTL_DEV
    whole = device | landlock.MAKE | landlock.MAKE_SOCK | landlock.REFER
    privileges.no_new_privs()
    landlock.restrict([("/", read), ("/dev/kvm", device), (directory, whole)])
    machine = bare_machine("1: hlt; jmp 1b")
    path = os.path.join(directory, "c")
    server = Control(path, machine)
    problems: list[object] = []
    import threading

    threading.excepthook = lambda found: problems.append(found.exc_value)

    def run(data: bytes) -> None:
        source = Source(data)
        if source.number(1) & 1:
            line = source.rest().replace(b"\n", b" ")
        else:
            request = source.edited(source.choice(REQUESTS))
            line = json.dumps(request).encode()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(8)
            sock.connect(path)
            sock.sendall(line + b"\n")
            with sock.makefile("rb") as answers:
                answer = answers.readline()
        if problems:
            raise RuntimeError(f"a thread ended with {problems.pop()!r}")
        if answer:
            assert isinstance(json.loads(answer), dict)
        else:
            assert not line.strip(), f"no answer to {line[:200]!r}"

    assert server is not None
    return run


def seeds() -> list[bytes]:
    lines = [json.dumps(request).encode() for request in REQUESTS]
    return [*(b"\1" + line for line in lines), b"\0", b"\0\1", b"\0\2\0\0\7\x40", b"\1" + b"[" * 90]


TARGETS = (
    (Target("control", control, seeds, ("vmm.cli.control",)),)
    if host.backend() and landlock.abi()
    else ()
)
