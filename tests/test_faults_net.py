"""vmm.faults.net: what happens to frames, over every kind of back end, and the same from a seed."""

from __future__ import annotations

import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import netns
from tests.support.net_guest import MAC, TX_BUFFER, NetGuest
from vmm.errors import UsageError
from vmm.faults import net_layer
from vmm.faults.net import NetFaults
from vmm.faults.rules import Control, Fault
from vmm.net.config import Net
from vmm.net.lan import Lan
from vmm.net.stream import StreamBackend
from vmm.virtio import net_spec as n
from vmm.virtio.net import Nic

KIND = 0x88B5
PEER = b"\x02\0\0\0\0\x09"


def frame(number: int, size: int = 60, to: bytes = MAC, source: bytes = PEER) -> bytes:
    """One with a number in it; others' frames have another EtherType."""
    return (to + source + struct.pack(">HI", KIND, number)).ljust(size, b"\x5a")


def ours(data: bytes) -> bool:
    return data[12:14] == struct.pack(">H", KIND)


def number_of(data: bytes) -> int:
    return int(struct.unpack_from(">I", data, 14)[0])


class Stream:
    """The other end of a stream socket."""

    def __init__(self, stack: ExitStack) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.callback(self.sock.close)
        self.sock.settimeout(30)
        backend = StreamBackend(ours, mtu=65520, peer="the test")  # type: ignore[arg-type]
        self.nic = Nic(backend, mac=MAC)

    def send(self, data: bytes) -> None:
        self.sock.sendall(struct.pack(">I", len(data)) + data)

    def receive(self) -> bytes:
        (size,) = struct.unpack(">I", self._exactly(4))
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            assert part
            data += part
        return data

    def silent(self, seconds: float = 0.1) -> bool:
        self.sock.settimeout(seconds)
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(30)
        return False


class OnLan:
    """Another guest of a private LAN."""

    def __init__(self, stack: ExitStack) -> None:
        lan = Lan()
        self.guest = NetGuest(Nic(lan.connect(), mac=PEER, name="peer"), buffers=60)
        stack.callback(self.guest.__exit__)
        self.nic = Nic(lan.connect(), mac=MAC)

    def send(self, data: bytes) -> None:
        self.guest.send(data)

    def receive(self) -> bytes:
        return self.guest.frame(KIND, within=30)

    def silent(self, seconds: float = 0.1) -> bool:
        return self.guest.silent(seconds)


class OnTap:
    """The host, at the other side of a tap."""

    def __init__(self, stack: ExitStack) -> None:
        if not Path("/dev/net/tun").exists():
            pytest.skip("no /dev/net/tun here")
        stack.enter_context(netns.network_namespace())
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        nic = Net.parse("tap,address=10.9.0.1/24,mac=52:54:00:00:00:05").open(0)
        assert nic is not None
        self.nic = nic
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(KIND))
        stack.callback(self.sock.close)
        self.sock.bind(("vmm0", KIND))
        self.sock.settimeout(30)

    def send(self, data: bytes) -> None:
        self.sock.send(data)

    def receive(self) -> bytes:
        while True:
            data, where = self.sock.recvfrom(70000)
            if where[2] != socket.PACKET_OUTGOING:
                return data

    def silent(self, seconds: float = 0.1) -> bool:
        self.sock.settimeout(seconds)
        try:
            self.receive()
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(30)
        return False


class End:
    """A guest whose card has faults, and who is at the other end of its wire."""

    def __init__(self, far: Any, stack: ExitStack, **how: Any) -> None:
        self.far = far
        self.control = Control()
        self.faults = NetFaults(far.nic, self.control, "faults.net(0)")
        self.guest = NetGuest(far.nic, **{"buffers": 60, **how})
        stack.callback(self.guest.__exit__)
        stack.callback(self.control.close)

    def pass_(self, direction: str, numbers: range) -> None:
        """Send frames of these numbers in a direction."""
        for number in numbers:
            if direction == "rx":
                self.far.send(frame(number))
            else:
                self.guest.send(frame(number, to=PEER, source=MAC))

    def numbers(self, direction: str, count: int) -> list[int]:
        """Of the next frames that arrive."""
        if direction == "rx":
            return [number_of(self.guest.frame(KIND, within=30)) for _ in range(count)]
        return [number_of(self.far.receive()) for _ in range(count)]

    def silent(self, direction: str, seconds: float = 0.1) -> bool:
        return self.guest.silent(seconds) if direction == "rx" else bool(self.far.silent(seconds))

    def arrives(self, direction: str, numbers: range) -> list[int]:
        """Which of these arrive; one more, that no fault may strike, is sent to know the end."""
        self.pass_(direction, numbers)
        marker = 1 << 31
        self.pass_(direction, range(marker, marker + 1))
        found: list[int] = []
        while not found or found[-1] != marker:
            found += self.numbers(direction, 1)
        return found[:-1]


def met(fault: Fault, count: int) -> None:
    """Wait until it has struck so often."""
    limit = time.monotonic() + 30
    while fault.count < count:
        assert time.monotonic() < limit
        time.sleep(0.001)


def unmarked(data: bytes) -> bool:
    return ours(data) and number_of(data) < 1 << 31


@pytest.fixture(params=[Stream, OnLan, OnTap], ids=["stream", "lan", "tap"])
def end(request: pytest.FixtureRequest) -> Iterator[End]:
    with ExitStack() as stack:
        yield End(request.param(stack), stack)


@pytest.fixture
def stream() -> Iterator[End]:
    with ExitStack() as stack:
        yield End(Stream(stack), stack)


BOTH = pytest.mark.parametrize("direction", ["rx", "tx"])

# --- each fault -----------------------------------------------------------------------------------


@BOTH
def test_loss(end: End, direction: str) -> None:
    other = "tx" if direction == "rx" else "rx"
    fault = end.faults.loss(0.3, direction=direction, match=unmarked)
    arrived = end.arrives(direction, range(50))
    assert 10 < len(arrived) < 50
    assert fault.count == 50 - len(arrived)
    lost = [each["frame"] for each in fault.log]
    assert sorted([*arrived, *(number - 1 for number in lost)]) == list(range(50))  # type: ignore[operator]
    assert end.arrives(other, range(20)) == list(range(20))
    fault.clear()
    assert end.arrives(direction, range(20)) == list(range(20))


@BOTH
def test_the_nth_frame_is_lost(end: End, direction: str) -> None:
    with end.faults.loss(nth=(2, 4), match=ours) as fault:
        assert end.arrives(direction, range(1, 6)) == [1, 3, 5]
    assert [each["frame"] for each in fault.log] == [2, 4]
    assert {each["direction"] for each in fault.log} == {direction}


@BOTH
def test_delay(end: End, direction: str) -> None:
    begin = time.monotonic()
    with end.faults.delay(0.05, match=ours):
        end.pass_(direction, range(10))
        assert end.numbers(direction, 10) == list(range(10))  # the order stays
    assert time.monotonic() - begin >= 0.05


@BOTH
def test_what_is_delayed_comes_at_once_when_nothing_is_wrong_any_more(
    end: End, direction: str
) -> None:
    fault = end.faults.delay(100_000, direction=direction, match=ours)
    end.pass_(direction, range(5))
    met(fault, 5)
    assert end.silent(direction, 0.02)
    fault.clear()
    assert end.numbers(direction, 5) == list(range(5))
    end.pass_(direction, range(5, 8))
    assert end.numbers(direction, 3) == [5, 6, 7]


@BOTH
def test_jitter_and_reorder(end: End, direction: str) -> None:
    with end.faults.delay(0, jitter=0.2, match=ours):
        end.pass_(direction, range(20))
        numbers = end.numbers(direction, 20)
        assert sorted(numbers) == list(range(20)) != numbers
    with end.faults.reorder(nth=2, by=100_000, match=ours):
        end.pass_(direction, range(5))
        assert end.numbers(direction, 4) == [0, 2, 3, 4]
    assert end.numbers(direction, 1) == [1]


@BOTH
def test_duplicates(end: End, direction: str) -> None:
    with end.faults.duplicate(nth=2, match=ours):
        end.pass_(direction, range(3))
        assert end.numbers(direction, 4) == [0, 1, 1, 2]


@BOTH
def test_corruption(end: End, direction: str) -> None:
    sent = frame(7, 1000) if direction == "rx" else frame(7, 1000, to=PEER, source=MAC)
    found = set()
    with end.faults.corrupt(match=lambda data: len(data) == 1000):
        for _ in range(30):
            if direction == "rx":
                end.far.send(sent)
            else:
                end.guest.send(sent)
            # A frame that is hit in its addresses or its type may go elsewhere.
            end.pass_(direction, range(1))
            while True:
                got = end.guest.frame(within=30) if direction == "rx" else end.far.receive()
                if len(got) == 60:
                    break
                if len(got) == 1000:
                    [place] = [at for at in range(1000) if got[at] != sent[at]]
                    assert (got[place] ^ sent[place]).bit_count() == 1
                    found.add(place)
    assert len(found) > 5


@BOTH
def test_a_partition_of_the_link(end: End, direction: str) -> None:
    with end.faults.partition(match=ours) as fault:
        end.pass_(direction, range(3))
        met(fault, 3)
        assert end.silent(direction, 0.02)
        assert end.guest.config_status() == n.S_LINK_UP  # nobody tells the guest
    with end.faults.partition(direction, match=ours) as fault:
        end.pass_(direction, range(3, 6))
        met(fault, 3)
        other = "tx" if direction == "rx" else "rx"
        end.pass_(other, range(3))
        assert end.numbers(other, 3) == [0, 1, 2]
        assert end.silent(direction, 0.02)
    end.pass_(direction, range(6, 9))
    assert end.numbers(direction, 3) == [6, 7, 8]


def test_a_cable_that_is_pulled(end: End) -> None:
    with end.faults.unplug():
        assert end.guest.config_status() == 0
        with end.faults.unplug():
            pass
        assert end.guest.config_status() == 0
        end.pass_("tx", range(3))
        assert end.silent("tx", 0.02)
    assert end.guest.config_status() == n.S_LINK_UP
    for direction in ("rx", "tx"):
        end.pass_(direction, range(3, 6))
        assert end.numbers(direction, 3) == [3, 4, 5]


def test_faults_add_up(stream: End) -> None:
    stream.faults.duplicate(nth=2)
    stream.faults.delay(0.02)
    stream.faults.loss(nth=1)
    begin = time.monotonic()
    stream.pass_("rx", range(3))
    assert stream.numbers("rx", 3) == [1, 1, 2]
    assert time.monotonic() - begin >= 0.02


@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt here")
def test_frames_through_passt() -> None:
    """The same layer; it answers for the gateway, which is not there."""
    with ExitStack() as stack:
        stack.enter_context(netns.network_namespace())
        netns.ip("tuntap add out mode tap")
        netns.ip("addr add 10.7.0.2/24 dev out")
        netns.ip("link set out up")
        netns.ip("route add default via 10.7.0.1 dev out")
        nic = Net.parse("user").open(0)
        assert nic is not None
        guest = NetGuest(nic, buffers=60)
        stack.callback(guest.__exit__)
        control = Control()
        stack.callback(control.close)
        faults = NetFaults(nic, control, "faults.net(0)")
        ask = netns.arp_request(MAC, "10.7.0.2", "10.7.0.1")

        def arp(data: bytes) -> bool:
            return data[12:14] == b"\x08\x06"

        with faults.loss(nth=1, direction="tx", match=arp), faults.duplicate(match=arp) as twice:
            guest.send(ask)  # the first is lost, the second asked twice and each answer doubled
            guest.send(ask)
            for _ in range(4):
                assert guest.frame(0x806, within=30)[28:32] == netns.address("10.7.0.1")
        assert twice.count == 3
        guest.send(ask)
        assert guest.frame(0x806, within=30)[28:32] == netns.address("10.7.0.1")


# --- chance, and nothing in the way ---------------------------------------------------------------


def test_the_same_seed_is_the_same_again(stream: End) -> None:
    def outcome(seed: int, *, another: bool = False) -> list[object]:
        stream.control.reseed(seed)
        if another:
            stream.faults.delay(0, probability=0.5)
        lost = stream.faults.loss(0.3, match=unmarked)
        twice = stream.faults.duplicate(0.3, match=unmarked)
        damaged = stream.faults.corrupt(0.2, match=lambda data: data[14:16] == b"\x80\0")
        # In turns, however the two threads of the card take them.
        result: list[object] = [
            stream.arrives(way, range(at, at + 10)) for at in (0, 10, 20) for way in ("rx", "tx")
        ]
        for way in ("rx", "tx"):
            result += [each["frame"] for each in lost.log if each["direction"] == way]
            result += [each["frame"] for each in twice.log if each["direction"] == way]
        damaged.clear()
        stream.faults.clear()
        return result

    first = outcome(1)
    assert first == outcome(1) == outcome(1, another=True)
    assert first != outcome(2)


def test_without_faults_nothing_is_in_the_way(stream: End) -> None:
    nic = stream.guest.nic
    port = nic.ports[0]
    assert nic.receivers[0].port is port
    with stream.faults.loss(nth=100):
        assert nic.ports[0] is not port
        stream.pass_("rx", range(1))
        assert stream.numbers("rx", 1) == [0]
    assert nic.ports[0] is port
    limit = time.monotonic() + 30
    while nic.receivers[0].port is not port:  # its thread is woken to see that nothing waits
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_too_many_that_wait_are_dropped(stream: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_layer, "WAITING_MAX", 5)
    fault = stream.faults.delay(100_000)
    stream.pass_("tx", range(8))
    stream.pass_("rx", range(8))
    limit = time.monotonic() + 30
    while stream.guest.nic.ports[0].dropped < 6:
        assert time.monotonic() < limit
        time.sleep(0.001)
    fault.clear()
    assert sorted(stream.numbers("tx", 5)) == list(range(5))
    assert sorted(stream.numbers("rx", 5)) == list(range(5))


def test_a_peer_that_does_not_read_holds_late_frames_up(stream: End) -> None:
    with stream.faults.delay(0.001, direction="tx"):
        sent, big = 0, frame(0, 60000, to=PEER, source=MAC)
        stream.guest.memory.write(TX_BUFFER, bytes(n.HEADER_SIZE) + big)
        ring, port = stream.guest.rings[1], stream.guest.nic.ports[0]
        limit = time.monotonic() + 100
        waits, since = False, 0.0
        # For a moment it is blocked at times: then the socket takes the little that is left.
        while not since or time.monotonic() < since + 0.2:
            if not waits and sent < 400:  # more than any socket holds
                ring.add([(TX_BUFFER, n.HEADER_SIZE + len(big), False)])
                stream.guest.kick(1)
                sent += 1
            waits = not ring.used()
            since = (since or time.monotonic()) if port.blocked else 0.0
            assert time.monotonic() < limit
            time.sleep(0.001)
        for _ in range(sent):
            assert stream.far.receive() == big


# --- reset, close, threads ------------------------------------------------------------------------


def test_reset_while_frames_wait(stream: End) -> None:
    fault = stream.faults.delay(100_000)
    stream.pass_("tx", range(5))
    stream.pass_("rx", range(5))
    met(fault, 10)
    reset = threading.Thread(target=stream.guest.start, daemon=True)
    reset.start()
    reset.join(60)
    assert not reset.is_alive()
    stream.guest.where.clear()
    stream.guest.given = 0
    stream.guest.give(60)
    fault.clear()  # they are on the wire, and arrive
    assert stream.numbers("tx", 5) == list(range(5))
    assert stream.numbers("rx", 5) == list(range(5))


def test_close_while_frames_wait() -> None:
    with ExitStack() as stack:
        end = End(Stream(stack), stack)
        fault = end.faults.delay(0.0001, jitter=100_000)
        end.pass_("tx", range(40))
        end.pass_("rx", range(40))
        met(fault, 80)
        closing = threading.Thread(target=stack.close, daemon=True)
        closing.start()
        closing.join(60)
        assert not closing.is_alive()


def test_set_and_cleared_from_other_threads_under_load(stream: End) -> None:
    over = threading.Event()
    errors: list[BaseException] = []

    def change() -> None:
        try:
            while not over.is_set():
                with stream.faults.delay(0.001, jitter=0.001, match=unmarked):
                    with stream.faults.loss(0.3, match=unmarked):
                        time.sleep(0.001)
                    with stream.faults.duplicate(0.3), stream.faults.reorder(0.3, by=0.001):
                        time.sleep(0.001)
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=change) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for at in range(0, 200, 10):
            stream.pass_("rx", range(at, at + 10))
            stream.pass_("tx", range(at, at + 10))
            stream.guest.poll()
            while not stream.far.silent(0.001):  # or its socket is full after some hundred
                stream.far.receive()
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not errors and stream.control.faults == ()
    for direction in ("rx", "tx"):
        marker = 1 << 31
        stream.pass_(direction, range(marker, marker + 1))
        while stream.numbers(direction, 1) != [marker]:
            pass


# --- wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "arguments", "says"),
    [
        ("loss", {"probability": 2}, r"faults.net\(0\).loss: probability=2 is not from 0 to 1"),
        ("loss", {"direction": "in"}, "direction='in' is not one of rx, tx, both"),
        ("loss", {"match": 3}, "match=3 is not a function of a frame's bytes"),
        ("loss", {"nth": 0}, "nth=0 is not a count from 1"),
        ("loss", {"times": -1}, "times=-1 is not a count from 1"),
        ("delay", {"delay": -1}, "delay=-1 is not seconds"),
        ("delay", {"delay": 1, "jitter": None}, "jitter=None is not seconds"),
        ("reorder", {"by": "1"}, "by='1' is not seconds"),
        ("partition", {"direction": ""}, "direction='' is not one of"),
    ],
    ids=str,
)
def test_wrong_arguments(stream: End, call: str, arguments: dict[str, Any], says: str) -> None:
    port = stream.guest.nic.ports[0]
    with pytest.raises(UsageError, match=says):
        getattr(stream.faults, call)(**arguments)
    with pytest.raises(TypeError, match="no such keyword: sectors"):
        stream.faults.loss(sectors=1)  # type: ignore[call-arg]
    assert stream.control.faults == () and stream.guest.nic.ports[0] is port
