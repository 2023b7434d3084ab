"""vmm/virtio/vhost_user_wire.py: back ends whose answers are not what was asked for."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.support import tiny
from vmm.virtio import vhost_user_wire as wire
from vmm.virtio.vhost_user_inflight import DESCRIPTION
from vmm.virtio.vhost_user_wire import BackEndGone, Connection

HEADER = struct.Struct("<III")
ASKED = DESCRIPTION.pack(0, 0, 1, 128)


def answered(request: int, payload: bytes, *, size: int | None = None, flags: int = 5) -> bytes:
    return HEADER.pack(request, flags, len(payload) if size is None else size) + payload


def with_back_end(
    answer: Callable[[socket.socket], object], ask: Callable[[Connection], object]
) -> object:
    """What `ask` has from a back end that answers so; every descriptor is given back."""
    before = tiny.descriptors()
    ours, theirs = socket.socketpair()

    def main() -> None:
        with theirs, suppress(OSError):
            theirs.recv(4096)
            answer(theirs)
            theirs.shutdown(socket.SHUT_WR)
            while theirs.recv(4096):
                pass

    thread = threading.Thread(target=main)
    thread.start()
    connection = Connection(ours, "the back end")
    try:
        return ask(connection)
    finally:
        connection.close()
        thread.join()
        assert tiny.opened_since(before) == []


def inflight(connection: Connection) -> bytes:
    fd, answer = connection.get_inflight(ASKED)
    assert not os.get_inheritable(fd)  # no program that is started has it
    os.close(fd)
    return answer


def sends(data: bytes, count: int, *, step: int = 4096) -> Callable[[socket.socket], object]:
    """Send `data` in pieces, with so many descriptors each."""

    def answer(sock: socket.socket) -> None:
        with open(os.devnull, "rb") as file:
            for at in range(0, len(data), step):
                socket.send_fds(sock, [data[at : at + step]], [file.fileno()] * count)

    return answer


GOOD = answered(wire.GET_INFLIGHT_FD, ASKED)


@pytest.mark.parametrize("step", [4096, 20, 12])
def test_a_record(step: int) -> None:
    """Further descriptors, behind the first, are dropped."""
    assert with_back_end(sends(GOOD, 1, step=step), inflight) == ASKED


@pytest.mark.parametrize(
    ("data", "count", "step", "says"),
    [
        (GOOD, 0, 4096, "0 descriptors"),
        (GOOD, 1, 1, "descriptors"),
        (GOOD, 200, 1, "descriptors"),
        (GOOD[:20], 1, 4096, "closed"),
        (GOOD[:8], 1, 4096, "closed"),
        (answered(wire.GET_INFLIGHT_FD, ASKED + b"x"), 1, 4096, "bytes answer"),
        (answered(wire.GET_INFLIGHT_FD, b""), 1, 4096, "bytes answer"),
        (answered(wire.GET_INFLIGHT_FD, ASKED, size=1 << 31), 1, 4096, "answered request"),
        (answered(wire.GET_INFLIGHT_FD, ASKED, flags=1), 1, 4096, "answered request"),
        (answered(wire.GET_FEATURES, ASKED), 1, 4096, "answered request"),
    ],
)
def test_what_is_no_record(data: bytes, count: int, step: int, says: str) -> None:
    with pytest.raises(BackEndGone, match=says):
        with_back_end(sends(data, count, step=step), inflight)


def test_descriptors_that_nobody_asked_for() -> None:
    answer = sends(answered(wire.GET_FEATURES, bytes(8)), 200, step=3)
    assert with_back_end(answer, lambda one: one.get_u64(wire.GET_FEATURES)) == 0
