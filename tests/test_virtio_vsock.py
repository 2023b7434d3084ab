"""vmm/virtio/vsock*.py: streams both ways, credit, ends, and guests that break the rules."""

from __future__ import annotations

import os
import random
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.vsock_guest import CID, Guest
from vmm.errors import UsageError
from vmm.virtio import mmio, spec, unix, vsock_host, vsock_stream
from vmm.virtio import vsock_packet as vp
from vmm.virtio.vsock import REPLIES_MAX, TX, Vsock
from vmm.virtio.vsock_host import VsockHost, connect_port
from vmm.virtio.vsock_stream import BUF_ALLOC

MODES = [(packed, event_idx) for packed in (False, True) for event_idx in (False, True)]
PORT = 1234


@pytest.fixture(params=MODES, ids=["split", "split-event", "packed", "packed-event"])
def guest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guest]:
    packed, event_idx = request.param
    with Guest(str(tmp_path / "v"), packed=packed, event_idx=event_idx) as made:
        yield made


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Guest]:
    with Guest(str(tmp_path / "v")) as made:
        yield made


def client(guest: Guest, line: bytes = b"CONNECT 1234\n") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(guest.device.host.path)
    sock.sendall(line)
    return sock


def answer(sock: socket.socket) -> bytes:
    got = b""
    while not got.endswith(b"\n"):
        part = sock.recv(1)
        if not part:
            break
        got += part
    return got


def dialled(guest: Guest) -> tuple[socket.socket, int]:
    """A host's program connected to the guest's port: (its socket, the host's port)."""
    sock = client(guest)
    request = guest.expect(vp.OP_REQUEST)
    assert request[:4] == (vp.CID_HOST, CID, request.src_port, PORT)
    assert request.kind == vp.TYPE_STREAM
    guest.send(vp.OP_RESPONSE, PORT, request.src_port)
    assert answer(sock) == b"OK %d\n" % request.src_port
    return sock, request.src_port


def listener(guest: Guest, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.bind(f"{guest.device.host.path}_{port}")
    sock.listen(8)
    return sock


def reached(guest: Guest, port: int = 77) -> socket.socket:
    """A guest's program (port PORT) connected to the host's `port`: the host's socket."""
    with listener(guest, port) as sock:
        guest.send(vp.OP_REQUEST, PORT, port)
        guest.expect(vp.OP_RESPONSE)
        got = sock.accept()[0]
    got.settimeout(10)
    return got


def gone(sock: socket.socket) -> bool:
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True


def test_host_to_guest_and_back(guest: Guest) -> None:
    sock, port = dialled(guest)
    sock.sendall(b"hello")
    packet = guest.expect(vp.OP_RW)
    assert (packet.data, packet.src_port, packet.dst_port) == (b"hello", port, PORT)
    guest.send(vp.OP_RW, PORT, port, b"good day")
    assert sock.recv(100) == b"good day"
    guest.send(vp.OP_SHUTDOWN, PORT, port, flags=vp.SHUTDOWN_BOTH)
    assert guest.expect(vp.OP_RST).dst_port == PORT
    assert gone(sock)
    assert guest.device.streams == {}


def test_guest_to_host_and_back(guest: Guest) -> None:
    sock = reached(guest)
    guest.send(vp.OP_RW, PORT, 77, b"question", one_buffer=True)
    assert sock.recv(100) == b"question"
    sock.sendall(b"answer")
    assert guest.expect(vp.OP_RW).data == b"answer"
    sock.close()
    assert guest.expect(vp.OP_SHUTDOWN).flags == vp.SHUTDOWN_BOTH
    guest.send(vp.OP_RST, PORT, 77)
    guest.send(vp.OP_RW, PORT, 77, b"?")  # nobody there: a connection it does not have
    guest.expect(vp.OP_RST)
    assert guest.device.streams == {}


@pytest.mark.parametrize("rx_chain", [(44, 4096), (4140,), (20, 24, 100, 1), (30, 400)])
def test_a_megabyte_each_way(tmp_path: Path, rx_chain: tuple[int, ...]) -> None:
    """More than any buffer, in both directions at once, whatever the guest's buffers are like."""
    chance = random.Random(5)
    down, up = chance.randbytes(1 << 20), chance.randbytes(1 << 20)
    with Guest(str(tmp_path / "v"), rx_chain=rx_chain) as guest:
        sock, port = dialled(guest)
        sock.settimeout(100)
        got_up, deadline = bytearray(), time.monotonic() + 100

        def read() -> None:
            while len(got_up) < len(up):
                got_up.extend(sock.recv(1 << 16))

        threads = [threading.Thread(target=sock.sendall, args=(down,)),
                   threading.Thread(target=read)]  # fmt: skip
        for thread in threads:
            thread.start()
        got_down, sent, host_fwd = bytearray(), 0, 0
        while len(got_down) < len(down) or sent < len(up):
            size = min(BUF_ALLOC - (sent - host_fwd), 1 << 16, len(up) - sent)
            if size:
                guest.send(vp.OP_RW, PORT, port, up[sent : sent + size])
                sent += size
            packets = guest.poll()
            if not packets and not size:
                assert time.monotonic() < deadline
                time.sleep(0.0005)  # the device's thread is to have its turn
            for packet in packets:
                assert packet.op in (vp.OP_RW, vp.OP_CREDIT_UPDATE, vp.OP_CREDIT_REQUEST)
                got_down += packet.data
                host_fwd = packet.fwd
                assert packet.alloc == BUF_ALLOC
            if (len(got_down) - guest.fwd) & 0xFFFFFFFF > 1 << 17:
                guest.fwd = len(got_down)
                guest.send(vp.OP_CREDIT_UPDATE, PORT, port)
        for thread in threads:
            thread.join(10)
        assert got_down == down
        assert got_up == up
        sock.close()


def test_the_hosts_program_waits_for_the_guests_credit(guest: Guest) -> None:
    guest.window = 10000
    sock, port = dialled(guest)
    sock.sendall(bytes(15000))
    got = 0
    while got < 10000:
        got += guest.expect(vp.OP_RW).size
    assert got == 10000
    assert guest.expect(vp.OP_CREDIT_REQUEST).dst_port == PORT
    guest.nothing()
    guest.fwd = 4000
    guest.send(vp.OP_CREDIT_UPDATE, PORT, port)
    assert guest.expect(vp.OP_RW).size == 4000
    guest.expect(vp.OP_CREDIT_REQUEST)
    guest.nothing()
    guest.fwd = 14000
    guest.send(vp.OP_RW, PORT, port, b"any packet tells")
    assert guest.expect(vp.OP_RW).size == 1000
    sock.close()


def test_a_guest_within_its_credit_is_kept_one_beyond_is_reset(guest: Guest) -> None:
    sock, port = dialled(guest)
    piece = bytes(1 << 16)
    kept = sum(len(s.out) for s in guest.device.streams.values())
    while kept < BUF_ALLOC:  # the kernel's socket takes some first; nobody reads it
        guest.send(vp.OP_RW, PORT, port, piece[: min(len(piece), BUF_ALLOC - kept)])
        guest.settle()
        kept = sum(len(s.out) for s in guest.device.streams.values())
    assert kept == BUF_ALLOC
    guest.send(vp.OP_RW, PORT, port, b"1")
    assert guest.expect(vp.OP_RST).dst_port == PORT
    assert guest.device.streams == {}
    sock.close()


def test_credit_is_told_as_the_hosts_program_reads(guest: Guest) -> None:
    sock, port = dialled(guest)
    guest.send(vp.OP_CREDIT_REQUEST, PORT, port)
    assert guest.expect(vp.OP_CREDIT_UPDATE)[8:10] == (BUF_ALLOC, 0)
    sent, told = 0, []
    while sent < 10 * BUF_ALLOC:
        guest.send(vp.OP_RW, PORT, port, bytes(1 << 15))
        sent += 1 << 15
        left = 1 << 15
        while left:
            left -= len(sock.recv(left))
        told += [packet.fwd for packet in guest.poll()]
    assert told == sorted(told)
    assert 10 * BUF_ALLOC - told[-1] < BUF_ALLOC // 2
    sock.close()


def test_halves_end_one_by_one(guest: Guest) -> None:
    sock, port = dialled(guest)
    sock.shutdown(socket.SHUT_WR)
    assert guest.expect(vp.OP_SHUTDOWN).flags == vp.SHUTDOWN_SEND
    guest.send(vp.OP_RW, PORT, port, b"still")
    assert sock.recv(10) == b"still"
    guest.send(vp.OP_SHUTDOWN, PORT, port, flags=vp.SHUTDOWN_SEND)
    assert sock.recv(10) == b""
    guest.send(vp.OP_SHUTDOWN, PORT, port, flags=vp.SHUTDOWN_RCV)
    guest.expect(vp.OP_RST)
    assert guest.device.streams == {}


def test_a_guest_that_receives_no_more(guest: Guest) -> None:
    sock, port = dialled(guest)
    guest.send(vp.OP_SHUTDOWN, PORT, port, flags=vp.SHUTDOWN_RCV)
    guest.send(vp.OP_RW, PORT, port, b"last")
    assert sock.recv(10) == b"last"
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")
    guest.nothing()
    sock.close()


def test_what_the_guest_sent_goes_out_after_it_has_gone(guest: Guest) -> None:
    sock, port = dialled(guest)
    data = random.Random(1).randbytes(BUF_ALLOC)
    for at in range(0, len(data), 1 << 16):
        guest.send(vp.OP_RW, PORT, port, data[at : at + (1 << 16)])
    guest.send(vp.OP_SHUTDOWN, PORT, port, flags=vp.SHUTDOWN_BOTH)
    guest.expect(vp.OP_RST)
    assert guest.device.streams == {}
    got = b""
    while part := sock.recv(1 << 16):
        got += part
    assert got == data


def test_a_program_that_stops_reading_is_told_to_the_guest(guest: Guest) -> None:
    sock, port = dialled(guest)
    sock.shutdown(socket.SHUT_RD)
    guest.send(vp.OP_RW, PORT, port, b"x")
    assert guest.expect(vp.OP_SHUTDOWN).flags == vp.SHUTDOWN_RCV
    sock.sendall(b"but I still write")
    assert guest.expect(vp.OP_RW).data == b"but I still write"
    sock.close()
    assert guest.expect(vp.OP_SHUTDOWN).flags == vp.SHUTDOWN_BOTH


def test_without_buffers_everything_waits(tmp_path: Path) -> None:
    with Guest(str(tmp_path / "v"), buffers=1) as guest:
        sock, port = dialled(guest)
        guest.send(vp.OP_CREDIT_REQUEST, PORT, port)
        while guest.rx:
            guest.poll(refill=False)
        sock.sendall(b"data")
        guest.send(vp.OP_CREDIT_REQUEST, PORT, port)
        guest.nothing()
        guest.give(0)
        assert guest.packet().op == vp.OP_CREDIT_UPDATE
        assert guest.packet().data == b"data"
        sock.close()


def test_a_reset_ends_all_and_the_device_works_again(guest: Guest) -> None:
    sock, _ = dialled(guest)
    other = reached(guest)
    waiting = client(guest, b"CONN")
    guest.nothing()  # it is accepted by now
    guest.driver.start()
    assert gone(sock)
    assert gone(other)
    assert gone(waiting)
    guest.rx.clear()
    guest._got.clear()
    for number in range(8):
        guest.give(number)
    sock, port = dialled(guest)
    guest.send(vp.OP_RW, PORT, port, b"again")
    assert sock.recv(10) == b"again"
    sock.close()


@pytest.mark.parametrize("line", [
    b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"GET / HTTP/1.0\r\n", b"\n",
    b"CONNECT 1 2\n", b"CONNECT -1\n", b"x" * 32, b"CONNECT " + b"0" * 40 + b"\n",
])  # fmt: skip
def test_a_client_that_says_something_else_is_closed(plain: Guest, line: bytes) -> None:
    with client(plain, line) as sock:
        assert gone(sock)
    plain.nothing()


def test_the_line_may_come_in_pieces_and_data_right_behind(plain: Guest) -> None:
    with client(plain, b"CONN") as sock:
        plain.nothing()
        sock.sendall(b"ECT 1234\nearly")
        port = plain.expect(vp.OP_REQUEST).src_port
        plain.nothing()  # not before the guest has answered
        plain.send(vp.OP_RESPONSE, PORT, port)
        assert plain.expect(vp.OP_RW).data == b"early"
        assert answer(sock) == b"OK %d\n" % port


def test_silent_clients_keep_nobody_out(plain: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many that say nothing, or half a line for ever, the first ones are closed."""
    monkeypatch.setattr(vsock_host, "CLIENTS_MAX", 16)
    silent = [client(plain, line) for line in (b"", b"CONN") * 20]
    sock, _ = dialled(plain)
    sock.close()
    assert gone(silent[0]) and gone(silent[1])
    for each in silent:
        each.close()


def test_refused_both_ways(plain: Guest) -> None:
    with client(plain) as sock:
        port = plain.expect(vp.OP_REQUEST).src_port
        plain.send(vp.OP_RST, PORT, port)
        assert gone(sock)
    plain.send(vp.OP_REQUEST, PORT, 99)
    assert plain.expect(vp.OP_RST)[:4] == (vp.CID_HOST, CID, 99, PORT)
    Path(f"{plain.device.host.path}_98").touch()
    plain.send(vp.OP_REQUEST, PORT, 98)
    plain.expect(vp.OP_RST)


def test_a_full_backlog_is_waited_for(plain: Guest) -> None:
    with listener(plain, 5) as sock:
        sock.listen(0)
        ports = range(100, 106)
        for port in ports:
            plain.send(vp.OP_REQUEST, port, 5)
        accepted = [sock.accept()[0] for _ in ports]
        assert {plain.expect(vp.OP_RESPONSE).dst_port for _ in ports} == set(ports)
        for one in accepted:
            one.close()


def test_a_backlog_that_stays_full_is_not_tried_without_an_end(
    plain: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that has hundreds of connections wait for a busy listener costs little."""
    tried: list[str] = []

    def connect(sock: socket.socket, path: str) -> None:
        tried.append(path)
        raise BlockingIOError

    monkeypatch.setattr(unix, "connect", connect)
    count = 40
    for port in range(100, 100 + count):
        plain.send(vp.OP_REQUEST, port, 5)
    for _ in range(count):
        plain.expect(vp.OP_RST)
    assert count * 5 < len(tried) <= count * 12
    assert not plain.device.streams


def test_what_all_connections_keep_is_bounded(
    plain: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener that takes connections and reads nothing: the more there are, the less each new
    one may send; who sends more is cut off."""
    monkeypatch.setattr(vsock_stream, "KEPT_MAX", 4 * BUF_ALLOC)
    allocs = []
    with listener(plain, 5) as sock:
        sock.listen(100)
        taken = []
        for port in range(100, 140):
            plain.send(vp.OP_REQUEST, port, 5)
            allocs.append(plain.expect(vp.OP_RESPONSE).alloc)
            taken.append(sock.accept()[0])
            taken[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        assert allocs[:4] == [BUF_ALLOC] * 4
        assert allocs == sorted(allocs, reverse=True) and allocs[-1] == 4 * BUF_ALLOC // 40
        assert sum(allocs) < 4 * 4 * BUF_ALLOC
        port, stream = 139, plain.device.streams[5, 139]
        piece = bytes(8 << 10)
        while len(stream.out) + len(piece) <= stream.alloc:
            plain.send(vp.OP_RW, port, 5, piece)
            plain.settle()
        assert stream in plain.device.streams.values()
        plain.send(vp.OP_RW, port, 5, piece * 2)
        assert plain.expect(vp.OP_RST).dst_port == port
        for one in taken:
            one.close()


def test_many_at_once(plain: Guest) -> None:
    socks = {}
    for number in range(50):
        sock = client(plain, b"CONNECT %d\n" % (number + 1))
        socks[number + 1] = sock
    ports = {}
    for _ in socks:
        request = plain.expect(vp.OP_REQUEST)
        ports[request.dst_port] = request.src_port
        plain.send(vp.OP_RESPONSE, request.dst_port, request.src_port)
    assert len(set(ports.values())) == 50
    for number, sock in socks.items():
        assert answer(sock) == b"OK %d\n" % ports[number]
        sock.sendall(b"to %d" % number)
        plain.send(vp.OP_RW, number, ports[number], b"from %d" % number)
    seen = {packet.dst_port: packet.data for packet in (plain.expect(vp.OP_RW) for _ in socks)}
    assert seen == {number: b"to %d" % number for number in socks}
    for number, sock in socks.items():
        assert sock.recv(100) == b"from %d" % number
        sock.close()


# --- guests that break the rules ------------------------------------------------------------------


@pytest.mark.parametrize("op", [0, vp.OP_REQUEST, vp.OP_RESPONSE, 8, 0xFFFF])
def test_an_operation_out_of_place_ends_the_stream(guest: Guest, op: int) -> None:
    sock, port = dialled(guest)
    guest.send(op, PORT, port)
    assert guest.expect(vp.OP_RST).dst_port == PORT
    assert gone(sock)
    assert guest.device.streams == {}


@pytest.mark.parametrize("op", [0, 2, 4, 5, 6, 7, 8])
def test_packets_of_no_stream_are_answered_with_rst(plain: Guest, op: int) -> None:
    plain.send(op, 5, 6)
    packet = plain.packet()
    assert packet[:4] == (vp.CID_HOST, CID, 6, 5)
    assert packet.op == vp.OP_RST


def test_an_rst_of_no_stream_is_not_answered(plain: Guest) -> None:
    plain.send(vp.OP_RST, 5, 6)
    plain.nothing()


def test_an_unknown_type_is_answered_with_rst_of_that_type(plain: Guest) -> None:
    plain.send(vp.OP_REQUEST, 5, 6, kind=9)
    assert plain.packet()[5:7] == (9, vp.OP_RST)


def test_another_cid(plain: Guest) -> None:
    plain.send(vp.OP_REQUEST, 5, 6, cids=(CID, 7))
    packet = plain.packet()
    assert packet[:2] == (7, CID)
    assert packet.op == vp.OP_RST
    plain.send(vp.OP_REQUEST, 5, 6, cids=(CID + 1, vp.CID_HOST))  # not who it says
    plain.nothing()


def test_data_before_the_answer_ends_the_stream(plain: Guest) -> None:
    with client(plain) as sock:
        port = plain.expect(vp.OP_REQUEST).src_port
        plain.send(vp.OP_RW, PORT, port, b"x")
        plain.expect(vp.OP_RST)
        assert gone(sock)


def test_data_after_the_end_ends_the_stream(plain: Guest) -> None:
    sock, port = dialled(plain)
    plain.send(vp.OP_SHUTDOWN, PORT, port, flags=vp.SHUTDOWN_SEND)
    plain.send(vp.OP_RW, PORT, port, b"x")
    plain.expect(vp.OP_RST)
    sock.close()


@pytest.mark.parametrize(("packet", "complaint"), [
    (b"short", "5 bytes is shorter than its header"),
    (bytes(43), "43 bytes is shorter than its header"),
])  # fmt: skip
def test_a_packet_without_header_asks_for_a_reset(
    plain: Guest, packet: bytes, complaint: str
) -> None:
    plain.raw(packet)
    wait_for_complaint(plain, complaint)
    assert plain.driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET


def test_a_length_beyond_the_packet_asks_for_a_reset(plain: Guest) -> None:
    sock, port = dialled(plain)
    plain.send(vp.OP_RW, PORT, port, b"abc", size=4)
    wait_for_complaint(plain, "a packet says 4 bytes and has 3")
    plain.driver.start()
    assert gone(sock)


def test_a_length_short_of_the_packet_is_what_counts(plain: Guest) -> None:
    sock, port = dialled(plain)
    plain.send(vp.OP_RW, PORT, port, b"abcdef", size=4)
    plain.send(vp.OP_RW, PORT, port, b"", size=0)
    plain.send(vp.OP_RW, PORT, port, b"gh", one_buffer=True)
    assert sock.recv(4, socket.MSG_WAITALL) == b"abcd"
    assert sock.recv(2, socket.MSG_WAITALL) == b"gh"
    sock.close()


@pytest.mark.parametrize("rx_chain", [(44,), (20, 24), (10,)])
def test_receive_buffers_without_room_ask_for_a_reset(
    tmp_path: Path, rx_chain: tuple[int, ...]
) -> None:
    with Guest(str(tmp_path / "v"), rx_chain=rx_chain) as guest:
        guest.send(vp.OP_RW, 1, 2)
        wait_for_complaint(guest, "without room for data")


def test_replies_nobody_takes_are_bounded(tmp_path: Path) -> None:
    """A guest that gives no buffers and asks for answers is not listened to for ever."""
    with Guest(str(tmp_path / "v"), buffers=0) as guest:
        sent, guest.patience = 0, 1.0
        with pytest.raises(AssertionError, match="the device takes no packets"):
            while sent < 4 * REPLIES_MAX:
                guest.send(vp.OP_RW, 5, 6)
                sent += 1
        assert sent < 2 * REPLIES_MAX
        for number in range(8):
            guest.give(number)
        for _ in range(sent):
            guest.expect(vp.OP_RST)


@pytest.mark.parametrize("alloc", [0, 1, 0xFFFFFFFF])
@pytest.mark.parametrize("fwd", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_senseless_credit_never_hurts(plain: Guest, alloc: int, fwd: int) -> None:
    sock, port = dialled(plain)
    plain.fwd = fwd
    plain.send(vp.OP_CREDIT_UPDATE, PORT, port, alloc=alloc)
    sock.sendall(bytes(10))
    plain.send(vp.OP_RW, PORT, port, b"alive", alloc=alloc)
    assert sock.recv(10) == b"alive"
    sock.close()
    assert plain.complaints == []


def wait_for_complaint(guest: Guest, text: str) -> None:
    deadline = time.monotonic() + 10
    while not any(text in line for line in guest.complaints):
        assert time.monotonic() < deadline, guest.complaints
        time.sleep(0.001)


@pytest.mark.parametrize("seed", range(4))
def test_random_packets(tmp_path: Path, seed: int) -> None:
    """Whatever comes, the device answers, or asks for a reset and works after it."""
    chance = random.Random(seed)
    with Guest(str(tmp_path / "v"), packed=bool(seed & 1)) as guest:
        for _ in range(300):
            size = chance.choice([0, 1, 43, 44, 45, 100, 5000])
            fields = [chance.choice([CID, 2, 0, 1 << 63]), chance.choice([2, CID]),
                      *(chance.choice([1, PORT, 77, 1 << 30, 0xFFFFFFFF]) for _ in range(2)),
                      chance.choice([0, max(size - 44, 0), 1 << 31]), chance.choice([1, 1, 0, 2]),
                      chance.randint(0, 9), chance.getrandbits(2), chance.getrandbits(32),
                      chance.getrandbits(32)]  # fmt: skip
            packet = (vp.HEADER.pack(*fields) + bytes(5000))[:size]
            if packet:
                guest.raw(packet, sorted(chance.sample(range(1, size), min(2, size - 1))))
            guest.poll()
            if len(guest.driver.rings[TX].chains) > 8:  # has it stopped?
                time.sleep(0.01)
            if guest.driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET:
                guest.driver.start()
                guest.rx.clear()
                for number in range(8):
                    guest.give(number)
        guest.driver.start()
        guest.rx.clear()
        guest._got.clear()
        for number in range(8):
            guest.give(number)
        sock, _ = dialled(guest)
        sock.close()


# --- state ----------------------------------------------------------------------------------------


def test_a_restored_guest_is_told_that_its_connections_are_gone(tmp_path: Path) -> None:
    with Guest(str(tmp_path / "v"), loop=False) as guest:
        memory = guest.driver.memory
        guest.driver.rings[2].add([(0x1F0000, 8, True)])
        guest.send(vp.OP_RW, 5, 6)
        assert guest.packet().op == vp.OP_RST
        guest.send(vp.OP_REQUEST, 5, 6)  # the device holds buffers of the guest's now
        assert guest.packet().op == vp.OP_RST
        state = guest.device.save()
        other = Vsock(CID + 1, VsockHost(str(tmp_path / "w")))
        other.memory = memory
        other.interrupt = guest.device.interrupt
        other.restore(state)
        other.resume()
        assert memory.read_u32(0x1F0000) == 0
        assert guest.driver.rings[2].used() != []
        assert other.read_config(0, 8) == CID + 1
        guest.driver.transport.device = other
        guest.device.close()
        guest.device = other
        for _ in range(20):  # the rings go on where they were
            guest.send(vp.OP_RW, 5, 6)
            assert guest.packet().op == vp.OP_RST


def host_port(guest: Guest) -> int:
    """The port from which the host's side calls the guest."""
    sock = guest.device.host.dial(PORT)
    packet = guest.packet()
    while packet.op != vp.OP_REQUEST:
        packet = guest.packet()
    sock.close()
    return packet.src_port


def test_no_host_port_is_used_again_after_a_restore(tmp_path: Path) -> None:
    """The guest may still have a connection from that port, and answers with a reset: the first
    commands in a restored machine were lost."""
    begins = set()
    for number in range(8):
        with Guest(str(tmp_path / f"v{number}")) as guest:
            first, second = host_port(guest), host_port(guest)
            assert second == first + 1
            assert 1 << 30 <= first <= 2 << 30
            begins.add(first)
            state = guest.device.save()
            other = Vsock(CID + 1, VsockHost(str(tmp_path / f"w{number}")))
            other.memory = guest.driver.memory
            before = other._next_port
            other.restore(state)
            begins |= {before, other._next_port}
            other.close()
    assert len(begins) == 3 * 8


# --- the host's socket ----------------------------------------------------------------------------


def test_the_socket_is_removed_at_close_and_a_stale_one_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "v")
    first = VsockHost(path)
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    with pytest.raises(UsageError, match="in use by another process") as caught:
        VsockHost(path)
    assert "\n" not in str(caught.value)
    first.close()
    first.close()
    assert not os.path.exists(path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    second = VsockHost(path)
    os.unlink(path)
    Path(path).write_text("another's")
    second.close()
    assert Path(path).read_text() == "another's"
    with pytest.raises(UsageError, match="is not a socket"):
        VsockHost(path)


@pytest.mark.parametrize("path", ["/nowhere/v", "x" * 97, ""])
def test_a_path_that_cannot_be(path: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--vsock"):
        VsockHost(path)


@pytest.mark.parametrize(("line", "port"), [
    (b"CONNECT 52\n", 52), (b"connect 52\r\n", 52), (b"CONNECT 4294967295\n", 4294967295),
    (b"CONNECT 52", None), (b"CONNECT \xb2\n", None), (b"", None),
])  # fmt: skip
def test_connect_port(line: bytes, port: int | None) -> None:
    assert connect_port(line) == port


def test_nothing_is_left(tmp_path: Path) -> None:
    fds = sorted(os.listdir("/proc/self/fd"))
    with Guest(str(tmp_path / "v")) as guest:
        sock, _ = dialled(guest)
        other = reached(guest)
        waiting = client(guest, b"CON")
    for one in (sock, other, waiting):
        assert gone(one)
        one.close()
    assert sorted(os.listdir("/proc/self/fd")) == fds
    assert [name for name in os.listdir(tmp_path) if name == "v"] == []
