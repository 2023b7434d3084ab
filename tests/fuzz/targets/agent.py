"""What a guest says: its agent's frames and trees, its console."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress

from tests.fuzz.source import Source
from tests.fuzz.target import Target, scratch
from vmm.agent import tree, wire
from vmm.console.panic import PanicWatch
from vmm.errors import AgentError
from vmm.faults.wire import on_wire
from vmm.units import parse_size
from vmm.virtio.net_spec import FRAME_MAX, HEADER_SIZE

FLAGS = (0, wire.NULL_IN, wire.NULL_OUT, wire.NULL_ERR, wire.ERR_TO_OUT, wire.TERMINAL)
BUFFERED = 3 * wire.WINDOW
"""Bytes that a session may hold: a window for each stream."""


def frames() -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        source = Source(data)
        flags, acts = source.choice(FLAGS), source.number(1)
        session = wire.Session(wire.EXECUTE, flags)
        with suppress(AgentError):
            if acts & 128:  # more than an input has bytes
                for _ in range(source.number(1)):
                    session.feed(frame(wire.DATA, wire.OUT, bytes(source.number(2))))
                    assert session.available(wire.OUT) <= wire.WINDOW
            for piece in source.pieces():
                session.feed(piece)
                for stream in (wire.OUT, wire.ERR):
                    if acts >> stream & 1:
                        session.take(stream, acts & 64)
                    if acts >> 2 + stream & 1:
                        session.drop(stream)
                if acts & 32:
                    with suppress(BrokenPipeError):
                        session.write(b"x" * acts)
                held = sum(session.available(stream) for stream in (wire.OUT, wire.ERR))
                assert held <= BUFFERED and 0 <= session.room <= wire.WINDOW
                del session.out[:]
        session.failure(["cmd"], "/", "user:group")
        with suppress(AgentError):
            wire.check_hello(data[:8].ljust(8, b"\0"))

    return run


def frame(kind: int, stream: int, data: bytes) -> bytes:
    return wire.FRAME.pack(kind, stream, 0, len(data)) + data


def frames_seeds() -> list[bytes]:
    pair = struct.Struct("<II")
    started = frame(wire.STARTED, 0, struct.pack("<I", 42))
    output = frame(wire.DATA, wire.OUT, b"hello") + frame(wire.DATA, wire.ERR, b"oops")
    ends = frame(wire.END, wire.OUT, b"") + frame(wire.END, wire.ERR, b"")
    exited = frame(wire.EXITED, 0, pair.pack(3, 0))
    credit = frame(wire.CREDIT, wire.IN, struct.pack("<I", 5)) + frame(wire.END, wire.IN, b"")
    return [
        b"\0\x3f" + started + output + credit + ends + exited,
        b"\0\x26" + started + credit + exited,
        b"\5\0" + frame(wire.FAILED, 0, pair.pack(2, 1)),
        b"\0\0" + frame(wire.DATA, wire.OUT, bytes(300)),
        b"\0\x80\x05" + b"\xff\xff" * 5,
        b"\0\x80\x10" + b"\0\x80" * 16,
    ]


def trees() -> Callable[[bytes], None]:
    """What is made stays below its directory, whatever the stream says."""
    top = scratch()
    outside = os.path.join(top, "outside")
    inside = os.path.join(top, "in")

    def run(data: bytes) -> None:
        shutil.rmtree(inside, ignore_errors=True)
        os.mkdir(inside)
        os.makedirs(outside, exist_ok=True)
        source = Source(data)
        how = source.number(1)

        def read(size: int) -> bytes:
            if source.left < size:
                raise AgentError("it ends early")
            return source.take(size)

        unpacker = tree.Unpacker(read, os.path.join(inside, "got"), 1 << 20, all_kinds=how & 1 > 0)
        with suppress(AgentError, OSError):
            unpacker.unpack()
        with suppress(AgentError, OSError), open(os.devnull, "wb") as nothing:
            source = Source(data[1:])
            unpacker.unpack_into(nothing)
        assert os.listdir(outside) == [] and sorted(os.listdir(top)) == ["in", "outside"]
        assert set(os.listdir(inside)) <= {"got"}, os.listdir(inside)
        if not how & 1:
            _check_below(os.path.join(inside, "got"))

    return run


def _check_below(directory: str) -> None:
    """No link leads out, nothing is special, nothing is set-user-ID."""
    for path, directories, files in os.walk(directory):
        for name in directories + files:
            whole = os.path.join(path, name)
            status = os.lstat(whole)
            if os.path.islink(whole):
                assert os.path.realpath(whole).startswith(directory), os.readlink(whole)
            else:
                assert status.st_mode & 0o6000 == 0, oct(status.st_mode)
                assert os.path.isfile(whole) or os.path.isdir(whole)


def trees_seeds() -> list[bytes]:
    def entry(kind: str, name: bytes = b"", size: int = 0, mode: int = 0o644) -> bytes:
        return tree.ENTRY.pack(ord(kind), 0, len(name), mode, size, 1, 2, 0) + name

    def chunks(data: bytes) -> bytes:
        return struct.pack("<I", len(data)) + data + bytes(4)

    file = entry("f", b"", 5) + chunks(b"hello")
    below = entry("f", b"a", 5) + chunks(b"hello") + entry("l", b"b", 1) + b"a"
    deep = entry("d", b"c", mode=0o755) + below + entry("u")
    wrong = [entry("f", name, 1) + chunks(b"!") for name in (b"../x", b"a/b", b"..", b"a\0")]
    climbs = entry("l", b"x", 10) + b"../outside" + entry("f", b"x", 1) + chunks(b"!")
    last = entry("e")
    return [
        b"\0" + file + last,
        b"\0" + entry("d", mode=0o755) + below + deep + entry("u") + last,
        b"\1" + entry("d", mode=0o755) + below + entry("p", b"f") + entry("u") + last,
        b"\0" + entry("d", mode=0o755) + climbs + entry("u") + last,
        b"\0" + entry("d", mode=0o755) + deep + climbs + entry("u") + last,
        *(b"\0" + entry("d", mode=0o755) + each + entry("u") + last for each in wrong),
    ]


def console() -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        watch = PanicWatch()
        half = len(data) // 2
        watch.cut(data[:half])
        watch.judge(data[half:])
        watch.judge(data)

    return run


def console_seeds() -> list[bytes]:
    return [
        b"[    1.0] x\nKernel panic - not syncing: Attempted to kill init!\n"
        b"[    1.234567] Rebooting in 1 seconds..\n",
        b"[    1.234567][   T1] Kernel panic - not syncing: VFS\n[    1.2] CPU: 0 PID: 1\n"
        b"[    1.234567] ---[ end Kernel panic - not syncing ]---\n",
        b"<0>Kernel panic - not syncing: log\nreboot: Restarting system\n",
    ]


def sizes() -> Callable[[bytes], None]:
    from vmm.errors import UsageError

    def run(data: bytes) -> None:
        with suppress(UsageError):
            assert parse_size(data.decode("utf-8", "surrogateescape"), "--memory") >= 0

    return run


def frames_on_wire() -> Callable[[bytes], None]:
    """A frame that a fault is to change: its header, then so much more as the input says."""

    def run(data: bytes) -> None:
        source = Source(data)
        more = source.number(2)
        packet = source.rest().ljust(HEADER_SIZE, b"\0") + bytes(more)
        made = on_wire(packet[: HEADER_SIZE + FRAME_MAX])
        assert made and sum(map(len, made)) < 16 << 20

    return run


def frames_on_wire_seeds() -> list[bytes]:
    ethernet = bytes(12) + b"\x08\0"
    ip4 = bytes.fromhex("4500003c00004000400600000a0000010a000002")
    tcp = bytes.fromhex("0016001600000000000000005010000000000000")
    frame = ethernet + ip4 + tcp + bytes(64)

    def header(kind: int, size: int, flags: int = 1, start: int = 34) -> bytes:
        return struct.pack("<BBHHHHH", flags, kind, 54, size, start, 16, 0)

    return [
        b"\0\x20" + header(1, 1448) + frame, b"\0\xff" + header(1, 1) + frame,
        b"\0\0" + header(0, 0) + frame, b"\0\x20" + header(5, 100) + frame,
        b"\0\x20" + header(4, 100) + frame, b"\xff\xff" + header(5, 1, start=30000) + frame,
    ]  # fmt: skip


TARGETS = (
    Target("fault-frames", frames_on_wire, frames_on_wire_seeds, ("vmm.faults.wire",)),
    Target("agent-frames", frames, frames_seeds, ("vmm.agent.wire",)),
    Target("agent-tree", trees, trees_seeds, ("vmm.agent.tree",)),
    Target("console-text", console, console_seeds, ("vmm.console.panic",)),
    Target("sizes", sizes, lambda: [b"1G", b"512M", b"0x10", b"1.5G"], ("vmm.units",)),
)
