"""vmm.console.backends: where output goes, and what happens when it cannot."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import termios
import threading
import time
from pathlib import Path

import pytest

from vmm.console import backends
from vmm.console.backends import Backend, FileBackend, PtyBackend, StdioBackend, open_backend
from vmm.errors import UsageError


def test_none_takes_everything() -> None:
    backend = open_backend("none")
    backend.write(b"gone")
    backend.close()
    assert (backend.input_fd, backend.error) == (-1, "")


def test_file_is_truncated_and_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"old and longer")
    backend = open_backend(f"file:{path}")
    backend.write(b"new\n")
    assert path.read_bytes() == b"new\n"
    backend.close()
    backend.close()
    backend.write(b"late")
    assert path.read_bytes() == b"new\n"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("file:", "--console file:: no such console; use auto, none, file:PATH or pty"),
        ("tty9", "--console tty9: no such console"),
        ("", "no such console"),
        ("file:/nonexistent/dir/log", r"file:/nonexistent/dir/log: No such file or directory"),
        ("file:/", "file:/: Is a directory; give a file"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_backend(spec)
    assert "\n" not in str(caught.value)


def test_a_full_disk_ends_the_output_only() -> None:
    backend = FileBackend("/dev/full")
    backend.write(b"x")
    backend.write(b"y")
    assert os.strerror(errno.ENOSPC) in backend.error
    backend.close()


def test_a_reader_that_goes_away_ends_the_output_only() -> None:
    reading, writing = os.pipe()
    backend = StdioBackend(-1, writing)
    backend.write(b"one\n")
    os.close(reading)
    backend.write(b"two\n")
    backend.write(b"three\n")
    assert os.strerror(errno.EPIPE) in backend.error
    backend.close()
    os.close(writing)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_slow_reader_gets_every_byte(blocking: bool) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    backend = StdioBackend(-1, writing)
    data = os.urandom(100_000)
    writer = threading.Thread(target=backend.write, args=(data,))
    writer.start()
    got = bytearray()
    while len(got) < len(data):
        got += os.read(reading, 999)
    writer.join()
    assert got == data
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("how", ["end", "close"])
def test_a_stuck_reader_does_not_hold_the_end_up(how: str) -> None:
    reading, writing = os.pipe()
    backend = StdioBackend(-1, writing)
    writer = threading.Thread(target=backend.write, args=(bytes(1 << 20),), daemon=True)
    writer.start()
    writer.join(0.1)
    assert writer.is_alive()
    getattr(backend, how)()
    writer.join(30)
    assert not writer.is_alive()
    assert backend.error or how == "close"
    os.close(reading)
    os.close(writing)


def test_a_write_under_way_returns_at_a_pause_and_nothing_is_lost() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    backend = StdioBackend(-1, writing)
    data = os.urandom(40_000)
    writer = threading.Thread(target=backend.write, args=(data[:20_000],), daemon=True)
    writer.start()
    writer.join(0.1)
    assert writer.is_alive()
    backend.hold()
    writer.join(30)
    assert not writer.is_alive()
    backend.write(data[20_000:30_000])  # of another vCPU; it does not wait either
    got = bytearray(os.read(reading, 4096))
    backend.go_on()
    writer = threading.Thread(target=backend.write, args=(data[30_000:],), daemon=True)
    writer.start()
    while len(got) < len(data):
        got += os.read(reading, 4096)
    writer.join(30)
    assert got == data
    os.close(reading)
    os.close(writing)


def test_what_a_pause_keeps_is_bounded() -> None:
    reading, writing = os.pipe()
    backend = StdioBackend(-1, writing)
    backend.hold()
    for _ in range(5):
        backend.write(bytes(backends.KEPT_MAX))
    assert len(backend._kept) == backends.KEPT_MAX
    os.close(reading)
    os.close(writing)


def test_closed_standard_descriptors() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    with pytest.raises(UsageError, match="standard output: Bad file descriptor"):
        StdioBackend(reading, writing)
    with open(os.devnull, "w") as null:
        backend = StdioBackend(reading if reading != null.fileno() else writing, null.fileno())
        assert backend.input_fd == -1


def test_interactive_is_a_terminal_at_the_input() -> None:
    master, slave = os.openpty()
    reading, writing = os.pipe()
    assert StdioBackend(slave, writing).interactive
    assert not StdioBackend(reading, slave).interactive
    for fd in (master, slave, reading, writing):
        os.close(fd)


# --- pty -----------------------------------------------------------------------------------------


@pytest.fixture
def pty() -> PtyBackend:
    backend = open_backend("pty")
    assert isinstance(backend, PtyBackend)
    return backend


def read_some(fd: int) -> bytes:
    assert select.select([fd], [], [], 30)[0], "nothing came"
    return os.read(fd, 4096)


def test_pty_carries_both_ways_unchanged(pty: PtyBackend) -> None:
    fd = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
    pty.write(b"a\nb\r\x03")
    assert read_some(fd) == b"a\nb\r\x03"
    os.write(fd, b"\x03\r\n")
    assert read_some(pty.input_fd) == b"\x03\r\n"
    assert not termios.tcgetattr(fd)[3] & (termios.ECHO | termios.ICANON)
    os.close(fd)
    pty.close()


def test_pty_survives_its_reader(pty: PtyBackend) -> None:
    pty.write(b"nobody hears this")
    for text in (b"first", b"second"):
        fd = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
        pty.write(text)
        assert read_some(fd) == text
        os.close(fd)
        pty.write(b"between")
    assert pty.error == ""
    pty.close()
    pty.close()


def test_pty_reader_that_stops_reading_loses_output_but_stops_nothing(pty: PtyBackend) -> None:
    fd = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
    writer = threading.Thread(target=lambda: [pty.write(bytes(4096)) for _ in range(200)])
    writer.start()
    writer.join(30)
    assert not writer.is_alive()
    deadline = time.monotonic() + 30
    while b"back" not in (got := read_some(fd)) and time.monotonic() < deadline:
        pty.write(b"back")
    assert b"back" in got
    os.close(fd)
    pty.close()


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for spec in ("none", "pty", f"file:{tmp_path}/log", "auto"):
        backend: Backend = open_backend(spec)
        backend.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
