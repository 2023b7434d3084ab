"""vmm/virtio/vhost*.py: real vhost-net and vhost-vsock, which the nested lane's kernel has."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.net_guest import MAC, NetGuest
from tests.support.virtio_driver import Driver
from tests.test_net_tap import GUEST, HOST, meet
from vmm.errors import StateError, UsageError
from vmm.net.config import Net
from vmm.virtio import mmio, spec
from vmm.virtio import net_spec as n
from vmm.virtio import vsock_packet as vp
from vmm.virtio.net import Nic
from vmm.virtio.vhost_net import VhostNic
from vmm.virtio.vhost_vsock import VhostVsock
from vmm.virtio.vsock_config import VsockConfig

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(200)]

PLAIN = f"tap,address={HOST}/24,mac=52:54:00:00:00:05"
TAP = f"{PLAIN},vhost=auto"


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    if not Path("/dev/vhost-net").exists():
        pytest.skip("no /dev/vhost-net here: modprobe vhost_net")
    with netns.network_namespace():
        yield


class VhostGuest(NetGuest):
    """The driver of a card, whoever serves it."""

    def start(self) -> None:
        if isinstance(self.device, VhostNic):
            device = self.device
            if not device.kernel.kicks:
                self.transport.on_driver_ok = lambda: device.connect(self.transport.notify_fds)
        super().start()


def card(text: str = TAP) -> Nic:
    nic = Net.parse(text).open(0)
    assert nic is not None
    return nic


def talk(guest: NetGuest, server: socket.socket, host: bytes, text: bytes) -> None:
    """A datagram to the host's program, and back."""
    udp = netns.udp(9, 7, text)
    guest.send(netns.ethernet(host, MAC, 0x800, netns.ipv4(GUEST, HOST, 17, udp)))
    data, peer = server.recvfrom(2000)
    assert data == text
    server.sendto(text[::-1] * 100, peer)
    assert guest.frame(0x800)[42:] == text[::-1] * 100


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(60)
        sock.bind(("0.0.0.0", 7))
        yield sock


@pytest.mark.parametrize("event_idx", [False, True])
def test_frames_both_ways(server: socket.socket, event_idx: bool) -> None:
    nic = card()
    assert isinstance(nic, VhostNic)
    with VhostGuest(nic, event_idx=event_idx) as guest:
        assert not guest.features >> spec.F_RING_PACKED & 1
        host = meet(guest)
        for number in range(100):  # more than the rings hold
            talk(guest, server, host, b"text %d" % number)
        assert guest.take_interrupts() & 1
        guest.start()  # reset, and again
        guest.given = 0
        guest.where.clear()
        guest.give(16)
        talk(guest, server, host, b"again")
        with pytest.raises(StateError, match="vhost-net has no rate limits; say vhost=off"):
            nic.rx_limit.change(ops=1)
    assert netns.interfaces() == []


def test_what_keeps_the_frames_here(tmp_path: Path) -> None:
    for text in (f"{PLAIN},vhost=off", f"{TAP},pcap={tmp_path}/x", f"{TAP},rx-bps=1M"):
        nic = card(text)
        assert not isinstance(nic, VhostNic)
        nic.close()


def test_the_link(server: socket.socket) -> None:
    with VhostGuest(card()) as guest:
        host = meet(guest)
        guest.nic.set_link(False)
        assert guest.config_status() == 0
        server.sendto(b"lost", (GUEST, 9))
        guest.silent(0.2)  # but for what the host's kernel sent of its own before
        assert not any(b"lost" in packet for packet in guest.packets)
        guest.packets.clear()
        guest.nic.set_link(True)
        assert guest.config_status() & n.S_LINK_UP
        talk(guest, server, host, b"up again")


def test_queue_pairs(server: socket.socket) -> None:
    with VhostGuest(card(f"{TAP},queues=2")) as guest:
        assert guest.features >> n.F_MQ & 1
        host = meet(guest)
        for pairs in (2, 1, 2):
            assert guest.command(4, 0, bytes((pairs, 0)), queue=4) == n.CTRL_OK
            guest.send(netns.arp_request(MAC, GUEST, HOST), queue=2 * pairs - 1)
            talk(guest, server, host, b"pairs") if pairs == 1 else None


def test_nothing_passes_while_it_is_held(server: socket.socket) -> None:
    with VhostGuest(card()) as guest:
        host = meet(guest)
        guest.device.hold()
        server.sendto(b"waits", (GUEST, 9))
        assert guest.silent(0.2)
        guest.device.release()
        assert guest.frame(0x800)[42:] == b"waits"
        talk(guest, server, host, b"goes on")


@pytest.mark.parametrize("other", ["auto", "off"])
def test_saved_and_restored(server: socket.socket, other: str) -> None:
    """Also into a card of our own: the kernel's position in the rings is known."""
    with VhostGuest(card()) as guest:
        host = meet(guest)
        for _ in range(30):
            talk(guest, server, host, b"before")
        guest.device.hold()
        state = guest.transport.save()
        guest.device.close()
        guest.device.release()
        nic = card(f"{PLAIN},vhost={other}")
        assert isinstance(nic, VhostNic) is (other == "auto")
        nic.memory = guest.memory
        transport = type(guest.transport)(nic)  # type: ignore[call-arg]
        if isinstance(nic, VhostNic):
            transport.on_driver_ok = lambda: nic.connect(transport.notify_fds)  # type: ignore[union-attr]
        transport.restore(state)
        guest.transport.close()
        guest.transport, guest.device, guest.nic = transport, nic, nic
        guest.memory.write(0x700000, bytes(n.HEADER_SIZE) + netns.arp_request(MAC, GUEST, HOST))
        guest.rings[1].add([(0x700000, n.HEADER_SIZE + 42, False)])
        guest.kick(1)
        assert guest.silent(0.1)
        transport.resume()
        assert guest.config_status() & n.S_ANNOUNCE
        host = guest.frame(0x806)[6:12]
        guest.poll()
        while guest.rings[1].used():
            pass
        for _ in range(30):
            talk(guest, server, host, b"after")


def test_a_broken_ring_is_told(server: socket.socket) -> None:
    with VhostGuest(card()) as guest:
        errors: list[str] = []
        guest.device.on_error = errors.append
        host = meet(guest)
        guest.rings[1].add([(1 << 40, 100, False)])
        guest.kick(1)
        limit = time.monotonic() + 60
        while not guest.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET:
            assert time.monotonic() < limit
        assert errors == [
            "net0: queue 1: the kernel finds it broken; the driver must reset the device"
        ]
        guest.start()
        guest.given = 0
        guest.where.clear()
        guest.give(16)
        talk(guest, server, host, b"again")


# --- sockets --------------------------------------------------------------------------------------

CID = 0x7654321
ANY = 0xFFFFFFFF


class SocketGuest(Driver):
    """The driver of a socket device, as far as it is needed."""

    def __init__(self, device: VhostVsock) -> None:
        self.port = 1000
        self.packets: list[tuple[int, bytes]] = []
        super().__init__(device)
        self.where = {}
        for number in range(16):
            at = 0x200000 + 0x2000 * number
            self.where[self.rings[0].add([(at, 0x1000, True)])] = at
        self.kick(0)

    def start(self) -> None:
        device = self.device
        self.transport.on_driver_ok = lambda: device.connect(self.transport.notify_fds)
        super().start()

    def send(self, op: int, to: int, data: bytes = b"") -> None:
        header = vp.HEADER.pack(
            CID, vp.CID_HOST, self.port, to, len(data), vp.TYPE_STREAM, op, 0, 1 << 18, 0
        )
        self.memory.write(0x300000, header + data)
        buffers = [(0x300000, vp.HEADER_SIZE, False)]
        if data:
            buffers.append((0x300000 + vp.HEADER_SIZE, len(data), False))
        self.rings[1].add(buffers)
        self.kick(1)
        self.wait(1)

    def wait(self, index: int) -> list[tuple[int, int]]:
        limit = time.monotonic() + 60
        while not (used := self.rings[index].used()):
            assert time.monotonic() < limit
            time.sleep(0.001)
        return used

    def packet(self) -> tuple[int, bytes]:
        """The next packet's op and data."""
        while not self.packets:
            # All places first: a buffer given again takes any free head.
            for at, size in [(self.where.pop(head), size) for head, size in self.wait(0)]:
                data = self.memory.read(at, size)
                op = vp.HEADER.unpack_from(data)[6]
                if op != vp.OP_CREDIT_UPDATE:
                    self.packets.append((op, data[vp.HEADER_SIZE :]))
                self.where[self.rings[0].add([(at, 0x1000, True)])] = at
                self.kick(0)
        return self.packets.pop(0)


@pytest.fixture
def device() -> VhostVsock:
    found = VsockConfig.parse(f"cid={CID},vhost").open()
    assert isinstance(found, VhostVsock)
    return found


def test_a_guest_connects_to_the_host(device: VhostVsock) -> None:
    with SocketGuest(device) as guest, socket.socket(socket.AF_VSOCK) as listener:
        assert guest.read(mmio.CONFIG) == CID
        listener.settimeout(60)
        listener.bind((ANY, ANY))
        listener.listen()
        port = listener.getsockname()[1]
        guest.send(vp.OP_REQUEST, port)
        sock, peer = listener.accept()
        with sock:
            assert peer == (CID, 1000)
            assert guest.packet()[0] == vp.OP_RESPONSE
            guest.send(vp.OP_RW, port, b"from the guest")
            assert sock.recv(100) == b"from the guest"
            sock.sendall(b"from the host")
            assert guest.packet() == (vp.OP_RW, b"from the host")
        state = device.save()  # it goes on
        guest.port = 1001
        guest.send(vp.OP_REQUEST, port)
        listener.accept()[0].close()
        # A restored guest is told that its connections are gone.
        guest.rings[2].add([(0x380000, 8, True)])
        guest.memory.write_u32(0x380000, 0xEE)
        device.restore(state)
        device.resume()
        guest.kick(2)
        guest.wait(2)
        assert guest.memory.read_u32(0x380000) == vp.EVENT_TRANSPORT_RESET


def test_one_cid_one_machine(device: VhostVsock) -> None:
    try:
        with pytest.raises(UsageError, match=rf"--vsock cid={CID},vhost: another machine of this"):
            VsockConfig(CID, vhost=True).open()
    finally:
        device.close()
    again = VsockConfig(CID, vhost=True).open()
    again.close()
    assert os.path.exists("/dev/vhost-vsock")
