"""vmm/net/user.py: a passt of ours serves, forwards, and never outlives us."""

from __future__ import annotations

import os
import re
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
from vmm.errors import HostError, UsageError
from vmm.net import user
from vmm.net.config import Net
from vmm.virtio.net import Nic

HOST, GATEWAY = "10.7.0.2", "10.7.0.1"


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """A host with one interface and a default route, which is what passt looks for."""
    if shutil.which("passt") is None:
        pytest.skip("no passt here")
    with netns.network_namespace():
        netns.ip("tuntap add out mode tap")
        netns.ip(f"addr add {HOST}/24 dev out")
        netns.ip("link set out up")
        netns.ip(f"route add default via {GATEWAY} dev out")
        yield


def nic(text: str) -> Nic:
    found = Net.parse(text).open(0)
    assert found is not None
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (not a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline, f"passt ({pid}) is still there"
        time.sleep(0.01)


def gateway(guest: NetGuest) -> bytes:
    guest.send(netns.arp_request(MAC, HOST, GATEWAY))
    reply = guest.frame(0x806)
    assert reply[28:32] == netns.address(GATEWAY)
    return reply[6:12]


def dhcp() -> bytes:
    bootp = struct.pack(">BBBBIHHIIII", 1, 1, 6, 0, 0x1234, 0, 0, 0, 0, 0, 0)
    bootp += MAC + bytes(10 + 192) + bytes.fromhex("6382536335010 1ff".replace(" ", ""))
    packet = netns.ipv4("0.0.0.0", "255.255.255.255", 17, netns.udp(68, 67, bootp))
    return netns.ethernet(b"\xff" * 6, MAC, 0x800, packet)


def test_dhcp_gives_the_hosts_address() -> None:
    card = nic("user,mac=52:54:00:00:00:05")
    pid = card.backend.pid  # type: ignore[attr-defined]
    with NetGuest(card) as guest:
        assert guest.read(0x10A, 2) == user.MTU
        gateway(guest)
        guest.send(dhcp())
        offer = guest.frame(0x800)[42:]
        assert offer[0] == 2 and offer[16:20] == netns.address(HOST)
        assert alive(pid)
    assert not alive(pid)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, 0)


def test_datagrams_to_the_host_and_back() -> None:
    with (
        NetGuest(nic("user,mac=52:54:00:00:00:05,host-loopback=on"), buffers=40) as guest,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        server.settimeout(20)
        server.bind(("127.0.0.1", 7))
        mac = gateway(guest)
        data = bytes(range(256)) * 30
        packet = netns.ipv4(HOST, GATEWAY, 17, netns.udp(40009, 7, data))
        guest.send(netns.ethernet(mac, MAC, 0x800, packet))
        got, peer = server.recvfrom(65536)
        assert got == data
        server.sendto(data[::-1] * 8, peer)
        reply = guest.receive()
        assert reply[0] == 2  # checked already
        assert reply[12 + 42 :] == data[::-1] * 8


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_forwarded_ports_reach_the_guest(protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with NetGuest(nic(f"user,mac=52:54:00:00:00:05,forward={protocol}:{port}:80")) as guest:
        guest.send(netns.arp_request(MAC, HOST, GATEWAY))  # it learns the guest's MAC
        guest.frame(0x806)
        with socket.socket(socket.AF_INET, kind) as client:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            if protocol == "udp":
                client.send(b"hello")
            frame = guest.frame(0x800)
        assert frame[30:34] == netns.address(HOST)
        assert frame[36:38] == (80).to_bytes(2, "big")


def test_missing_passt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match=re.escape("install it (apt-get install passt)")):
        Net("user").open(0)


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--net user: forward: passt: .*{port}.*in use"):
            Net("user", forward=[f"tcp:{port}:80"]).open(0)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_host_without_a_network() -> None:
    netns.ip("link del out")
    with pytest.raises(HostError, match="--net user: passt: "):
        Net("user").open(0)


def test_passt_dies() -> None:
    told: list[str] = []
    card = nic("user,mac=52:54:00:00:00:05")
    pid = card.backend.pid  # type: ignore[attr-defined]
    with NetGuest(card) as guest:
        guest.nic.on_error = told.append
        os.kill(pid, 9)
        deadline = time.monotonic() + 20
        while guest.config_status():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert len(told) == 1 and told[0].startswith(f"net0: passt ({pid}): ")


@pytest.mark.parametrize("signum", [9, 15])
def test_it_ends_with_a_monitor_that_is_killed(signum: int) -> None:
    code = "import time; from vmm.net.config import Net; n = Net.parse('user').open(0); "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "print(n.backend.pid, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.send_signal(signum)
    process.wait()
    process.stdout.close()
    wait_gone(pid)
