"""Files and trees both ways, with the agent on this host; and what a hostile guest sends."""

from __future__ import annotations

import datetime
import errno
import io
import os
import random
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.host_agent import HostAgent
from vmm.agent import tree, wire
from vmm.agent.copy import get, put
from vmm.errors import AgentError


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostAgent]:
    with HostAgent(tmp_path_factory.mktemp("agent")) as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree with some of everything."""
    top = tmp_path / "source"
    (top / "a" / "b" / "c").mkdir(parents=True)
    (top / "a" / "random").write_bytes(random.Random(1).randbytes(300_000))
    (top / "empty").touch()
    (top / "program").write_text("#!/bin/sh\n")
    (top / "program").chmod(0o751)
    (top / ("n" * 255)).write_text("a long name")
    Path(os.fsdecode(os.fsencode(top) + b"/not UTF-8 \xff\n")).write_text("an odd one")
    (top / "link").symlink_to("a/random")
    (top / "a" / "dangling").symlink_to("/no/where")
    os.mkfifo(top / "fifo", 0o640)
    os.utime(top / "program", ns=(1, 123_456_789_012_345_678))
    os.utime(top / "link", ns=(1, -1), follow_symlinks=False)
    (top / "a" / "b").chmod(0o500)
    os.utime(top / "a" / "b", ns=(1, 1_111_111_111_111_111_111))
    return top


def listing(top: Path) -> list[tuple[object, ...]]:
    """All that is to be the same."""
    found: list[tuple[object, ...]] = []
    for directory, below, files in os.walk(top):
        for name in [".", *below, *files]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = Path(path).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            inside = os.path.relpath(path, top)
            found.append((inside, status.st_mode, status.st_mtime_ns, content))
    return sorted(found, key=lambda item: str(item[0]))


def test_a_tree_there_and_back(agent: HostAgent, source: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there" / "with parents", tmp_path / "back"
    put(agent, source, str(there))
    assert listing(there) == listing(source)
    for refused in (there, there / "a"):  # a FIFO; a link to /no/where
        with pytest.raises(PermissionError, match="filter='all'"):
            get(agent, str(refused), tmp_path / "refused")
    get(agent, str(there), back, filter="all")
    assert listing(back) == listing(source)
    # Over what is there already, and into a directory under its own name.
    (there / "link").unlink()
    (there / "link").write_text("in the way")
    put(agent, source, str(there))
    get(agent, str(there), back, filter="all")
    assert listing(back) == listing(there) == listing(source)
    get(agent, str(there), f"{tmp_path}/into/", filter="all")
    assert listing(tmp_path / "into" / "with parents") == listing(source)
    put(agent, source, f"{tmp_path}/into/")
    assert listing(tmp_path / "into" / "source") == listing(source)


def test_single_files(agent: HostAgent, source: Path, tmp_path: Path) -> None:
    put(agent, source / "link", str(tmp_path / "copy"))  # what was named is followed
    assert (tmp_path / "copy").read_bytes() == (source / "a" / "random").read_bytes()
    get(agent, str(source / "program"), tmp_path / "program")
    assert (tmp_path / "program").stat().st_mode & 0o7777 == 0o751
    put(agent, io.BytesIO(b"made up"), str(tmp_path / "made"), mode=0o600)
    assert (tmp_path / "made").read_text() == "made up"
    assert (tmp_path / "made").stat().st_mode & 0o7777 == 0o600
    into = io.BytesIO()
    get(agent, "/proc/self/status", into)  # says its size is 0
    assert into.getvalue().startswith(b"Name:\tvmm-agent")


@pytest.mark.parametrize("size", [0, 1, wire.CHUNK, 1_000_000])
def test_progress_of_a_file(agent: HostAgent, tmp_path: Path, size: int) -> None:
    data, there = random.Random(2).randbytes(size), str(tmp_path / "there")
    put_counts: list[int] = []
    got_counts: list[int] = []
    put(agent, io.BytesIO(data), there, progress=put_counts.append)
    into = io.BytesIO()
    get(agent, there, into, progress=got_counts.append)
    assert into.getvalue() == data
    for counts in (put_counts, got_counts):
        assert counts[-1] == size
        assert counts == sorted(set(counts))  # it only grows, and nothing is told twice
        assert len(counts) >= size // (256 << 10)  # often enough to show


def test_progress_of_a_tree(agent: HostAgent, source: Path, tmp_path: Path) -> None:
    files = (path for path in source.rglob("*") if path.is_file() and not path.is_symlink())
    data = sum(path.stat().st_size for path in files)
    counts: list[int] = []
    put(agent, source, str(tmp_path / "there"), progress=counts.append)
    assert counts[-1] == data
    counts.clear()
    get(agent, str(tmp_path / "there"), tmp_path / "back", filter="all", progress=counts.append)
    assert counts[-1] == data
    (tmp_path / "nothing").mkdir()
    put(agent, tmp_path / "nothing", str(tmp_path / "none"), progress=counts.append)
    assert counts[-1] == 0


def test_what_progress_raises_ends_the_copy(agent: HostAgent, tmp_path: Path) -> None:
    def stop(size: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "big").write_bytes(bytes(4 << 20))
    with pytest.raises(KeyboardInterrupt):
        get(agent, str(tmp_path / "big"), tmp_path / "copy", progress=stop)
    assert os.listdir(tmp_path) == ["big"]
    with pytest.raises(KeyboardInterrupt) as caught:
        put(agent, tmp_path / "big", str(tmp_path / "copy"), progress=stop)
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert str(tmp_path / "big") not in opened  # though the traceback is there: `caught`
    del caught
    get(agent, str(tmp_path / "big"), tmp_path / "whole")  # the agent goes on


def test_a_running_program_is_replaced(agent: HostAgent, tmp_path: Path) -> None:
    program = tmp_path / "sleep"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    with subprocess.Popen([program, "1000"]) as running:
        try:
            put(agent, "/bin/true", str(program))
            assert subprocess.run([program], check=False).returncode == 0
        finally:
            running.kill()


def test_what_cannot_be_copied(agent: HostAgent, source: Path, tmp_path: Path) -> None:
    def error(function: Callable[[], object]) -> tuple[int | None, str]:
        with pytest.raises(OSError) as caught:
            function()
        return caught.value.errno, str(caught.value.filename)

    nothing = str(tmp_path / "nothing")
    assert error(lambda: put(agent, nothing, "/tmp/x")) == (errno.ENOENT, nothing)
    assert error(lambda: get(agent, nothing, tmp_path / "x")) == (errno.ENOENT, nothing)
    assert error(lambda: put(agent, source, "/proc/no/such")) == (errno.ENOENT, "/proc/no/")
    number, where = error(lambda: put(agent, source, str(source / "program" / "x")))
    assert (number, where) == (errno.ENOTDIR, f"{source}/program/")
    number, where = error(lambda: put(agent, source / "a", str(source / "empty")))
    assert (number, where) == (errno.ENOTDIR, f"{source}/empty")
    assert error(lambda: get(agent, "/dev", tmp_path / "dev"))[0] == errno.EOPNOTSUPP
    assert error(lambda: put(agent, "/dev", f"{tmp_path}/dev2"))[0] == errno.EOPNOTSUPP
    assert error(lambda: get(agent, str(source), io.BytesIO())) == (errno.EISDIR, str(source))
    with pytest.raises(ValueError, match="'here' is no path of a file in the guest"):
        put(agent, source, "here")
    with pytest.raises(ValueError, match="begins with /"):
        get(agent, "there", tmp_path / "x")


def test_a_full_disk_in_the_guest(agent: HostAgent) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        put(agent, io.BytesIO(bytes(1 << 20)), "/dev/full")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


def test_deep_trees(agent: HostAgent, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    path = deep
    for _ in range(tree.DEPTH_MAX - 1):
        path = path / "d"
    path.mkdir(parents=True)
    (path / "bottom").write_text("here")
    put(agent, deep, str(tmp_path / "there"))
    get(agent, str(tmp_path / "there"), tmp_path / "back")
    assert listing(tmp_path / "back") == listing(deep)
    (path / "d").mkdir()
    with pytest.raises(OSError) as caught:
        put(agent, deep, str(tmp_path / "there2"))
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(OSError) as caught:
        get(agent, str(deep), str(tmp_path / "back2"))
    assert caught.value.errno == errno.ELOOP


# --- a hostile guest ------------------------------------------------------------------------------


class Hostile:
    """A guest that sends this stream for a tree, whatever is asked."""

    def __init__(self, stream: bytes, status: int = 0, more: bytes = b"") -> None:
        self.stream = stream
        self.status = status
        self.more = more
        self.threads: list[threading.Thread] = []

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.threads.append(threading.Thread(target=self._serve, args=(theirs,), daemon=True))
        self.threads[-1].start()
        return ours

    def why_lost(self) -> str:
        return "the guest has hung up"

    def _serve(self, sock: socket.socket) -> None:
        frame = wire.FRAME.pack
        out = frame(wire.STARTED, 0, 0, 4) + (7).to_bytes(4, "little")
        for at in range(0, len(self.stream), wire.CHUNK):
            part = self.stream[at : at + wire.CHUNK]
            out += frame(wire.DATA, wire.OUT, 0, len(part)) + part
        out += self.more
        for stream in (wire.OUT, wire.ERR):
            out += frame(wire.END, stream, 0, 0)
        out += frame(wire.EXITED, 0, 0, 8) + self.status.to_bytes(4, "little") + bytes(4)
        with sock, suppress(OSError):  # the host has hung up
            sock.sendall(out)
            while sock.recv(1 << 16):
                pass


def head(kind: int, name: bytes = b"", mode: int = 0o755, size: int = 0, **more: int) -> bytes:
    zero, name_size = more.get("zero", 0), more.get("name_size", len(name))
    seconds, nanoseconds = more.get("seconds", 5), more.get("nanoseconds", 0)
    return tree.ENTRY.pack(kind, zero, name_size, mode, size, seconds, nanoseconds, 0) + name


def file(name: bytes, data: bytes = b"evil", mode: int = 0o644) -> bytes:
    chunk = len(data).to_bytes(4, "little") + data
    return head(tree.REGULAR, name, mode) + chunk + (bytes(4) if data else b"")


def link(name: bytes, target: bytes) -> bytes:
    return head(tree.LINK, name, size=len(target)) + target


TOP, UP, LAST = head(tree.DIRECTORY), head(tree.UP), head(tree.LAST)


REFUSED = [
    b"",
    LAST,
    UP,
    TOP,
    TOP + UP,
    TOP + UP + UP,
    TOP + UP + TOP + UP + LAST,
    TOP + file(b"..") + UP + LAST,
    TOP + file(b".") + UP + LAST,
    TOP + file(b"") + UP + LAST,
    TOP + file(b"../../evil") + UP + LAST,
    TOP + file(b"/tmp/evil") + UP + LAST,
    TOP + file(b"a\0b") + UP + LAST,
    TOP + head(tree.DIRECTORY, b"..") + file(b"evil") + UP + UP + LAST,
    TOP + head(tree.REGULAR, b"x", name_size=256) + LAST,
    TOP + head(tree.REGULAR, b"x") + (1 << 30).to_bytes(4, "little"),
    TOP + head(tree.REGULAR, b"x", mode=0o100644) + bytes(4) + UP + LAST,
    TOP + head(tree.REGULAR, b"x", nanoseconds=1_000_000_000) + bytes(4) + UP + LAST,
    TOP + head(tree.REGULAR, b"x", seconds=1 << 62) + bytes(4) + UP + LAST,
    TOP + head(tree.REGULAR, b"x", zero=1) + bytes(4) + UP + LAST,
    TOP + head(tree.LINK, b"x", size=0) + UP + LAST,
    TOP + head(tree.LINK, b"x", size=1 << 40) + UP + LAST,
    TOP + link(b"x", b"a\0b") + UP + LAST,
    TOP + head(99, b"x") + UP + LAST,
    TOP + (head(tree.DIRECTORY, b"d") * tree.DEPTH_MAX),
    TOP + UP + LAST + b"more",
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_streams_that_are_refused(number: int, tmp_path: Path) -> None:
    with pytest.raises(AgentError):
        get(Hostile(REFUSED[number]), "/x", tmp_path / "in" / "here", timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_links_lead_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim"
    victim.write_text("untouched")
    way_out = os.fsencode(outside)
    for stream in (
        TOP + link(b"l", way_out) + head(tree.DIRECTORY, b"l") + file(b"victim") + UP + UP + LAST,
        TOP + head(tree.DIRECTORY, b"l") + UP + link(b"l", way_out) + UP + LAST,
    ):
        with pytest.raises(OSError):
            get(Hostile(stream), "/x", tmp_path / "here", timeout=60, filter="all")
    stream = TOP + link(b"f", os.fsencode(victim)) + file(b"f") + UP + LAST
    get(Hostile(stream), "/x", tmp_path / "there", timeout=60, filter="all")
    assert (tmp_path / "there" / "f").read_text() == "evil"
    assert not (tmp_path / "there" / "f").is_symlink()
    assert victim.read_text() == "untouched"


@pytest.mark.parametrize("kind", ["link", "fifo"])
@pytest.mark.parametrize("into", ["new", "over a file", "/"])
def test_no_link_or_fifo_takes_the_place_of_a_file(kind: str, into: str, tmp_path: Path) -> None:
    """The next get() to that place would follow the link; who opens the FIFO would wait."""
    target = tmp_path / "log"
    if into == "over a file":
        target.write_text("of before")
    sent = link(b"", b"/etc/passwd") if kind == "link" else head(tree.FIFO)
    for choice in ("data", "all"):
        with pytest.raises(AgentError, match="in place of a file"):
            get(
                Hostile(sent + LAST), "/log", f"{tmp_path}/" if into == "/" else target,
                timeout=60, filter=choice,
            )  # fmt: skip
    assert os.listdir(tmp_path) == (["log"] if into == "over a file" else [])
    assert into != "over a file" or target.read_text() == "of before"


@pytest.mark.parametrize(
    ("where", "target", "leaves"),
    [
        ("", b"f", False),
        ("", b"d/e", False),
        ("", b".", False),
        ("", b"./f//g", False),
        ("d", b"../f", False),
        ("d", b"..", False),
        ("d/e", b"../../f", False),
        ("", b"/etc/passwd", True),
        ("", b"..", True),
        ("", b"../f", True),
        ("d", b"../../f", True),
        ("d", b"../d/../../f", True),
        ("", b"d/..", True),  # d may be a link
        ("", b"./../f", True),
        ("", b"//etc", True),
    ],
)
def test_links_that_leave_the_tree_are_refused(
    where: str, target: bytes, leaves: bool, tmp_path: Path
) -> None:
    names = [name.encode() for name in where.split("/") if name]
    stream = TOP + b"".join(head(tree.DIRECTORY, name) for name in names)
    stream += link(b"l", target) + UP * len(names) + UP + LAST
    made = tmp_path / "in" / where / "l"
    if leaves:
        with pytest.raises(PermissionError, match="outside what is copied; filter='all'"):
            get(Hostile(stream), "/x", tmp_path / "in", timeout=60)
        assert not made.is_symlink()
        get(Hostile(stream), "/x", tmp_path / "in", timeout=60, filter="all")
    else:
        get(Hostile(stream), "/x", tmp_path / "in", timeout=60)
    assert os.readlink(os.fsencode(made)) == target


def test_a_link_of_one_get_is_no_way_out_for_the_next(tmp_path: Path) -> None:
    """As of kubectl cp, CVE-2019-1002101; and by two links, each of which looks well."""
    victim = tmp_path / "home"
    victim.mkdir()
    for stream in (
        TOP + link(b"sub", os.fsencode(victim)) + UP + LAST,
        TOP + head(tree.DIRECTORY, b"d") + link(b"up", b"..") + UP
        + link(b"sub", b"d/up/../home") + UP + LAST,
    ):  # fmt: skip
        with pytest.raises(PermissionError):
            get(Hostile(stream), "/out", tmp_path / "out", timeout=60)
        with pytest.raises(OSError):
            os.lstat(tmp_path / "out" / "sub")
        assert not os.listdir(victim)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_text("of before")
    whole = file(b"", b"new")
    for size in range(len(whole)):
        with pytest.raises(AgentError):
            get(Hostile(whole[:size]), "/f", target, timeout=60)
        assert os.listdir(tmp_path) == ["f"]
        assert target.read_text() == "of before"
    get(Hostile(file(b"", b"new") + LAST), "/f", target, timeout=60)
    assert target.read_text() == "new"
    # The caller's own link, pipe and device are written through.
    (tmp_path / "l").symlink_to("f")
    get(Hostile(file(b"", b"by the link") + LAST), "/f", tmp_path / "l", timeout=60)
    assert (tmp_path / "l").is_symlink()
    assert target.read_text() == "by the link"
    get(Hostile(file(b"", b"x") + LAST), "/f", "/dev/null", timeout=60)
    os.mkfifo(tmp_path / "p")
    with pytest.raises(OSError, match="No such device or address"):  # nobody reads it: no waiting
        get(Hostile(file(b"", b"x") + LAST), "/f", tmp_path / "p", timeout=60)
    reader = os.open(tmp_path / "p", os.O_RDONLY | os.O_NONBLOCK)
    get(Hostile(file(b"", b"through") + LAST), "/f", tmp_path / "p", timeout=60)
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    with pytest.raises(IsADirectoryError):
        (tmp_path / "d").mkdir()
        get(Hostile(file(b"", b"x") + LAST), "/f", tmp_path / "d", timeout=60)
    assert sorted(os.listdir(tmp_path)) == ["d", "f", "l", "p"]


def test_how_much_and_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AgentError, match="more than 3 bytes; max_bytes="):
        get(Hostile(file(b"") + LAST), "/f", tmp_path / "f", timeout=60, max_bytes=3)
    with pytest.raises(AgentError, match="more than 7 bytes"):
        get(
            Hostile(TOP + file(b"a") + file(b"b") + UP + LAST), "/d", tmp_path / "d", timeout=60,
            max_bytes=7,
        )  # fmt: skip
    with pytest.raises(AgentError, match="more than 3 bytes"):
        get(Hostile(file(b"") + LAST), "/f", io.BytesIO(), timeout=60, max_bytes=3)
    monkeypatch.setattr(tree, "ENTRIES_MAX", 5)
    with pytest.raises(AgentError, match="more than 5 entries"):
        get(Hostile(TOP + file(b"a") * 9 + UP + LAST), "/d", tmp_path / "d", timeout=60)
    with pytest.raises(ValueError, match="filter='tar' is not one of data, all"):
        get(Hostile(LAST), "/d", tmp_path / "d", filter="tar")


def test_set_user_id_stays_in_the_guest(tmp_path: Path) -> None:
    stream = TOP + file(b"su", mode=0o6755) + UP + LAST
    get(Hostile(stream), "/x", tmp_path / "here", timeout=60)
    assert (tmp_path / "here" / "su").stat().st_mode & 0o7777 == 0o755


def test_nobody_else_may_write_what_a_guest_sends(tmp_path: Path) -> None:
    """Neither a file by itself, nor those in a tree, nor its directories: a guest could else have
    another user of this host change what the caller takes for its own."""
    top = head(tree.DIRECTORY, mode=0o1777)
    below = head(tree.DIRECTORY, b"d", mode=0o777) + file(b"f", mode=0o666) + UP
    stream = top + below + UP + LAST
    for kinds, want in (("data", (0o755, 0o755, 0o644)), ("all", (0o1777, 0o777, 0o666))):
        here = tmp_path / kinds
        get(Hostile(stream), "/x", here, timeout=60, filter=kinds)
        modes = tuple(
            stat.S_IMODE(path.stat().st_mode) for path in (here, here / "d", here / "d/f")
        )
        assert modes == want
    get(Hostile(file(b"", mode=0o777) + LAST), "/x", tmp_path / "one", timeout=60)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o755


@pytest.mark.parametrize("seconds", [(1 << 40) - 1, 1 - (1 << 40), 0, -1])
def test_times_can_be_told(seconds: int, tmp_path: Path) -> None:
    """A program that shows when a file was changed does not fail over a guest's."""
    stream = head(tree.DIRECTORY, seconds=seconds) + head(tree.REGULAR, b"f", seconds=seconds)
    get(Hostile(stream + bytes(4) + UP + LAST), "/x", tmp_path / "t", timeout=60)
    for path in (tmp_path / "t", tmp_path / "t" / "f"):
        told = datetime.datetime.fromtimestamp(path.stat().st_mtime)
        if abs(seconds) < 2:
            assert told.timestamp() == seconds


def test_random_streams(tmp_path: Path) -> None:
    """Pieces of good streams, put together and broken at random: an error, and nothing outside."""
    chance = random.Random(4)
    good = [
        TOP, UP, LAST, file(b"f"), file(b"g", b""), head(tree.DIRECTORY, b"d"), link(b"l", b".."),
        head(tree.FIFO, b"p"),
    ]  # fmt: skip
    fine = 0
    for number in range(1000):
        stream = bytearray(TOP + b"".join(chance.choices(good, k=chance.randrange(12))))
        stream += UP + LAST if chance.random() < 0.5 else b""
        for _ in range(chance.choice((0, 0, 1, 3))):
            stream[chance.randrange(len(stream))] ^= 1 << chance.randrange(8)
        parts = [bytes(stream)]

        def read(size: int, parts: list[bytes] = parts) -> bytes:
            data, parts[0] = parts[0][:size], parts[0][size:]
            if len(data) < size:
                raise AgentError("ends in the middle")
            return data

        try:
            tree.Unpacker(read, str(tmp_path / "in" / str(number % 7))).unpack()
            fine += 1
        except (AgentError, OSError):
            pass
        finally:
            (tmp_path / "in").mkdir(exist_ok=True)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert fine > 10


# --- what a caller may give -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n" * 255, "\u00e9" * 127 + "x", "\u20ac" * 85])
def test_names_of_255_bytes_come_and_go(agent: HostAgent, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"long")
    (tmp_path / "out").mkdir()
    put(agent, tmp_path / name, f"{tmp_path}/in/")
    get(agent, str(tmp_path / "in" / name), tmp_path / "out" / name)
    assert (tmp_path / "out" / name).read_bytes() == b"long"
    assert os.listdir(tmp_path / "out") == [name]


def test_a_pipe_without_a_writer_does_not_outlast_the_timeout(
    agent: HostAgent, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(TimeoutError):
        put(agent, tmp_path / "fifo", str(tmp_path / "target"), timeout=0.3)
    assert not (tmp_path / "target").exists() or not (tmp_path / "target").stat().st_size


def test_a_pipe_nobody_empties_does_not_outlast_the_timeout(
    agent: HostAgent, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(TimeoutError):
            get(agent, "/dev/zero", tmp_path / "fifo", timeout=0.3)
    finally:
        os.close(reader)


def test_a_pipe_is_read_to_its_end_and_written_whole(agent: HostAgent, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(500_000)  # more than a pipe holds
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=(data,))
    writer.start()
    put(agent, tmp_path / "fifo", str(tmp_path / "target"), timeout=30)
    writer.join()
    assert (tmp_path / "target").read_bytes() == data

    read = []
    end = os.open(tmp_path / "fifo", os.O_RDWR)  # both ends: it has a reader, and no end too early

    def collect() -> None:
        with open(end, "rb") as file:
            read.append(file.read(len(data)))

    reader = threading.Thread(target=collect)
    reader.start()
    get(agent, str(tmp_path / "target"), tmp_path / "fifo", timeout=30)
    reader.join()
    assert read == [data]


def test_a_path_in_the_guest_is_any_kind_of_path(agent: HostAgent, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    put(agent, tmp_path / "source", tmp_path / "target")
    get(agent, os.fspath(tmp_path / "target") + "/", tmp_path / "back")  # as a shell completes it
    get(agent, tmp_path / "target" / "file", tmp_path / "file")
    assert (tmp_path / "back" / "file").read_text() == (tmp_path / "file").read_text() == "x"


def test_a_mode_that_is_given_is_the_files(agent: HostAgent, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\n")
    os.utime(tmp_path / "script", ns=(1, 123_456_789_012_345_678))
    put(agent, tmp_path / "script", str(tmp_path / "target"), mode=0o755)
    status = (tmp_path / "target").stat()
    assert stat.S_IMODE(status.st_mode) == 0o755
    assert status.st_mtime_ns == 123_456_789_012_345_678
    with pytest.raises(ValueError, match="is a directory"):
        put(agent, tmp_path, str(tmp_path / "tree"), mode=0o755)


@pytest.mark.parametrize(
    ("source", "target", "mode", "kind", "said"),
    [
        (None, "/x", None, TypeError, "source=None is not a path"),
        (b"data", "/x", None, TypeError, "give io.BytesIO"),
        (io.StringIO("text"), "/x", None, TypeError, "open as text"),
        (io.BytesIO(b""), None, None, TypeError, "target=None is not a path in the guest"),
        (io.BytesIO(b""), "/dir/", None, ValueError, "say what it is called"),
        (io.BytesIO(b""), "relative", None, ValueError, "begins with /"),
        (io.BytesIO(b""), "/x", -1, ValueError, "mode=-1"),
        (io.BytesIO(b""), "/x", "644", ValueError, "mode='644'"),
        (io.BytesIO(b""), "/x", 0o100644, ValueError, "mode=33188"),
    ],
)
def test_put_says_what_it_cannot_take(
    agent: HostAgent, source: Any, target: Any, mode: Any, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        put(agent, source, target, mode=mode)


def test_get_says_what_it_cannot_take(agent: HostAgent, tmp_path: Path) -> None:
    odd: Any
    for source, odd, kind, said in (
        ("/", tmp_path / "x", ValueError, "the guest's root"),
        (5, tmp_path / "x", TypeError, "source=5 is not a path in the guest"),
        ("/etc/passwd", None, TypeError, "target=None is not a path"),
        ("/etc/passwd", io.StringIO(), TypeError, "open as text"),
        ("/etc/passwd", "", FileNotFoundError, "No such file"),
    ):
        with pytest.raises(kind, match=said):
            get(agent, source, odd)  # type: ignore[arg-type]


def test_an_error_here_names_the_target(agent: HostAgent, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        get(agent, str(tmp_path / "file"), tmp_path / "directory")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "directory"), None)
    assert os.listdir(tmp_path / "directory") == []
