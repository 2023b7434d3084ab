"""Agents that say nothing, too much or nonsense: calls end in time, and keep within bounds."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vmm.agent import connection, copy, process, tree, wire
from vmm.agent.connection import Connection
from vmm.agent.copy import get, put
from vmm.agent.process import GuestProcess, run
from vmm.agent.wire import FRAME, Session
from vmm.aio import process as aio_process
from vmm.errors import AgentError

pytestmark = pytest.mark.timeout(60)

STARTED = FRAME.pack(wire.STARTED, 0, 0, 4) + struct.pack("<I", 7)
ENDED = FRAME.pack(wire.END, wire.OUT, 0, 0) + FRAME.pack(wire.END, wire.ERR, 0, 0)
EXITED = FRAME.pack(wire.EXITED, 0, 0, 8) + struct.pack("<II", 0, 0)
FLOOD = FRAME.pack(wire.DATA, wire.OUT, 0, 1000) + bytes(1000)
NOTHING = FRAME.pack(wire.DATA, wire.OUT, 0, 0)
LIMIT = 0.3
"""The timeouts here, seconds."""
END = 8.0
"""Far above LIMIT and the moment after it; far below SILENCE, and for ever."""


AGENTS: list[Agent] = []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """The agents' threads and sockets end with the test: others count them."""
    yield
    while AGENTS:
        AGENTS.pop().close()
    gc.collect()  # commands that a test has left


class Agent:
    """A guest's agent that sends `parts`, and nothing more; it keeps to no window."""

    def __init__(self, parts: Callable[[], Iterator[bytes]], reads: bool = True) -> None:
        self.parts = parts
        self.reads = reads
        self.kept: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        AGENTS.append(self)

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.kept.append(theirs)
        for serve in (self.send, self.read) if self.reads else (self.send,):
            thread = threading.Thread(target=serve, args=(theirs,), daemon=True)
            thread.start()
            self.threads.append(thread)
        return ours

    def close(self) -> None:
        for sock in self.kept:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(END)
        for sock in self.kept:
            sock.close()

    def why_lost(self) -> str:
        return "gone"

    def send(self, sock: socket.socket) -> None:
        with suppress(OSError):
            for part in self.parts():
                sock.sendall(part)

    def read(self, sock: socket.socket) -> None:
        with suppress(OSError):
            while sock.recv(1 << 20):
                pass


def ending(function: Callable[[], object]) -> object:
    """What `function` returns or raises; it must do so in time."""
    got: list[object] = []

    def call() -> None:
        try:
            got.append(function())
        except BaseException as err:
            got.append(err)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(END)
    assert got, "it does not end"
    return got[0]


def both(agent: Agent, **options: object) -> list[object]:
    """What run() raises or returns, for threads and for asyncio."""
    return [
        ending(lambda: run(agent, ["x"], **options)),
        ending(lambda: asyncio.run(aio_process.run(agent, ["x"], **options))),
    ]


def flood(frame: bytes) -> Iterator[bytes]:
    """`frame` without an end, each time as many as fill the receive buffer, as fast as it goes."""
    return itertools.repeat(frame * (connection.RECEIVE // len(frame)))


def gentle() -> Iterator[bytes]:
    """Output without an end, no quicker than it is taken (there is a window)."""
    yield STARTED
    while True:
        yield FLOOD * 8
        time.sleep(0.001)


ENDLESS = {
    "mute": lambda: iter([]),
    "started, then mute": lambda: iter([STARTED]),
    "writes for ever": gentle,
    "empty frames before it starts": lambda: flood(NOTHING),
    "empty frames for ever": lambda: itertools.chain([STARTED], flood(NOTHING)),
    "half a frame": lambda: iter([STARTED[:5]]),
    "has ended, but its output has not": lambda: iter([STARTED, EXITED]),
    "its output has ended, it has not": lambda: iter([STARTED, ENDED]),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_timeout_is_kept(what: str) -> None:
    for got in both(Agent(ENDLESS[what]), timeout=LIMIT):
        assert isinstance(got, subprocess.TimeoutExpired), got
        assert got.timeout == LIMIT


@pytest.mark.parametrize("what", ["mute", "started, then mute"])
def test_a_timeout_is_kept_by_who_reads_nothing(what: str) -> None:
    """More input than the socket holds."""
    agent = Agent(ENDLESS[what], reads=False)
    for got in both(agent, timeout=LIMIT, input=bytes(8 << 20), env={"X": "x" * 500_000}):
        assert isinstance(got, subprocess.TimeoutExpired), got


def test_without_a_timeout_silence_has_an_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (connection, process, copy, aio_process):
        monkeypatch.setattr(module, "SILENCE", LIMIT)
    mute = Agent(ENDLESS["mute"])
    for got in both(mute):
        assert isinstance(got, AgentError) and "has not started" in str(got), got
    (tmp_path / "f").write_bytes(bytes(4 << 20))
    for transfer in (
        lambda: put(mute, tmp_path / "f", "/f"),
        lambda: put(Agent(ENDLESS["mute"], reads=False), tmp_path / "f", "/f"),
        lambda: put(mute, io.BytesIO(bytes(1 << 20)), "/f"),
        lambda: get(mute, "/f", tmp_path / "g"),
        lambda: get(Agent(ENDLESS["started, then mute"]), "/f", io.BytesIO()),
    ):
        got = ending(transfer)
        assert isinstance(got, AgentError) and "silent for" in str(got), got


@pytest.mark.parametrize("what", ENDLESS)
def test_timeouts_of_files(what: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(4 << 20))
    agent = Agent(ENDLESS[what])
    for transfer in (
        lambda: put(agent, tmp_path / "f", "/f", timeout=LIMIT),
        lambda: get(agent, "/f", tmp_path / "g", timeout=LIMIT),
    ):
        assert isinstance(ending(transfer), (TimeoutError, AgentError))


def test_output_is_bounded() -> None:
    for got in both(Agent(gentle), timeout=END, max_output=100_000):
        assert isinstance(got, AgentError) and "over 100000 bytes; max_output=" in str(got), got

    def read() -> object:
        started = GuestProcess(Agent(gentle), ["x"], max_output=100_000)
        assert started.stdout is not None
        return started.stdout.read()

    async def read_all() -> object:
        started = await aio_process.AsyncGuestProcess.start(
            Agent(gentle), ["x"], max_output=100_000
        )
        assert started.stdout is not None
        return await started.stdout.read()

    for got in (ending(read), ending(lambda: asyncio.run(read_all()))):
        assert isinstance(got, AgentError) and "max_output=" in str(got), got


def test_who_waits_with_a_time_is_not_kept_by_a_flood() -> None:
    started = GuestProcess(Agent(ENDLESS["empty frames for ever"]), ["x"])
    assert ending(started.poll) is None
    assert isinstance(ending(lambda: started.wait(LIMIT)), subprocess.TimeoutExpired)
    got = ending(lambda: started.communicate(timeout=LIMIT))
    assert isinstance(got, subprocess.TimeoutExpired)


@pytest.mark.parametrize("reads", [True, False])
def test_a_process_is_left_in_time_after_an_exception(reads: bool) -> None:
    """Also with input that the command never takes."""

    def leave() -> None:
        agent = Agent(ENDLESS["started, then mute"], reads)
        with GuestProcess(agent, ["x"]) as process:
            assert process.stdin is not None
            process.stdin.write(bytes(wire.WINDOW if reads else 150_000))
            process.stdin.write(b"what is left in the buffer")
            raise KeyError("of the program")

    assert isinstance(ending(leave), KeyError)


class Deaf(Agent):
    """It writes for ever, within its window, and takes nothing, of which little fits anywhere."""

    def connect(self) -> socket.socket:
        sock = super().connect()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least
        return sock


def writes_much(stream: int = wire.OUT) -> Iterator[bytes]:
    yield STARTED
    data = FRAME.pack(wire.DATA, stream, 0, 16384) + bytes(16384)
    while True:
        yield data
        time.sleep(0.001)


def test_a_timeout_is_kept_while_nobody_takes_our_credit(tmp_path: Path) -> None:
    """The agent lets us read, and so have something to tell it, without an end."""
    deaf = Deaf(writes_much, reads=False)
    for got in both(deaf, timeout=1.0):
        assert isinstance(got, subprocess.TimeoutExpired), got
    assert isinstance(
        ending(lambda: GuestProcess(deaf, ["x"]).communicate(timeout=1.0)),
        subprocess.TimeoutExpired,
    )
    name = tree.ENTRY.pack(tree.REGULAR, 0, 0, 0o644, 0, 0, 0, 0)
    data = struct.pack("<I", 8192) + bytes(8192)

    def a_file_without_an_end() -> Iterator[bytes]:
        yield STARTED
        yield FRAME.pack(wire.DATA, wire.OUT, 0, len(name)) + name
        while True:
            yield FRAME.pack(wire.DATA, wire.OUT, 0, len(data)) + data
            time.sleep(0.0005)

    for target in (tmp_path / "f", io.BytesIO()):
        file = Deaf(a_file_without_an_end, reads=False)
        got = ending(lambda file=file, target=target: get(file, "/f", target, timeout=1.0))
        assert isinstance(got, TimeoutError), got
    assert not (tmp_path / "f").exists()


def test_a_timeout_counts_for_input_that_was_written_before() -> None:
    """As much as the window holds, and a byte in the buffer of `stdin`, which nobody takes."""

    def communicate() -> object:
        process = GuestProcess(Agent(ENDLESS["started, then mute"]), ["x"])
        assert process.stdin is not None
        process.stdin.write(bytes(wire.WINDOW))
        process.stdin.write(b"x")
        return process.communicate(timeout=LIMIT)

    assert isinstance(ending(communicate), subprocess.TimeoutExpired)


def lines_without_an_end() -> Iterator[bytes]:
    yield STARTED
    short = b"a line\n" * 1000
    while True:
        yield FRAME.pack(wire.DATA, wire.OUT, 0, len(short)) + short
        time.sleep(0.001)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("bufsize", [-1, 0])
def test_lines_are_bounded(text: bool, bufsize: int) -> None:
    """A line that does not end, and lines that do not: by every way to read without a size."""

    def started(parts: Callable[[], Iterator[bytes]]) -> Any:
        options: dict[str, Any] = {"text": text, "bufsize": bufsize, "max_output": 100_000}
        return GuestProcess(Agent(parts), ["x"], **options).stdout

    for read in (
        lambda: started(gentle).readline(),
        lambda: next(started(gentle)),
        lambda: list(started(gentle)),
        lambda: started(gentle).readlines(),
        lambda: started(lines_without_an_end).readlines(),
        lambda: started(lines_without_an_end).read(),
    ):
        got = ending(read)
        assert isinstance(got, AgentError) and "max_output=" in str(got), got
    out = started(lines_without_an_end)
    assert len(out.readline()) == 7 and len(out.readline(3)) == 3
    assert len(out.readlines(20)) == 4  # the rest of that line, and three more


def test_lines_of_asyncio_are_bounded() -> None:
    async def read() -> object:
        process = await aio_process.AsyncGuestProcess.start(Agent(gentle), ["x"])
        assert process.stdout is not None
        return await process.stdout.readline()

    got = ending(lambda: asyncio.run(read()))
    assert isinstance(got, ValueError), got


@pytest.mark.parametrize(
    ("number", "what"), [(0xFFFFFFFF, 2), (0, 0), (1 << 31, 1), (4096, 0), (2, 99), (2, 0xFFFFFFFF)]
)
def test_error_numbers_that_cannot_be(number: int, what: int) -> None:
    said = FRAME.pack(wire.FAILED, 0, 0, 8) + struct.pack("<II", number, what)
    for got in both(Agent(lambda: iter([said])), timeout=END):
        assert isinstance(got, AgentError) and "sent error" in str(got), got


@pytest.mark.parametrize("number", [0xFFFFFFFF, 0, 1 << 31, 4096])
def test_error_numbers_of_files_that_cannot_be(number: int, tmp_path: Path) -> None:
    said = struct.pack("<I", number) + b"/f"
    frames = [STARTED, FRAME.pack(wire.DATA, wire.ERR, 0, len(said)) + said, ENDED]
    frames.append(FRAME.pack(wire.EXITED, 0, 0, 8) + struct.pack("<II", 1, 0))
    got = ending(lambda: get(Agent(lambda: iter(frames)), "/f", tmp_path / "f", timeout=END))
    assert isinstance(got, AgentError) and "sent error" in str(got), got


def test_a_time_that_is_up_still_takes_what_has_come() -> None:
    """More than is received at once."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    session = Session()
    link = Connection(ours, session, lambda: "gone")
    for _ in range(3):
        theirs.sendall(NOTHING * 20_000)
    theirs.sendall(STARTED)
    assert link.wait_for(lambda: bool(session.pid), time.monotonic() - 1)
    link.close()
    theirs.close()
