"""vmm/virtio/net.py: frames both ways, any buffers, control queue, link, hostile input."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.support.net_guest import (
    MAC,
    RX_BUFFERS,
    TX_BUFFER,
    NetGuest,
    ServedNetGuest,
    random_frame,
)
from vmm.net.port import Backend, Port
from vmm.net.stream import StreamBackend
from vmm.virtio import mmio, spec
from vmm.virtio import net_spec as n
from vmm.virtio.net import Nic
from vmm.virtio.net_rx import Receiver
from vmm.virtio.net_tx import Sender

HEADER = bytes(n.HEADER_SIZE)


class Wire:
    """The other end of a card's socket."""

    def __init__(self, mtu: int = 65520) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.backend = StreamBackend(ours, mtu=mtu, peer="the test")  # type: ignore[arg-type]

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(struct.pack(">I", len(frame)) + frame for frame in frames))

    def receive(self) -> bytes:
        (size,) = struct.unpack(">I", self._exactly(4))
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            assert part, "the device closed its socket"
            data += part
        return data


class PlainPort(Port):
    """A datagram socket's end, as a tap: what the C kernel serves."""

    plain = True

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.fd = sock.detach()

    def read(self, views: list[memoryview]) -> int:
        try:
            return os.readv(self.fd, views)
        except BlockingIOError:
            return 0

    def write(self, views: Sequence[memoryview]) -> bool:
        os.writev(self.fd, views)
        return True


class PlainBackend(Backend):
    def __init__(self, sock: socket.socket, mtu: int) -> None:
        super().__init__()
        self.mtu = mtu
        self.ports.append(PlainPort(sock))

    def close(self) -> None:
        os.close(self.ports[0].fd)


class PlainWire(Wire):
    """The same by datagrams, with their headers."""

    def __init__(self, mtu: int = 65520) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
        self.sock.settimeout(20)
        self.backend = PlainBackend(ours, mtu)  # type: ignore[assignment]

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self.sock.send(HEADER + frame)

    def receive(self) -> bytes:
        return self.sock.recv(1 << 17)[n.HEADER_SIZE :]


@pytest.fixture(
    params=[(False, False, Wire), (True, True, Wire), (False, True, PlainWire)],
    ids=["split", "packed-event", "kernel"],
)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., tuple[NetGuest, Wire]]]:
    packed, event_idx, kind = request.param
    made: list[tuple[NetGuest, Wire]] = []

    def guest(mtu: int = 65520, **how: Any) -> tuple[NetGuest, Wire]:
        wire: Wire = kind(mtu)
        nic = Nic(wire.backend, mac=MAC)
        made.append((NetGuest(nic, packed=packed, event_idx=event_idx, **how), wire))
        return made[-1]

    yield guest
    for each, wire in made:
        each.__exit__()
        wire.sock.close()


def stream_only(wire: Wire) -> None:
    """For tests of what a stream's port does."""
    if isinstance(wire, PlainWire):
        pytest.skip("a stream's own")


@pytest.fixture
def pair(make: Callable[..., tuple[NetGuest, Wire]]) -> tuple[NetGuest, Wire]:
    return make()


def test_what_the_driver_reads(pair: tuple[NetGuest, Wire]) -> None:
    guest = pair[0]
    assert guest.read(mmio.DEVICE_ID) == 1
    config = bytes(guest.read(0x100 + at, 1) for at in range(12))
    assert n.CONFIG.unpack(config) == (MAC, n.S_LINK_UP, 1, 65520)


@pytest.mark.parametrize("size", [14, 60, 1514, 2047, 2048, 2049, 9014, 65534])
def test_frames_of_every_size(pair: tuple[NetGuest, Wire], size: int) -> None:
    guest, wire = pair
    guest.give(32)
    frame = random_frame(size)
    wire.send(frame)
    assert guest.receive() == HEADER[:10] + guest_buffers(size, 2048) + frame
    guest.send(frame)
    assert wire.receive() == frame


def guest_buffers(size: int, buffer: int) -> bytes:
    return struct.pack("<H", -(-(n.HEADER_SIZE + size) // buffer))


def test_one_buffer_a_frame_without_merging(make: Callable[..., tuple[NetGuest, Wire]]) -> None:
    guest, wire = make(without=spec.bits(n.F_MRG_RXBUF), buffer=4096)
    fits, too_long = random_frame(4096 - n.HEADER_SIZE), random_frame(4097 - n.HEADER_SIZE)
    wire.send(too_long, fits)
    assert guest.receive() == HEADER[:10] + b"\x01\x00" + fits
    assert guest.nic.receivers[0].dropped == 1


@pytest.mark.parametrize("cut", [1, 10, 11, 12, 20])
def test_receive_buffers_cut_anywhere(make: Callable[..., tuple[NetGuest, Wire]], cut: int) -> None:
    guest, wire = make(cut=cut)
    frames = [random_frame(size) for size in (14, 100, 5000, 20000)]
    wire.send(*frames)
    for frame in frames:
        assert guest.receive()[n.HEADER_SIZE :] == frame


@pytest.mark.parametrize("cut", [1, 12, 13, 26])
def test_sent_frames_cut_anywhere(pair: tuple[NetGuest, Wire], cut: int) -> None:
    guest, wire = pair
    data = HEADER + random_frame(1000)
    guest.memory.write(TX_BUFFER, data)
    guest.rings[1].add([(TX_BUFFER, cut, False), (TX_BUFFER + cut, len(data) - cut, False)])
    guest.kick(1)
    assert wire.receive() == data[n.HEADER_SIZE :]


def test_many_frames_both_ways_in_order(pair: tuple[NetGuest, Wire]) -> None:
    guest, wire = pair
    chance = random.Random(3)
    frames = [random_frame(chance.choice((60, 1514, 30000))) for _ in range(300)]
    for at in range(0, len(frames), 3):  # no more than a socket holds
        wire.send(*frames[at : at + 3])
        for frame in frames[at : at + 3]:
            assert guest.receive()[n.HEADER_SIZE :] == frame
    for frame in frames:
        guest.send(frame)
        assert wire.receive() == frame


def test_a_frame_waits_for_buffers(make: Callable[..., tuple[NetGuest, Wire]]) -> None:
    guest, wire = make(buffers=2)
    frame, after = random_frame(30000), random_frame(60)
    wire.send(frame, after)
    assert guest.silent()
    guest.give(20)
    assert guest.receive()[n.HEADER_SIZE :] == frame
    assert guest.receive()[n.HEADER_SIZE :] == after


@pytest.mark.parametrize("cut", [0, 100])
def test_small_and_large_frames_in_turns(
    make: Callable[..., tuple[NetGuest, Wire]], monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    guest, wire = make(buffers=60, cut=cut, size=128)
    if isinstance(wire, PlainWire):  # nothing is left for Python
        monkeypatch.setattr(Receiver, "serve", None)
        monkeypatch.setattr(Sender, "serve", None)
    chance = random.Random(cut)
    for _ in range(100):
        sizes = chance.choices((60, 1514, 2036, 2037, 9014, 40000), k=chance.randint(1, 3))
        frames = [random_frame(size) for size in sizes]
        wire.send(*frames)
        for frame in frames:
            assert guest.receive() == HEADER[:10] + guest_buffers(len(frame), 2048) + frame
            guest.send(frame)
            assert wire.receive() == frame


def test_a_frame_that_never_fits_is_dropped(make: Callable[..., tuple[NetGuest, Wire]]) -> None:
    guest, wire = make(buffers=16, size=16)
    after = random_frame(60)
    wire.send(random_frame(60000), after)
    assert guest.receive()[n.HEADER_SIZE :] == after


def test_a_peer_that_does_not_read_holds_the_driver_up(pair: tuple[NetGuest, Wire]) -> None:
    guest, wire = pair
    stream_only(wire)
    frame = random_frame(60000)
    guest.memory.write(TX_BUFFER, HEADER + frame)
    sent = 0
    for _ in range(40):  # more than all buffers between hold
        for _ in range(60 - len(guest.rings[1].chains)):  # type: ignore[attr-defined]
            guest.rings[1].add([(TX_BUFFER, n.HEADER_SIZE + len(frame), False)])
            sent += 1
        guest.kick(1)
        guest.rings[1].used()
        if guest.nic.ports[0].blocked and len(guest.rings[1].chains) >= 40:  # type: ignore[attr-defined]
            break
    else:
        pytest.fail("the device took more than any buffer holds")
    for _ in range(sent):
        assert wire.receive() == frame
    deadline = time.monotonic() + 20
    while guest.rings[1].chains:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        guest.rings[1].used()


def test_reset_while_a_write_waits(pair: tuple[NetGuest, Wire]) -> None:
    guest, wire = pair
    stream_only(wire)
    frame = random_frame(60000)
    guest.memory.write(TX_BUFFER, HEADER + frame)
    deadline = time.monotonic() + 20
    while not guest.nic.ports[0].blocked:
        assert time.monotonic() < deadline
        for _ in range(60 - len(guest.rings[1].chains)):  # type: ignore[attr-defined]
            guest.rings[1].add([(TX_BUFFER, n.HEADER_SIZE + len(frame), False)])
        guest.kick(1)
        guest.rings[1].used()
    guest.start()
    guest.memory.fill(TX_BUFFER, 0x10000)
    again = random_frame(100)
    seen = [wire.receive()]
    guest.give(4, RX_BUFFERS)
    guest.memory.write(TX_BUFFER, HEADER + again)
    guest.rings[1].add([(TX_BUFFER, n.HEADER_SIZE + len(again), False)])
    guest.kick(1)
    while seen[-1] != again:
        assert seen[-1] == frame, "bytes of a former life"
        seen.append(wire.receive())


# --- as in a machine ------------------------------------------------------------------------------


@pytest.fixture(params=[(Wire, True), (PlainWire, False), (PlainWire, True)])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[NetGuest, Wire]]:
    kind, event_idx = request.param
    wire: Wire = kind()
    nic = Nic(wire.backend, mac=MAC, name="card")
    with ServedNetGuest(nic, event_idx=event_idx, buffers=32) as guest:
        yield guest, wire
    wire.sock.close()
    assert guest.failures == []


def test_one_thread_serves_both_directions(served: tuple[NetGuest, Wire]) -> None:
    guest, wire = served
    for size in (60, 1514, 9014, 60000) * 10:
        frame = random_frame(size)
        wire.send(frame)
        guest.send(frame)
        assert wire.receive() == frame
        assert guest.frame() == frame
    threads = {each.name for each in threading.enumerate() if each.name.startswith("card-")}
    assert threads == {"card-frames0", "card-q2"}  # and one for commands


def test_a_flood_one_way_leaves_the_other_open(served: tuple[NetGuest, Wire]) -> None:
    guest, wire = served
    stream_only(wire)
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            wire.send(*[bytes(10)] * 64)  # too small for frames: they are dropped

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for _ in range(20):
            frame = random_frame(1000)
            guest.send(frame)
            assert wire.receive() == frame
    finally:
        ended.set()
        sender.join()


def test_what_waits_for_room_goes_on(served: tuple[NetGuest, Wire]) -> None:
    guest, wire = served
    stream_only(wire)
    frame, sent = random_frame(60000), 0
    guest.memory.write(TX_BUFFER, HEADER + frame)
    deadline = time.monotonic() + 20
    while not guest.nic.ports[0].blocked:
        assert time.monotonic() < deadline
        while len(guest.rings[1].chains) < 60:  # type: ignore[attr-defined]
            guest.rings[1].add([(TX_BUFFER, n.HEADER_SIZE + len(frame), False)])
            sent += 1
        guest.kick(1)
        guest.rings[1].used()
    for _ in range(sent):
        assert wire.receive() == frame


# --- the control queue ----------------------------------------------------------------------------

OTHER = bytes.fromhex("525400000006")
GROUP = bytes.fromhex("01005e000001")
ALL = b"\xff" * 6


def tables(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + b"".join(each) for each in (unicast, multicast))


@pytest.mark.parametrize(
    ("commands", "taken", "left"),
    [
        ([], [MAC, OTHER, GROUP, ALL], []),
        ([(0, 0, b"\0")], [MAC, ALL], [OTHER, GROUP]),
        ([(0, 0, b"\0"), (0, 1, b"\1")], [MAC, GROUP, ALL], [OTHER]),
        ([(0, 0, b"\0"), (0, 2, b"\1")], [MAC, OTHER, ALL], [GROUP]),
        ([(0, 0, b"\0"), (0, 5, b"\1")], [MAC], [ALL, OTHER]),
        ([(0, 0, b"\0"), (0, 4, b"\1")], [ALL], [MAC, OTHER]),
        ([(0, 0, b"\0"), (0, 1, b"\1"), (0, 3, b"\1")], [MAC, ALL], [GROUP]),
        ([(0, 0, b"\0"), (1, 0, tables([OTHER], [GROUP]))], [MAC, OTHER, GROUP], []),
        ([(0, 0, b"\0"), (1, 0, tables([], [GROUP] * 9))], [MAC, GROUP], [OTHER]),
        ([(0, 0, b"\0"), (1, 1, OTHER)], [OTHER, ALL], [MAC]),
    ],
)
def test_what_is_received(
    pair: tuple[NetGuest, Wire],
    commands: list[tuple[int, int, bytes]], taken: list[bytes], left: list[bytes],
) -> None:  # fmt: skip
    guest, wire = pair
    for command in commands:
        assert guest.command(*command) == n.CTRL_OK
    wire.send(*(random_frame(60, to) for to in left + taken))
    assert [guest.frame()[:6] for _ in taken] == taken


def test_a_table_of_many_addresses_takes_all_of_that_kind(pair: tuple[NetGuest, Wire]) -> None:
    guest, wire = pair
    many = [b"\x02" + struct.pack(">Q", at)[3:] for at in range(300)]
    assert guest.command(0, 0, b"\0") == n.CTRL_OK
    assert guest.command(1, 0, tables(many, [])) == n.CTRL_OK
    wire.send(random_frame(60, GROUP), random_frame(60, OTHER))
    assert guest.frame()[:6] == OTHER


def test_vlans(pair: tuple[NetGuest, Wire]) -> None:
    guest, wire = pair

    def tagged(vlan: int) -> bytes:
        return MAC + OTHER + b"\x81\x00" + struct.pack(">H", 0x2000 | vlan) + bytes(50)

    # In promiscuous mode, as after a reset or under a plain bridge, a card takes every VLAN.
    for vlan in (8, 7, 4095, 0):
        wire.send(tagged(vlan))
        assert guest.frame() == tagged(vlan)
    assert guest.command(0, 0, b"\0") == n.CTRL_OK
    assert guest.command(2, 0, struct.pack("<H", 7)) == n.CTRL_OK
    wire.send(tagged(8), tagged(7))
    assert guest.frame() == tagged(7)
    assert guest.command(0, 0, b"\1") == n.CTRL_OK
    wire.send(tagged(8), OTHER + tagged(9)[6:])
    assert [guest.frame() for _ in range(2)] == [tagged(8), OTHER + tagged(9)[6:]]
    assert guest.command(0, 0, b"\0") == n.CTRL_OK
    for mode in (1, 2):  # all multicast, all unicast: neither is of all VLANs
        assert guest.command(0, mode, b"\1") == n.CTRL_OK
    wire.send(tagged(8), tagged(7))
    assert guest.frame() == tagged(7)
    assert guest.command(2, 1, struct.pack("<H", 7)) == n.CTRL_OK
    wire.send(tagged(7), tagged(0), random_frame(60))
    assert guest.frame() == tagged(0)


@pytest.mark.parametrize(
    ("kind", "command", "data"),
    [
        (0, 0, b""), (0, 0, b"\0\0"), (0, 6, b"\0"), (0, 255, b"\0"),
        (1, 0, b""), (1, 0, b"\1\0\0\0"), (1, 0, b"\xff\xff\xff\xff" + bytes(60)),
        (1, 0, bytes(8) + b"x"), (1, 1, bytes(5)), (1, 1, b"\1" + bytes(5)), (1, 2, bytes(6)),
        (2, 0, b"\0"), (2, 0, b"\0\x10"), (2, 2, b"\0\0"), (3, 1, b""),
        (4, 0, b"\1\0"), (4, 1, b"\1"), (5, 0, bytes(8)), (5, 0, bytes(7)), (6, 0, b""),
        (255, 255, bytes(100)), (0, 0, bytes(200 << 10)),
    ],
)  # fmt: skip
def test_commands_that_cannot_be(
    pair: tuple[NetGuest, Wire], kind: int, command: int, data: bytes
) -> None:
    guest = pair[0]
    assert guest.command(kind, command, data) == n.CTRL_ERR
    assert guest.command(0, 0, b"\1") == n.CTRL_OK


@pytest.mark.parametrize(
    "buffers",
    [
        [(0x700000, 1, False), (0x780000, 1, True)],
        [(0x700000, 3, False)],
        [(0x780000, 8, True)],
        [(0x700000, 0x100000, False)] * 30 + [(0x780000, 1, True)],
    ],
)
def test_commands_of_no_shape(
    pair: tuple[NetGuest, Wire], buffers: list[tuple[int, int, bool]]
) -> None:
    guest = pair[0]
    guest.rings[2].add(buffers)
    guest.kick(2)
    assert len(guest.rings[2].used()) == 1
    assert guest.command(0, 0, b"\1") == n.CTRL_OK


def test_random_commands_and_headers(pair: tuple[NetGuest, Wire]) -> None:
    guest, wire = pair
    chance = random.Random(11)
    for _ in range(400):
        data = chance.randbytes(chance.choice((0, 1, 2, 6, 8, 14, 100)))
        ack = guest.command(chance.randrange(7), chance.randrange(7), data)
        assert ack in (n.CTRL_OK, n.CTRL_ERR)
        guest.send(random_frame(chance.randrange(14, 100)), chance.randbytes(n.HEADER_SIZE))
        wire.receive()
    guest.start()
    guest.give(4, RX_BUFFERS)
    frame = random_frame(60)
    wire.send(frame)
    assert guest.frame() == frame


@pytest.mark.parametrize("size", [0, 1, 11, 12, 25, 65566, 200000])
def test_frames_of_no_size_are_dropped(pair: tuple[NetGuest, Wire], size: int) -> None:
    guest, wire = pair
    if size:
        guest.rings[1].add([(TX_BUFFER, size, False)])
    else:
        guest.rings[1].add([(TX_BUFFER, 60, True)])
    guest.kick(1)
    assert len(guest.rings[1].used()) == 1
    assert guest.nic.ports[0].dropped == 1
    frame = random_frame(60)
    guest.send(frame)
    assert wire.receive() == frame


def test_a_receive_buffer_for_reading_needs_a_reset(
    make: Callable[..., tuple[NetGuest, Wire]],
) -> None:
    guest, wire = make(buffers=0)
    guest.rings[0].add([(RX_BUFFERS, 2048, False)])
    guest.kick(0)
    wire.send(random_frame(60))
    deadline = time.monotonic() + 20
    while not guest.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    guest.start()
    guest.give(4)
    frame = random_frame(60)
    wire.send(frame)
    assert frame in (guest.frame(), guest.frame())


# --- the link -------------------------------------------------------------------------------------


def test_link_down_and_up(pair: tuple[NetGuest, Wire]) -> None:
    guest, wire = pair
    guest.take_interrupts()
    guest.nic.set_link(False)
    assert guest.take_interrupts() & 2
    assert guest.config_status() == 0
    guest.send(random_frame(60))
    wire.send(random_frame(60))
    assert guest.silent()
    guest.nic.set_link(True)
    assert guest.take_interrupts() & 2
    assert guest.config_status() == n.S_LINK_UP
    frame = random_frame(61)
    guest.send(frame)
    assert wire.receive() == frame
    wire.send(frame)
    assert guest.frame() == frame


@pytest.mark.parametrize("last", [b"", struct.pack(">I", 100000) + bytes(100)])
def test_the_peer_goes(pair: tuple[NetGuest, Wire], last: bytes) -> None:
    guest, wire = pair
    stream_only(wire)
    told: list[str] = []
    guest.nic.on_error = told.append
    wire.sock.sendall(last)
    wire.sock.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + 20
    while guest.config_status() & n.S_LINK_UP:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert len(told) == 1 and told[0].startswith("net: the test: it ")
    guest.send(random_frame(60))
    guest.start()  # a driver that comes later finds the link down
    assert guest.config_status() == 0


def test_announce(pair: tuple[NetGuest, Wire]) -> None:
    guest = pair[0]
    guest.nic.announce()
    assert guest.config_status() == n.S_LINK_UP | n.S_ANNOUNCE
    assert guest.command(3, 0) == n.CTRL_OK
    assert guest.config_status() == n.S_LINK_UP


def test_save_and_restore(make: Callable[..., tuple[NetGuest, Wire]]) -> None:
    guest, wire = make()
    for command in ((0, 0, b"\0"), (1, 1, OTHER), (2, 0, b"\7\0")):
        assert guest.command(*command) == n.CTRL_OK
    state = guest.nic.save()
    frame = random_frame(60, OTHER)
    wire.send(frame)
    assert guest.frame() == frame  # it goes on after a save

    other = Wire()
    nic = Nic(other.backend, mac=MAC)
    nic.memory = guest.memory
    state = guest.nic.save()
    told: list[bool] = []
    nic.config_interrupt = lambda: told.append(True)
    nic.restore(state)
    nic.resume()
    nic.notify(0)  # as the transport does: its thread may have looked before the card went on
    assert nic.config[n.CONFIG_STATUS] & n.S_ANNOUNCE and told
    guest.nic.quiet = True
    guest.nic, guest.device, guest.transport.device = nic, nic, nic
    old = wire.backend
    other.send(random_frame(60, MAC), random_frame(60, OTHER))
    assert guest.frame()[:6] == OTHER
    guest.kick(1)
    guest.send(frame)
    assert other.receive() == frame
    assert guest.nic.save()["filter"] == state["filter"]
    old.close()
    other.sock.close()


def test_a_state_that_cannot_be(pair: tuple[NetGuest, Wire]) -> None:
    state = pair[0].nic.save()
    for key, value in (("pairs", 2), ("pairs", 0), ("filter", None), ("offloads", None)):
        with pytest.raises(ValueError, match="state of net"):
            pair[0].nic.restore({**state, key: value})


@pytest.mark.parametrize("index", [0, 1])
def test_a_queue_that_is_reset_goes_on(pair: tuple[NetGuest, Wire], index: int) -> None:
    guest, wire = pair
    frame = random_frame(100)
    for _ in range(5):
        guest.send(frame)
        assert wire.receive() == frame
        guest.write(mmio.QUEUE_SEL, index)
        guest.write(mmio.QUEUE_RESET, 1)
        assert guest.read(mmio.QUEUE_READY) == 0
        wire.send(frame)
        rings = list(guest.rings)
        guest.enable(index)
        guest.rings[:] = [*rings[:index], guest.rings[index], *rings[index + 1 :]]
        if not index:
            guest.where.clear()
            guest.given = 0
            guest.give(16)
        assert guest.frame() == frame
