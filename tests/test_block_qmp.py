"""vmm/block/qmp.py: a daemon that an image has taken over says what it likes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from vmm.block import qmp
from vmm.block.qmp import Qmp
from vmm.errors import HostError, UsageError, VmmError

GREETING = b'{"QMP": {}}\n{"return": {}}\n'


def ask(answer: Callable[[socket.socket], object]) -> None:
    """Ask a daemon that answers so for something."""
    ours, theirs = socket.socketpair()

    def main() -> None:
        with theirs, suppress(OSError):
            answer(theirs)
            theirs.shutdown(socket.SHUT_WR)
            while theirs.recv(4096):
                pass

    thread = threading.Thread(target=main)
    thread.start()
    monitor = Qmp(ours)
    try:
        monitor.ask("something")
    finally:
        monitor.close()
        thread.join()


def test_an_answer() -> None:
    ask(lambda sock: sock.sendall(GREETING + b'{"event": "X"}\n{"return": {}}\n'))


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        (b"", HostError),
        (b"x" * (3 << 16), HostError),
        (b"[" * 50_000 + b"\n", HostError),
        (b"9" * 50_000 + b"\n", HostError),
        (b"[1]\n", HostError),
        (b"\xff\xfe\n", HostError),
        (GREETING + b'{"event": "X"}\n' * 2000, HostError),
        (GREETING + b'{"error": 1}\n', UsageError),
        (GREETING + b'{"error": ["x"]}\n', UsageError),
        (GREETING + b'{"error": {"desc": {"a": "b\\nc"}}}\n', UsageError),
        (GREETING + b'{"error": {"desc": "' + b"y\\n" * 15_000 + b'"}}\n', UsageError),
    ],
)  # fmt: skip
def test_what_is_no_answer(says: bytes, kind: type[VmmError]) -> None:
    with pytest.raises(kind) as raised:
        ask(lambda sock: sock.sendall(says))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1200


def test_a_byte_now_and_then_does_not_prolong_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "ANSWER_WITHIN", 0.3)
    over = threading.Event()

    def drip(sock: socket.socket) -> None:
        while not over.wait(0.05):
            sock.sendall(b" ")

    begun = time.monotonic()
    threading.Timer(30, over.set).start()
    with pytest.raises(HostError, match="does not answer"):
        try:
            ask(drip)
        finally:
            over.set()
    assert time.monotonic() - begun < 20
