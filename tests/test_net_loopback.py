"""vmm/net/loopback.py: a guest does not reach what listens on the host's loopback through passt."""

from __future__ import annotations

import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.net_guest import MAC, NetGuest
from vmm.net import loopback
from vmm.net.config import Net
from vmm.net.loopback import Guard
from vmm.virtio import net_spec as n

HOST, GATEWAY, OTHER = "10.7.0.2", "10.7.0.1", "10.8.0.1"
HOST6, GATEWAY6, OTHER6 = "fd00:7::2", "fd00:7::1", "fd00:8::1"
PORT = 7
LOOPBACK = [GATEWAY, "127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3"]
LOOPBACK6 = [GATEWAY6, "::1", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0", "::127.0.0.1"]
GATEWAYS = frozenset([netns.address(GATEWAY), socket.inet_pton(socket.AF_INET6, GATEWAY6)])


@pytest.fixture
def namespace() -> Iterator[None]:
    """A host with a default route, a service on its loopback, another of its addresses."""
    if shutil.which("passt") is None:
        pytest.skip("no passt here")
    with netns.network_namespace():
        prepare()
        yield


def prepare() -> None:
    netns.ip("link set lo up")
    netns.ip("tuntap add out mode tap")
    netns.ip(f"addr add {HOST}/24 dev out")
    netns.ip(f"addr add {HOST6}/64 dev out nodad")
    netns.ip("addr add fe80::2/64 dev out nodad")  # passt wants it for IPv6
    netns.ip("link set out up")
    netns.ip(f"addr add {OTHER}/32 dev lo")
    netns.ip(f"addr add {OTHER6}/128 dev lo nodad")
    netns.ip(f"route add default via {GATEWAY} dev out")
    netns.ip(f"-6 route add default via {GATEWAY6} dev out")


def udp6(to: str, data: bytes) -> bytes:
    source, target = (socket.inet_pton(socket.AF_INET6, each) for each in (HOST6, to))
    length = 8 + len(data)
    pseudo = source + target + struct.pack(">II", length, 17)
    header = struct.pack(">HHHH", 40009, PORT, length, 0)
    checked = struct.pack(">HHHH", 40009, PORT, length, netns.checksum(pseudo + header + data))
    ip = struct.pack(">IHBB", 6 << 28, length, 17, 64) + source + target
    return netns.ethernet(b"\x52\x54\0\0\0\x01", MAC, 0x86DD, ip + checked + data)


def udp4(to: str, data: bytes, port: int = PORT) -> bytes:
    packet = netns.ipv4(HOST, to, 17, netns.udp(40009, port, data))
    return netns.ethernet(b"\x52\x54\0\0\0\x01", MAC, 0x800, packet)


def frame(to: str, data: bytes) -> bytes:
    return udp6(to, data) if ":" in to else udp4(to, data)


class Service:
    """Listens on all loopback addresses, and on the other addresses of the host's."""

    def __enter__(self) -> Service:
        self.sockets = []
        for family, address in (
            (socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.9.9.9"),
            (socket.AF_INET6, "::1"), (socket.AF_INET, OTHER), (socket.AF_INET6, OTHER6),
        ):  # fmt: skip
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.bind((address, PORT))
            sock.setblocking(False)
            self.sockets.append(sock)
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.sockets:
            sock.close()

    def got(self) -> list[str]:
        """What has come, all of it; a look at the sockets, without waiting."""
        found = []
        for sock in self.sockets:
            while True:
                try:
                    found.append(sock.recv(2048).decode())
                except BlockingIOError:
                    break
        return found

    def after(self, guest: NetGuest, frames: list[bytes]) -> list[str]:
        """What has come when `frames` and then one to each other address were sent."""
        for each in [*frames, udp4(OTHER, b"last"), udp6(OTHER6, b"last")]:
            guest.send(each)
        deadline, found = time.monotonic() + 20, self.got()
        while found.count("last") < 2:
            assert time.monotonic() < deadline, found
            select.select(self.sockets, [], [], 1)
            found += self.got()
        return [each for each in found if each != "last"]


def card(text: str) -> NetGuest:
    nic = Net.parse(f"user,mac=52:54:00:00:00:05{text}").open(0)
    assert nic is not None
    return NetGuest(nic, buffers=40)


def test_the_loopback_is_not_reached(namespace: None) -> None:
    frames = [frame(to, to.encode()) for to in (*LOOPBACK, *LOOPBACK6)]
    with card("") as guest, Service() as service:
        assert service.after(guest, frames) == []
        port = guest.nic.ports[0]
        assert port.dropped == len(frames) - 2  # passt knows what the gateways are


def test_it_is_where_it_is_asked_for(namespace: None) -> None:
    with card(",host-loopback=on") as guest, Service() as service:
        assert service.after(guest, [frame(to, to.encode()) for to in (GATEWAY, GATEWAY6)]) == [
            GATEWAY, GATEWAY6,
        ]  # fmt: skip


def test_a_head_in_many_pieces(namespace: None) -> None:
    """A driver may cut a frame anywhere, and the header before it."""
    data = bytes(n.HEADER_SIZE) + udp4("127.0.0.1", b"in pieces")
    with card("") as guest, Service() as service:
        for size in (1, 5, 12, 13, 46, 65, 66):
            pieces, at = [], 0x600000
            for start in range(0, len(data), size):
                part = data[start : start + size]
                guest.memory.write(at, part)
                pieces.append((at, len(part), False))
                at += len(part) + 16
            if len(pieces) <= 60:
                guest.rings[1].add(pieces)
        guest.kick(1)
        assert service.after(guest, []) == []


def test_what_is_cut_arrives_whole(namespace: None) -> None:
    data = bytes(n.HEADER_SIZE) + udp4(OTHER, b"in pieces")
    with card("") as guest, Service() as service:
        for size in (7, 12, 13, 46, 65, 66, 67):
            pieces, at = [], 0x600000 + 4096 * size
            for start in range(0, len(data), size):
                part = data[start : start + size]
                guest.memory.write(at, part)
                pieces.append((at, len(part), False))
                at += len(part) + 16
            guest.rings[1].add(pieces)
            guest.kick(1)
        assert service.after(guest, []) == ["in pieces"] * 7


INSIDE = """
import socket
from tests.test_net_loopback import *
from vmm.net.loopback import *
prepare()
assert local_resolver() and len(gateways()) == 2, gateways()
dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
dns.bind(("127.0.0.53", 53))
dns.settimeout(20)
with card("") as guest, Service() as service:
    frames = [frame(to, to.encode()) for to in (*LOOPBACK, *LOOPBACK6)]
    print(service.after(guest, frames))
    guest.send(udp4(GATEWAY, b"a question", 53))
    print(dns.recv(2048).decode())
"""


def test_a_name_server_on_the_loopback_is_asked_and_nothing_else(tmp_path: Path) -> None:
    """systemd-resolved's address in resolv.conf: the gateway's stands for it."""
    if shutil.which("passt") is None:
        pytest.skip("no passt here")
    conf = tmp_path / "resolv.conf"
    conf.write_text("# of a stub\nnameserver 127.0.0.53\noptions edns0\n")
    script = 'mount --bind "$1" /etc/resolv.conf && exec "$2" -c "$3"'
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", script, "sh", conf, sys.executable, INSIDE],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout == "[]\na question\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("nameserver 127.0.0.53\n", True),
        ("nameserver ::1\nnameserver 127.0.0.1\n", True),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.1\n", False),
        ("#nameserver 127.0.0.1\nnameserver\t10.0.0.1\n", False),
        ("search example.org\n", False),
        ("", False),
    ],
)
def test_resolvers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, local: bool) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(text)
    monkeypatch.setattr(loopback, "RESOLV_CONF", str(path))
    assert loopback.local_resolver() is local


def test_no_resolv_conf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "RESOLV_CONF", "/nonexistent/resolv.conf")
    assert not loopback.local_resolver()


GUARDED = [
    ("DNS", udp4(GATEWAY, b"?", 53), False),
    ("another port", udp4(GATEWAY, b"?", 54), True),
    ("the loopback's own DNS", udp4("127.0.0.53", b"?", 53), True),
    ("TCP", udp4(GATEWAY, b"?", 53).replace(b"\x40\x11", b"\x40\x06", 1), True),
    ("elsewhere", udp4("192.0.2.1", b"?"), False),
    ("a neighbour in 1.0.0.0/8", udp4("1.0.0.1", b"?"), False),
    ("IPv6 elsewhere", udp6("2001:db8::1", b"?"), False),
    ("IPv6's gateway", udp6(GATEWAY6, b"?"), True),
    ("neighbour solicitation", udp6(GATEWAY6, b"?").replace(b"\x11\x40", b"\x3a\x40", 1), False),
    ("ARP", netns.arp_request(MAC, HOST, GATEWAY), False),
    ("a stub of a frame", bytes(14), False),
    ("an IPv4 frame without an address", udp4(GATEWAY, b"")[:30], False),
    ("a fragment", udp4(GATEWAY, b"?", 53)[:20] + b"\x20\0" + udp4(GATEWAY, b"?", 53)[22:], True),
    ("options before the ports",
     udp4(GATEWAY, b"?", 53)[:14] + b"\x46" + udp4(GATEWAY, b"?", 53)[15:], True),
]  # fmt: skip


@pytest.mark.parametrize(("what", "data", "refused"), GUARDED, ids=[each[0] for each in GUARDED])
def test_which_frames_pass(what: str, data: bytes, refused: bool) -> None:
    assert Guard(GATEWAYS).refuses(data[: loopback.HEAD]) is refused
    if refused and "127" not in what and "own" not in what:
        assert Guard().refuses(data[: loopback.HEAD]) is False
