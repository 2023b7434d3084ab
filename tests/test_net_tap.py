"""vmm/net/tap.py and tun.py, over real taps and bridges in a network namespace."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.net_guest import MAC, NetGuest
from vmm.errors import HostError, UsageError, VmmError
from vmm.net.config import Net
from vmm.net.tun import TapPort
from vmm.virtio import net_spec as n
from vmm.virtio import spec
from vmm.virtio.net import Nic

UDP_SEGMENT = 103
HOST, GUEST = "10.9.0.1", "10.9.0.2"
TAP = f"tap,address={HOST}/24,mac=52:54:00:00:00:05"


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun here")
    with netns.network_namespace():
        yield


def nic(text: str) -> Nic:
    found = Net.parse(f"{text},vhost=off").open(0)
    assert found is not None
    return found


def meet(guest: NetGuest) -> bytes:
    """Ask the host for its address: its MAC."""
    limit = time.monotonic() + 60
    while True:  # an interface that was there learns of its carrier some time after we have it
        guest.send(netns.arp_request(MAC, GUEST, HOST))
        try:
            reply = guest.frame(0x806, 2)
            break
        except AssertionError:
            assert time.monotonic() < limit
    assert reply[:6] == MAC and reply[28:32] == netns.address(HOST)
    return reply[6:12]


def test_a_tap_of_ours_comes_up_and_goes() -> None:
    card = nic(TAP)
    assert netns.interfaces() == ["vmm0"]
    assert f"inet {HOST}/24" in netns.ip("addr show vmm0")
    with NetGuest(card) as guest:
        meet(guest)
    assert netns.interfaces() == []


def test_datagrams_both_ways() -> None:
    with (
        NetGuest(nic(TAP)) as guest,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        server.settimeout(20)
        server.bind((HOST, 7))
        host = meet(guest)
        guest.send(
            netns.ethernet(host, MAC, 0x800, netns.ipv4(GUEST, HOST, 17, netns.udp(9, 7, b"hello")))
        )
        data, peer = server.recvfrom(100)
        assert (data, peer) == (b"hello", (GUEST, 9))
        server.sendto(b"world" * 200, peer)
        assert guest.frame(0x800)[42:] == b"world" * 200


def tcp_segment(sock: socket.socket, size: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(b"x" * size)


@pytest.mark.parametrize("offloads", [True, False])
def test_segments_are_as_large_as_the_driver_takes(offloads: bool) -> None:
    """The host's TCP sends to a guest that answers by hand."""
    without = 0 if offloads else n.GUEST_GSO
    with (
        NetGuest(nic(TAP), buffer=4096, buffers=60, without=without) as guest,
        socket.socket() as server,
    ):
        host = meet(guest)
        server.bind((HOST, 80))
        server.listen()
        server.settimeout(20)

        def send(flags: int, seq: int, ack: int) -> None:
            options = b"\x02\x04\x05\xb4\x03\x03\x07\x01" if flags & 2 else b""
            length = 20 + len(options)
            tcp = bytes((0, 99, 0, 80)) + seq.to_bytes(4, "big") + ack.to_bytes(4, "big")
            tcp += bytes((length << 2, flags, 255, 255, 0, 0, 0, 0)) + options
            pseudo = netns.address(GUEST) + netns.address(HOST) + bytes((0, 6, 0, length))
            tcp = tcp[:16] + netns.checksum(pseudo + tcp).to_bytes(2, "big") + tcp[18:]
            guest.send(netns.ethernet(host, MAC, 0x800, netns.ipv4(GUEST, HOST, 6, tcp)))

        send(2, 1000, 0)
        answer = guest.frame(0x800)
        assert answer[47] == 0x12
        ack = int.from_bytes(answer[38:42], "big") + 1
        send(16, 1001, ack)
        sock = server.accept()[0]
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            sock.sendall(bytes(300000))
            largest, seen, deadline = 0, 0, time.monotonic() + 20
            while seen < 300000:
                assert time.monotonic() < deadline
                packet = guest.receive()
                if packet[24:26] != b"\x08\x00":
                    continue
                flags, gso, _, mss, _, _, _ = n.HEADER.unpack_from(packet)
                data = len(packet) - n.HEADER_SIZE - 14 - 20 - (packet[n.HEADER_SIZE + 46] >> 2)
                start = int.from_bytes(packet[n.HEADER_SIZE + 38 : n.HEADER_SIZE + 42], "big")
                seen = max(seen, start - ack + data)
                send(16, 1001, ack + seen)
                largest = max(largest, data)
                if data > 1460:
                    assert (gso, mss) == (1, 1460) and flags & n.HDR_F_NEEDS_CSUM
            assert largest > 2 * 1460 if offloads else largest == 1460
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0)) + bytes(4))


def has_uso() -> bool:
    tap = TapPort()
    try:
        tap.attach("probe0", multi=False)
        return bool(tap.features() >> n.F_HOST_USO & 1)
    finally:
        tap.close()


def test_many_datagrams_in_one_frame_from_the_guest() -> None:
    """VIRTIO_NET_F_HOST_USO: the host's kernel cuts it into datagrams."""
    if not has_uso():
        pytest.skip("this kernel's taps know no USO (Linux 6.2)")
    with (
        NetGuest(nic(TAP)) as guest,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        assert guest.features >> n.F_HOST_USO & 1
        server.settimeout(20)
        server.bind((HOST, 7))
        host = meet(guest)
        data = b"".join(b"%03d" % number * 100 for number in range(10))
        packet = netns.udp(9, 7, data)
        pseudo = netns.address(GUEST) + netns.address(HOST) + bytes((0, 17))
        pseudo += len(packet).to_bytes(2, "big")
        partial = ~netns.checksum(pseudo) & 0xFFFF
        packet = packet[:6] + partial.to_bytes(2, "big") + packet[8:]
        frame = netns.ethernet(host, MAC, 0x800, netns.ipv4(GUEST, HOST, 17, packet))
        header = n.HEADER.pack(n.HDR_F_NEEDS_CSUM, n.HDR_GSO_UDP_L4, 42, 300, 34, 6, 0)
        guest.send(frame, header)
        assert [server.recv(2000) for _ in range(10)] == [
            data[at : at + 300] for at in range(0, 3000, 300)
        ]


@pytest.mark.parametrize("uso", [True, False])
def test_many_datagrams_in_one_frame_to_the_guest(uso: bool) -> None:
    """VIRTIO_NET_F_GUEST_USO4: they come as the host's program has sent them, at once."""
    if not has_uso():
        pytest.skip("this kernel's taps know no USO (Linux 6.2)")
    without = 0 if uso else spec.bits(n.F_GUEST_USO4)
    with (
        NetGuest(nic(TAP), buffer=4096, buffers=60, without=without) as guest,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        meet(guest)
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 300)
        data = b"".join(b"%03d" % number * 100 for number in range(10))
        sender.sendto(data, (GUEST, 9))
        packets = []
        while sum(len(packet) - n.HEADER_SIZE - 42 for packet in packets) < len(data):
            packet = guest.receive()
            if packet[24:26] == b"\x08\x00" and packet[n.HEADER_SIZE + 23] == 17:
                packets.append(packet)
        assert b"".join(packet[n.HEADER_SIZE + 42 :] for packet in packets) == data
        kinds = [n.HEADER.unpack_from(packet)[1] for packet in packets]
        assert kinds == ([n.HDR_GSO_UDP_L4] if uso else [n.HDR_GSO_NONE] * 10)


def test_any_choice_of_offloads_is_taken() -> None:
    """The kernel refuses some, as ECN without TSO; a driver may choose, and change, any."""
    with NetGuest(nic(TAP)) as guest:
        offered = [bit for bit in range(64) if guest.features & n.GUEST_OFFLOADS >> bit & 1]
        for choice in range(1 << len(offered)):
            value = sum(1 << bit for at, bit in enumerate(offered) if choice >> at & 1)
            assert guest.command(5, 0, value.to_bytes(8, "little")) == n.CTRL_OK
        meet(guest)


def test_a_large_segment_of_the_guests_reaches_the_host_whole() -> None:
    with NetGuest(nic(TAP)) as guest, socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as raw:
        raw.settimeout(20)
        host = meet(guest)
        data = bytes(range(256)) * 200
        guest.send(netns.ethernet(host, MAC, 0x800, netns.ipv4(GUEST, HOST, 253, data)))
        assert raw.recv(65536)[20:] == data


def test_headers_the_kernel_refuses_are_dropped() -> None:
    with NetGuest(nic(TAP)) as guest:
        host = meet(guest)
        frame = netns.ethernet(host, MAC, 0x800, netns.ipv4(GUEST, HOST, 253, bytes(100)))
        for header in (
            n.HEADER.pack(1, 0, 0, 0, 60000, 60000, 0),
            n.HEADER.pack(0, 1, 14, 0, 0, 0, 0),
            n.HEADER.pack(0, 77, 14, 100, 0, 0, 0),
            b"\xff" * 12,
        ):
            guest.send(frame, header)
        assert guest.nic.ports[0].dropped == 4
        meet(guest)


def test_an_interface_that_exists_is_used_untouched() -> None:
    netns.ip("tuntap add mine mode tap")
    before = netns.ip("addr show mine")
    card = nic("tap=mine")
    card.close()
    assert netns.ip("addr show mine") == before
    netns.ip(f"addr add {HOST}/24 dev mine")
    netns.ip("link set mine up")
    with NetGuest(nic("tap=mine,mac=52:54:00:00:00:05")) as guest:
        meet(guest)
        assert guest.nic.backend.peer == "tap mine"
    assert netns.interfaces() == ["mine"]
    assert f"inet {HOST}/24" in netns.ip("addr show mine")


def test_an_interface_with_many_queues() -> None:
    netns.ip("tuntap add many mode tap multi_queue")
    nic("tap=many").close()
    nic("tap=many,queues=2").close()


def test_a_bridge() -> None:
    netns.ip("link add br0 type bridge")
    netns.ip(f"addr add {HOST}/24 dev br0")
    netns.ip("link set br0 up")
    with NetGuest(nic("bridge=br0,mac=52:54:00:00:00:05")) as guest:
        assert "master br0" in netns.ip("link show vmm0")
        meet(guest)
    assert netns.interfaces() == ["br0"]


def mtu(name: str) -> int:
    words = netns.ip(f"-o link show {name}").split()
    return int(words[words.index("mtu") + 1])


@pytest.fixture
def jumbo() -> None:
    """A bridge br0 that has another user, with packets of 9000 bytes."""
    for words in (
        "link add br0 type bridge", "link add v0 mtu 9000 type veth peer name v1 mtu 9000",
        "link set v0 master br0", "link set v0 up", "link set v1 up", "link set br0 up",
    ):  # fmt: skip
        netns.ip(words)
    assert mtu("br0") == 9000


@pytest.mark.parametrize(("words", "told"), [("", 9000), (",mtu=1400", 1400), (",mtu=9000", 9000)])
def test_a_bridge_keeps_its_mtu(jumbo: None, words: str, told: int) -> None:
    """A tap of a smaller one would have the bridge take that, under all who use it."""
    with NetGuest(nic(f"bridge=br0{words}")) as guest:
        assert (mtu("br0"), mtu("vmm0")) == (9000, 9000)
        assert guest.features >> n.F_MTU & 1
        assert guest.read(0x10A, 2) == told
    assert (mtu("br0"), mtu("v0")) == (9000, 9000)
    with pytest.raises(UsageError) as raised:
        nic("bridge=br0,mtu=9001")
    assert "mtu=9001 is more than the bridge's 9000; leave it out, or have root say: ip" in str(
        raised.value
    )
    assert set(netns.interfaces()) == {"br0", "v0", "v1"}


def test_a_bridge_whose_mtu_is_to_grow() -> None:
    """The hint, done."""
    netns.ip("link add br0 type bridge")
    with pytest.raises(UsageError, match="mtu=9000 is more than the bridge's 1500") as raised:
        nic("bridge=br0,mtu=9000")
    netns.ip(str(raised.value).partition("say: ip ")[2])
    with NetGuest(nic("bridge=br0,mtu=9000")) as guest:
        assert (mtu("br0"), mtu("vmm0"), guest.read(0x10A, 2)) == (9000, 9000, 9000)


@pytest.mark.parametrize("size", [68, 1400, 1500, 9000, 65521])
def test_the_mtu_of_a_tap_that_exists_is_told(size: int) -> None:
    netns.ip("tuntap add mine mode tap")
    netns.ip(f"link set mine mtu {size}")
    less = max(size - 1, 68)
    for text, told in (("tap=mine", size), (f"tap=mine,mtu={less}", less)):
        with NetGuest(nic(text)) as guest:
            assert guest.features >> n.F_MTU & 1
            assert guest.read(0x10A, 2) == told
    if size < 65521:
        with pytest.raises(UsageError, match=f"is more than the {size} of mine; leave") as raised:
            nic(f"tap=mine,mtu={size + 1}")
        netns.ip(str(raised.value).partition("say: ip ")[2])
        nic(f"tap=mine,mtu={size + 1}").close()


@pytest.mark.parametrize("down", ["mine", "br0"])
def test_an_interface_that_is_down_is_told_of(down: str) -> None:
    """When the guest's driver is there; and the hint, done."""
    netns.ip("tuntap add mine mode tap")
    netns.ip("link add br0 type bridge")
    netns.ip(f"link set {'br0' if down == 'mine' else 'mine'} up")
    card = nic("tap=mine" if down == "mine" else "bridge=br0")
    told: list[str] = []
    card.on_error = told.append
    with NetGuest(card) as guest:
        assert told == [
            f"net0: {down} is down and no frame passes; have root say: ip link set {down} up"
        ]
        netns.ip(told[0].partition("say: ip ")[2])
        guest.start()
        assert len(told) == 1


def test_queues(capfd: pytest.CaptureFixture[str]) -> None:
    card = nic(f"{TAP},queues=2")
    with NetGuest(card) as guest:
        assert guest.features >> n.F_MQ & 1
        assert guest.read(0x108, 2) == 2
        ports = [port for port in card.ports if isinstance(port, TapPort)]
        assert [port.attached for port in ports] == [True, False]
        meet(guest)
        for pairs, ack, attached in ((2, 0, True), (3, 1, True), (0, 1, True), (1, 0, False)):
            assert guest.command(4, 0, pairs.to_bytes(2, "little"), queue=4) == ack
            assert ports[1].attached == attached
        frame = netns.arp_request(MAC, GUEST, HOST)
        guest.send(frame, queue=3)  # a queue that is off: nothing happens
        assert guest.command(4, 0, b"\2\0", queue=4) == 0
        guest.send(frame, queue=3)
        guest.start()
        assert [port.attached for port in ports] == [True, False]
        assert card.link_up
    assert netns.interfaces() == []


def test_the_interface_is_deleted_meanwhile() -> None:
    netns.ip("tuntap add mine mode tap")
    netns.ip("link set mine up")
    told: list[str] = []
    with NetGuest(nic("tap=mine")) as guest:
        guest.nic.on_error = told.append
        netns.ip("link del mine")
        deadline = time.monotonic() + 20
        while guest.config_status():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        guest.send(netns.arp_request(MAC, GUEST, HOST))
    assert told == ["net0: tap mine: the interface was deleted; the guest's link is down"]


def test_what_cannot_be() -> None:
    netns.ip("tuntap add busy mode tap")
    netns.ip("link add dull type bridge")
    netns.ip("tuntap add layer3 mode tun")
    held = nic("tap=busy")
    cases: list[tuple[str, type[VmmError], str]] = [
        ("bridge=nosuch", UsageError, "--net bridge=nosuch: no such bridge; make it: ip link add"),
        ("bridge=busy", UsageError, "--net bridge=busy: busy is no bridge"),
        ("tap=lo", UsageError, "--net tap=lo: lo exists and is no tap"),
        ("tap=dull", UsageError, "--net tap=dull: dull exists and is no tap"),
        ("tap=busy", UsageError, "--net tap=busy: busy is in use by another process"),
        ("tap=busy,queues=2", UsageError, "busy exists and is no tap with multi_queue"),
        ("tap=busy,mtu=9000", UsageError, "mtu=9000 is more than the 1500 of busy"),
        ("tap=busy,address=10.0.0.1/8", UsageError, "busy exists and is used as it is"),
        ("tap=layer3", UsageError, "layer3 exists and is no tap; have root make one: ip tuntap"),
    ]
    for text, kind, says in cases:
        with pytest.raises(kind, match=re.escape(says)):
            Net.parse(text).open(0)
    held.close()
    assert netns.interfaces() == ["busy", "dull", "layer3"]


@pytest.mark.parametrize("text", ["tap", "tap=mine", "tap=others", "bridge=br0"])
def test_without_permission(text: str) -> None:
    netns.ip("tuntap add mine mode tap user 0")
    netns.ip("tuntap add others mode tap user 1000")
    netns.ip("link add br0 type bridge")
    code = f"from vmm.net.config import Net\nNet.parse({text!r}).open(0).close()"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_admin", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if text == "tap=mine":  # its owner needs none
        assert done.returncode == 0, done.stderr
    elif text == "tap=others":
        assert "--net tap=others: others is not this user's; use --net user" in done.stderr
    else:
        assert f"--net {text}: no permission (CAP_NET_ADMIN); use --net user" in done.stderr


def test_without_pyroute2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyroute2", None)
    with pytest.raises(HostError, match=re.escape("pip install 'vmm-kvm[net]'")):
        Net.parse("tap").open(0)
    netns.ip("tuntap add mine mode tap")
    nic("tap=mine").close()


def test_a_tap_of_a_killed_process_is_gone() -> None:
    code = "import time; from vmm.net.config import Net; n = Net.parse('tap').open(0); "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "print('up', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert netns.interfaces() == ["vmm0"]
    process.kill()
    process.wait()
    process.stdout.close()
    assert netns.interfaces() == []
