"""The protocol: what a session makes of frames, and what neither side lets the other do."""

from __future__ import annotations

import random
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.host_agent import HostAgent
from vmm.agent import wire
from vmm.agent.process import run
from vmm.agent.wire import CHUNK, ERR, FRAME, IN, OUT, WINDOW, Session
from vmm.errors import AgentError

U32, PAIR = struct.Struct("<I"), struct.Struct("<II")


def frame(kind: int, stream: int = 0, data: bytes = b"", zero: int = 0) -> bytes:
    return FRAME.pack(kind, stream, zero, len(data)) + data


def started(pid: int = 7) -> bytes:
    return frame(wire.STARTED, 0, U32.pack(pid))


def exited(status: int = 0, signum: int = 0) -> bytes:
    return frame(wire.EXITED, 0, PAIR.pack(status, signum))


def whole(*frames: bytes) -> Session:
    session = Session()
    session.feed(b"".join(frames))
    return session


GOOD = (
    started(), frame(wire.DATA, OUT, b"out"), frame(wire.DATA, ERR, b"err"),
    frame(wire.DATA, OUT, b"put"), frame(wire.END, OUT), frame(wire.END, IN), exited(3),
    frame(wire.END, ERR),
)  # fmt: skip


def check(session: Session) -> None:
    assert (session.pid, session.returncode, session.complete) == (7, 3, True)
    assert (session.take(OUT), session.take(ERR)) == (b"output", b"err")
    assert session.refused


def test_frames_in_any_pieces() -> None:
    stream = b"".join(GOOD)
    check(whole(stream))
    for at in range(len(stream)):
        session = Session()
        session.feed(stream[:at])
        session.feed(stream[at:])
        check(session)
    session = Session()
    for byte in stream:
        session.feed(bytes([byte]))
    check(session)


def test_ends() -> None:
    assert whole(started(), exited(0, 9)).returncode == -9
    assert whole(frame(wire.FAILED, 0, PAIR.pack(2, 0))).failed == (2, 0)
    session = whole(frame(wire.FAILED, 0, PAIR.pack(2, wire.CANNOT_CHANGE_DIRECTORY)))
    failure = session.failure(["cmd"], "/dir")
    assert isinstance(failure, FileNotFoundError) and failure.filename == "/dir"
    session = whole(frame(wire.FAILED, 0, PAIR.pack(11, wire.CANNOT_START)))
    assert isinstance(session.failure(["cmd"], ""), AgentError)


@pytest.mark.parametrize(
    "frames",
    [
        [frame(99)],
        [frame(0)],
        [frame(wire.REQUEST, 0, b"x")],
        [frame(wire.SIGNAL, 0, U32.pack(9))],
        [FRAME.pack(wire.DATA, OUT, 0, CHUNK + 1)],
        [FRAME.pack(wire.DATA, OUT, 0, 0xFFFFFFFF)],
        [frame(wire.DATA, OUT, b"x", zero=1)],
        [frame(wire.DATA, IN, b"x")],
        [frame(wire.DATA, 3, b"x")],
        [frame(wire.DATA, 255, b"x")],
        [frame(wire.END, OUT), frame(wire.DATA, OUT, b"x")],
        [frame(wire.END, 3)],
        [frame(wire.END, OUT, b"x")],
        [frame(wire.DATA, OUT, bytes(CHUNK))] * (WINDOW // CHUNK) + [frame(wire.DATA, OUT, b"x")],
        [frame(wire.CREDIT, IN, U32.pack(1))],
        [frame(wire.CREDIT, OUT, U32.pack(0))],
        [frame(wire.CREDIT, IN, b"123")],
        [frame(wire.STARTED, 0, b"123")],
        [started(0)],
        [started(1 << 31)],
        [started(), started()],
        [exited()],
        [started(), exited(), exited()],
        [started(), exited(256)],
        [started(), exited(0, 128)],
        [started(), frame(wire.FAILED, 0, PAIR.pack(2, 0))],
        [frame(wire.FAILED, 0, PAIR.pack(2, 0)), started()],
    ],
)
def test_what_no_agent_says(frames: list[bytes]) -> None:
    with pytest.raises(AgentError, match="the guest's agent"):
        whole(*frames)


def test_thousands_of_broken_streams() -> None:
    """An AgentError or a sound session, and never more kept than the windows hold."""
    chance = random.Random(11)
    pieces = (*GOOD, frame(wire.CREDIT, IN, U32.pack(5)), frame(wire.DATA, OUT, bytes(CHUNK)))
    refused = 0
    for _ in range(5000):
        stream = bytearray(b"".join(chance.choices(pieces, k=chance.randrange(1, 12))))
        for _ in range(chance.choice((0, 1, 1, 2, 8))):
            stream[chance.randrange(len(stream))] = chance.randrange(256)
        session = Session()
        try:
            while stream:
                size = chance.choice((1, 7, 100, 1 << 20))
                session.feed(stream[:size])
                del stream[:size]
        except AgentError:
            refused += 1
        else:
            assert len(session._received) <= CHUNK + FRAME.size
        assert session.available(OUT) <= WINDOW and session.available(ERR) <= WINDOW
        assert session.room <= WINDOW
        assert session.returncode is None or -128 < session.returncode < 256
    assert 1000 < refused < 4900


def test_windows() -> None:
    session = whole(started())
    assert session.room == WINDOW
    assert session.write(bytes(2 * WINDOW)) == WINDOW
    assert session.write(b"x") == 0
    session.feed(frame(wire.CREDIT, IN, U32.pack(10)))
    assert session.write(bytes(20)) == 10
    session.feed(frame(wire.END, IN))
    with pytest.raises(BrokenPipeError):
        session.write(b"x")
    session.out.clear()
    for _ in range(100):  # credit goes back as it is taken, and not before
        session.feed(frame(wire.DATA, OUT, bytes(CHUNK)))
        assert session.out == b""
        assert len(session.take(OUT)) == CHUNK
        assert session.out == frame(wire.CREDIT, OUT, U32.pack(CHUNK))
        session.out.clear()
    session.feed(frame(wire.DATA, ERR, b"abc"))
    assert (session.take(ERR, 2), session.take(ERR, 2), session.take(ERR, 2)) == (b"ab", b"c", b"")


def test_dropped_output_is_thrown_away() -> None:
    session = whole(started())
    session.drop(OUT)
    assert session.out == frame(wire.END, OUT)
    for _ in range(100):
        session.feed(frame(wire.DATA, OUT, bytes(CHUNK)))  # it was on its way
    session.feed(frame(wire.END, OUT))
    assert session.available(OUT) == 0


def test_greetings() -> None:
    wire.check_hello(wire.HELLO.pack(wire.MAGIC, wire.VERSION, 0))
    with pytest.raises(AgentError, match="is not vmm's agent"):
        wire.check_hello(wire.HELLO.pack(1, wire.VERSION, 0))
    with pytest.raises(AgentError, match=f"speaks version 2 of the protocol, this vmm speaks {1}"):
        wire.check_hello(wire.HELLO.pack(wire.MAGIC, 2, 0))


# --- the agent's side -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostAgent]:
    with HostAgent(tmp_path_factory.mktemp("agent")) as running:
        yield running


def hangs_up(sock: socket.socket) -> bool:
    """Whether the agent ends the connection."""
    sock.settimeout(60)
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


REQUEST = wire.request(wire.EXECUTE, ["sleep", "1000"])
HEAD = struct.Struct("<IHBBHHII")


def request(text: bytes = b"\0sleep\x001000\0", **more: int) -> bytes:
    fields = {
        "magic": wire.MAGIC, "version": 1, "kind": 1, "flags": 0, "rows": 0, "columns": 0,
        "argc": 2, "envc": 0, **more,
    }  # fmt: skip
    return frame(wire.REQUEST, 0, HEAD.pack(*fields.values()) + text)


NONSENSE = [
    b"",
    b"\0" * 7,
    b"GET / HTTP/1.0\r\n\r\n",
    frame(wire.DATA, IN, b"x"),
    frame(wire.REQUEST, 0, b"short"),
    FRAME.pack(wire.REQUEST, 0, 0, 0xFFFFFFFF),
    request(magic=1),
    request(version=2),
    request(argc=0),
    request(argc=3),
    request(argc=0xFFFFFFFF),
    request(envc=1),
    request(argc=wire.WORDS_MAX, envc=0xFFFFFFFF),
    request(b"no NUL at all"),
    REQUEST + frame(99),
    REQUEST + FRAME.pack(wire.DATA, IN, 0, CHUNK + 1),
    REQUEST + frame(wire.DATA, OUT, b"x"),
    REQUEST + frame(wire.END, 3),
    REQUEST + frame(wire.CREDIT, OUT, U32.pack(1)),
    REQUEST + frame(wire.CREDIT, IN, U32.pack(0)),
    REQUEST + frame(wire.CREDIT, 7, U32.pack(0)),
    REQUEST + frame(wire.SIGNAL, 0, U32.pack(0)),
    REQUEST + frame(wire.SIGNAL, 0, U32.pack(65)),
    REQUEST + frame(wire.SIGNAL, 0, b"\x09"),
    REQUEST + frame(wire.RESIZE, 0, b""),
    REQUEST + frame(wire.DATA, IN, bytes(CHUNK)) * (WINDOW // CHUNK) * 2,
    REQUEST + REQUEST,
]


@pytest.mark.parametrize("number", range(len(NONSENSE)))
def test_the_agent_hangs_up_on_nonsense(agent: HostAgent, number: int) -> None:
    said = NONSENSE[number]
    with agent.connect() as sock:
        with suppress(BrokenPipeError):  # it may not listen to the end
            sock.sendall(said)
        if len(said) < FRAME.size:
            sock.shutdown(socket.SHUT_WR)
        assert hangs_up(sock)
    assert run(agent, ["true"]).returncode == 0


def test_a_signal_to_what_could_not_be_started(tmp_path: Path) -> None:
    """An errno is nobody's process id: ENOENT is 2, which here is a sleep."""
    namespace = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    script = 'sleep 1000 & exec "$0" "$@"'
    with HostAgent(tmp_path, within=[*namespace, "sh", "-c", script]) as running:
        with running.connect() as sock:
            sock.sendall(wire.request(wire.EXECUTE, ["/no/such/program"]))
            sock.sendall(frame(wire.SIGNAL, 1, U32.pack(9)) + frame(wire.SIGNAL, 0, U32.pack(9)))
            sock.shutdown(socket.SHUT_WR)
            assert hangs_up(sock)
        (agent,) = children(running.process.pid)
        found = [Path(f"/proc/{pid}/status").read_text() for pid in children(int(agent))]
        (sleep,) = [status for status in found if re.search(r"^NSpid:.*\t2$", status, re.M)]
        assert "State:\tZ" not in sleep


def test_a_thousand_broken_requests(agent: HostAgent) -> None:
    """Whatever the host says, the agent serves the next one, and no command is left."""
    chance = random.Random(12)
    pieces = [
        frame(wire.DATA, IN, b"x" * 100), frame(wire.END, IN), frame(wire.CREDIT, OUT, U32.pack(3)),
        frame(wire.SIGNAL, 1, U32.pack(15)), frame(wire.RESIZE, 0, U32.pack(5)),
    ]  # fmt: skip
    for _ in range(1000):
        stream = bytearray(REQUEST + b"".join(chance.choices(pieces, k=chance.randrange(5))))
        for _ in range(chance.randrange(6)):
            stream[chance.randrange(len(stream))] ^= 1 << chance.randrange(8)
        with agent.connect() as sock, suppress(BrokenPipeError):
            sock.sendall(stream)
    assert run(agent, ["echo", "well"]).stdout == b"well\n"
    limit = time.monotonic() + 60
    while children(agent.process.pid):
        assert time.monotonic() < limit, "a connection's process is left"
        time.sleep(0.05)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
