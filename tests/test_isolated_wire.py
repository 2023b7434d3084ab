"""vmm/isolated/wire.py: how long the other side may take, whatever it sends meanwhile."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from vmm.isolated.wire import HEADER, Channel, LateError, Patience, pair


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pause", [0.0, 0.01, 0.04])
def test_a_byte_now_and_then_does_not_prolong_it(pause: float) -> None:
    """A frame of a megabyte that comes so would take hours."""
    ours, theirs = pair()
    over = threading.Event()

    def drip() -> None:
        with theirs, suppress(OSError):
            theirs.sendall(HEADER.pack(2, 1 << 20, 0) + b"[]")
            while not over.wait(pause or 0.001):
                theirs.sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    channel = Channel(ours)
    try:
        with pytest.raises(LateError, match=r"no answer within 0\.5 s"):
            channel.receive(Patience(0.5))
    finally:
        over.set()
        channel.close()
        thread.join()


def test_what_comes_in_pieces_is_whole() -> None:
    ours, theirs = pair()
    one, other = Channel(ours), Channel(theirs)
    data = bytes(range(256)) * 4096
    thread = threading.Thread(target=lambda: one.send({"a": 1}, data))
    thread.start()
    assert other.receive(Patience(20)) == ({"a": 1}, data, [])
    thread.join()
    one.close()
    other.close()


def test_no_time_is_counted_while_a_function_runs() -> None:
    ours, theirs = pair()
    until = time.monotonic() + 0.3
    channel = Channel(ours)
    with theirs:
        timer = threading.Timer(0.4, theirs.sendall, [HEADER.pack(2, 0, 0) + b"[]"])
        timer.start()
        patience = Patience(0.2, suspended=lambda: time.monotonic() < until)
        assert channel.receive(patience)[0] == []
        timer.join()
    channel.close()
