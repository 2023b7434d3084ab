"""What helper programs and peers answer: NBD, vhost-user, passt and stream sockets, monitors."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace

from tests.fuzz.source import Source
from tests.fuzz.target import Target
from vmm.block import nbd
from vmm.block.qmp import Qmp
from vmm.errors import HostError, UsageError
from vmm.net.port import LinkLost
from vmm.net.stream import StreamPort
from vmm.snapshot import uffd
from vmm.virtio import spec
from vmm.virtio import vhost_user_wire as wire
from vmm.virtio.net_spec import FRAME_MAX, HEADER_SIZE
from vmm.virtio.queue import QueueError
from vmm.virtio.vhost_user import VhostUserDevice
from vmm.virtio.vhost_user_inflight import DESCRIPTION, Inflight
from vmm.virtio.vhost_user_wire import Connection

SENT_MAX = 128 << 10
"""Bytes of an input that a peer says: what a socket holds."""


@contextmanager
def peer(data: bytes, fds: int = 0) -> Iterator[socket.socket]:
    """A socket whose other end has said `data`, and nothing more; with descriptors at its end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(1)
        if fds:
            null = os.open(os.devnull, os.O_RDONLY)
            with suppress(OSError):
                socket.send_fds(theirs, [data[:SENT_MAX] or b"\0"], [null] * fds)
            os.close(null)
        else:
            with suppress(OSError):
                theirs.sendall(data[:SENT_MAX])
        theirs.shutdown(socket.SHUT_WR)
        yield ours


def disk() -> Callable[[bytes], None]:
    """A session, then a few requests."""

    def run(data: bytes) -> None:
        source = Source(data)
        acts = [source.number(1) for _ in range(3)]
        with peer(source.rest()) as sock, suppress(HostError):
            image = nbd.NbdImage("input", [sock])
            try:
                for act in acts:
                    _request(image, act)
            finally:
                image.close()

    return run


def _request(image: nbd.NbdImage, act: int) -> None:
    with suppress(OSError):
        if act % 5 == 0:
            image.read([memoryview(bytearray(512)), memoryview(bytearray(16))], 0)
        elif act % 5 == 1:
            image.write([memoryview(b"x" * 512)], 512)
        elif act % 5 == 2:
            image.flush()
        elif act % 5 == 3:
            image.discard(0, 4096)
        else:
            image.write_zeroes(0, 4096, unmap=True)


def disk_seeds() -> list[bytes]:
    greeting = nbd.MAGIC + nbd.OPTION_MAGIC + struct.pack(">H", 3)
    export = struct.pack(">HQH", nbd.INFO_EXPORT, 1 << 20, 0x165)
    told = struct.pack(">QIII", nbd.REPLY_MAGIC, nbd.OPT_GO, nbd.REP_INFO, len(export)) + export
    told += struct.pack(">QIII", nbd.REPLY_MAGIC, nbd.OPT_GO, nbd.REP_ACK, 0)
    good = struct.pack(">IIQ", nbd.SIMPLE_MAGIC, 0, 0)
    bad = struct.pack(">IIQ", nbd.SIMPLE_MAGIC, 28, 0)
    refused = struct.pack(">QIII", nbd.REPLY_MAGIC, nbd.OPT_GO, 0x80000006, 4) + b"none"
    return [
        b"\0\1\2" + greeting + told + good + bytes(528) + good + good,
        b"\1\3\4" + greeting + told + bad + good + good,
        b"\0\0\0" + greeting + refused,
    ]


def monitor() -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        with peer(data) as sock:
            qmp = Qmp(sock)
            for _ in range(2):
                with suppress(HostError, UsageError):
                    qmp.ask("block_resize", size=1)
            qmp.close()

    return run


def monitor_seeds() -> list[bytes]:
    lines = [
        {"QMP": {"version": {}, "capabilities": []}},
        {"return": {}},
        {"event": "X", "timestamp": {"seconds": 1}},
        {"return": {}},
        {"error": {"class": "GenericError", "desc": "no such node"}},
    ]
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return [text, text + b'{"error": []}\n', b"[" * 200 + b"\n"]


def back_end() -> Callable[[bytes], None]:
    """A vhost-user back end: a session's beginning, then its later answers."""

    def run(data: bytes) -> None:
        source = Source(data)
        how = source.number(1)
        with peer(source.rest(), fds=how & 3) as sock, suppress(HostError):
            connection = Connection(sock, "input")
            if how & 4:
                VhostUserDevice("input", connection, (256,) * (1 + (how >> 3 & 1)), config=60)
                return
            connection.ack = bool(how & 16)
            fd, description = connection.get_inflight(DESCRIPTION.pack(0, 0, 1, 256))
            os.close(fd)
            assert len(description) == DESCRIPTION.size
            connection.get_vring_base(0)
            connection.get_config(60)
            connection.set_vring(wire.SET_VRING_NUM, 0, 256)

    return run


def answer(request: int, payload: bytes) -> bytes:
    return struct.pack("<III", request, wire.VERSION | wire.REPLY, len(payload)) + payload


def back_end_seeds() -> list[bytes]:
    u64 = struct.Struct("<Q")
    offered = 1 << wire.F_PROTOCOL_FEATURES | 1 << spec.F_VERSION_1
    begin = answer(wire.GET_FEATURES, u64.pack(offered))
    begin += answer(wire.GET_PROTOCOL_FEATURES, u64.pack(0xFFFFFFFF))
    acks = answer(wire.SET_OWNER, u64.pack(0))
    config = answer(wire.GET_CONFIG, struct.pack("<III", 0, 60, 0) + bytes(60))
    later = answer(wire.GET_INFLIGHT_FD, DESCRIPTION.pack(4096, 0, 1, 256))
    later += answer(wire.GET_VRING_BASE, struct.pack("<II", 0, 7)) + config
    later += answer(wire.SET_VRING_NUM, u64.pack(0))
    return [
        b"\x04" + begin + acks + config,
        b"\x0c" + begin + acks + answer(wire.GET_QUEUE_NUM, u64.pack(2)) + config,
        b"\x01" + later,
        b"\x11" + later,
        b"\x02" + later,
    ]


def record() -> Callable[[bytes], None]:
    """A back end's record of requests under way: the description, then the memory."""

    def run(data: bytes) -> None:
        description, memory = data[:24].ljust(24, b"\0"), data[24:]
        fd = os.memfd_create("record")
        os.write(fd, memory)
        try:
            found = Inflight(fd, description)
        except HostError:
            return
        try:
            for index in range(min(found.queues, 3)):
                with suppress(QueueError):
                    assert len(found.heads(index, 5)) <= 0xFFFF
        finally:
            found.close()

    return run


def record_seeds() -> list[bytes]:
    queue = struct.pack("<QHHHH", 0, 1, 4, 1, 5)
    entries = b"".join(struct.pack("<B5xHQ", head & 1, 0, head) for head in range(4))
    memory = (queue + entries).ljust(128, b"\0") * 2
    return [DESCRIPTION.pack(256, 0, 2, 4) + memory, DESCRIPTION.pack(128, 8, 1, 4) + memory]


def stream() -> Callable[[bytes], None]:
    """Frames over a socket, into buffers of some sizes: their lengths, then how much comes."""

    def run(data: bytes) -> None:
        source = Source(data)
        size = (1 << 17, 2048, 64)[source.below(3)]
        said = b""
        while source.left and len(said) < SENT_MAX:
            length = source.integer(32)
            said += struct.pack(">I", length) + bytes(min(length, 256 * source.number(1)))
        with peer(said) as sock:
            port = StreamPort(sock)
            with suppress(LinkLost):
                while True:
                    views = [memoryview(bytearray(size)), memoryview(bytearray(1 << 17))]
                    got = port.read(views)
                    if not got:
                        break
                    assert HEADER_SIZE <= got <= HEADER_SIZE + FRAME_MAX
            port.close()

    return run


def stream_seeds() -> list[bytes]:
    def sent(*sizes: int) -> bytes:
        return b"".join(b"\xff" + struct.pack("<I", size) + b"\xff" for size in sizes)

    return [b"\0" + sent(60, 1514, 14), b"\1" + sent(0, 9000, 1), b"\2" + sent(70, FRAME_MAX + 1)]


CHECKSUM = "5" * 64
PAGES_SIZE = 4 << 20


def greeting() -> Callable[[bytes], None]:
    """What a machine asks the page handler for, with no, one or more descriptors."""
    snapshot = SimpleNamespace(path="snap", checksum=CHECKSUM, memory_size=PAGES_SIZE)

    def run(data: bytes) -> None:
        source = Source(data)
        fds = source.below(4)
        before = len(os.listdir("/proc/self/fd"))
        with peer(source.rest(), fds) as sock:
            client = uffd.Client(sock)
            try:
                regions = client._greeting(snapshot)  # type: ignore[arg-type]
            except uffd.WRONG:
                regions = []
            finally:
                client.drop()
        for address, length, offset in regions:
            assert 0 <= offset <= offset + length <= PAGES_SIZE
            assert 0 <= address <= address + length <= uffd.ADDRESS_MAX
        assert len(os.listdir("/proc/self/fd")) == before

    return run


def greeting_seeds() -> list[bytes]:
    def sent(*regions: object) -> bytes:
        return json.dumps({"regions": regions, "snapshot": CHECKSUM}).encode()

    whole = sent([0x7F00_0000_0000, PAGES_SIZE, 0])
    return [
        b"\1" + whole, b"\0" + whole, b"\2" + whole, b"\3" + whole,
        b"\1" + sent([4096, 4096, PAGES_SIZE - 4096], [8192, 4096, 4096]),
        b"\1" + sent([1, 2]), b"\1" + sent("abc"), b"\1" + sent([1e300, 0, "7"]),
    ]  # fmt: skip


TARGETS = (
    Target("nbd", disk, disk_seeds, ("vmm.block.nbd",)),
    Target("qmp", monitor, monitor_seeds, ("vmm.block.qmp",)),
    Target("vhost-user", back_end, back_end_seeds,
           ("vmm.virtio.vhost_user_wire", "vmm.virtio.vhost_user")),
    Target("inflight", record, record_seeds, ("vmm.virtio.vhost_user_inflight",)),
    Target("pages", greeting, greeting_seeds, ("vmm.snapshot.uffd",)),
    Target("stream", stream, stream_seeds, ("vmm.net.stream",)),
)  # fmt: skip
