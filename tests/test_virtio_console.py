"""vmm/virtio/console*.py: the console port, named ports, control messages, sizes."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.console.hvc import HvcLine
from vmm.devices.uart import Uart
from vmm.errors import UsageError
from vmm.virtio import mmio, spec
from vmm.virtio.console import (
    CONSOLE_PORT,
    CONTROL,
    CONTROL_RX,
    CONTROL_TX,
    DEVICE_ADD,
    DEVICE_READY,
    EMERG_WR,
    F_MULTIPORT,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    VirtioConsole,
)
from vmm.virtio.console_config import PortConfig
from vmm.virtio.console_ports import ConsolePort, FilePort, Port, SocketPort
from vmm.virtio.loop import DeviceLoop

SLOT = 0x2000


class Guest:
    """Device, loop and driver together; a context manager."""

    def __init__(self, ports: list[Port | None], *, without: int = 0, **modes: bool) -> None:
        self.device = VirtioConsole(ports)
        self.errors: list[BaseException] = []
        self.loop = DeviceLoop(self.errors.append)
        running, at = threading.Event(), self.loop.loop
        self.loop.call(lambda: (self.device.loop_running(at), running.set())[0])
        assert running.wait(10)
        self.driver = Driver(self.device, without=without, **modes)
        self.at = 0
        self.given: dict[tuple[int, int], int] = {}

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.loop.close()
        self.driver.__exit__()
        assert self.errors == []

    def place(self) -> int:
        self.at = (self.at + 1) % 128
        return BUFFERS + self.at * SLOT

    def give(self, queue: int, size: int = 256) -> None:
        """Give a buffer to a receive queue."""
        place = self.place()
        self.given[queue, self.driver.rings[queue].add([(place, size, True)])] = place
        self.driver.kick(queue)

    def take(self, queue: int) -> bytes:
        """The next buffer of a receive queue, given again."""
        ring = self.driver.rings[queue]
        used = until(ring.used)
        assert len(used) == 1
        data = self.driver.memory.read(self.given.pop((queue, used[0][0])), used[0][1])
        return data

    def put(self, queue: int, *parts: bytes) -> None:
        """Put out a chain of buffers."""
        buffers = []
        for part in parts:
            place = self.place()
            self.driver.memory.write(place, part)
            buffers.append((place, len(part), False))
        self.driver.rings[queue].add(buffers)
        self.driver.kick(queue)

    def control(self, port: int, event: int, value: int = 1) -> None:
        self.put(CONTROL_TX, CONTROL.pack(port, event, value))
        until(self.driver.rings[CONTROL_TX].used)

    def told(self) -> tuple[int, int, int, bytes]:
        """The next control message from the device."""
        self.give(CONTROL_RX)
        data = self.take(CONTROL_RX)
        return (*CONTROL.unpack_from(data), data[CONTROL.size :])


def until(function: Callable[[], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """What `function` gives once it gives something."""
    deadline = time.monotonic() + 10
    while not (got := function()):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return got


class Sink:
    """The monitor's side of the console."""

    def __init__(self) -> None:
        self.data = b""
        self.blocked = False
        self.port = ConsolePort(self.write, lambda: not self.blocked)

    def write(self, data: bytes) -> None:
        assert not self.blocked
        self.data += data


MODES = [{"packed": packed, "event_idx": event} for packed in (False, True)
         for event in (False, True)]  # fmt: skip


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture(params=MODES, ids=["split", "split-event", "packed", "packed-event"])
def single(request: pytest.FixtureRequest, sink: Sink) -> Iterator[Guest]:
    with Guest([sink.port], **request.param) as guest:
        yield guest


@pytest.fixture
def multi(sink: Sink, tmp_path: Path) -> Iterator[Guest]:
    """Port 0 the console, 1 a socket, 2 a file; all there and open."""
    ports: list[Port | None] = [
        sink.port,
        SocketPort(1, "chat", str(tmp_path / "s")),
        FilePort(2, "log", str(tmp_path / "f")),
    ]
    with Guest(ports) as guest:
        guest.control(0, DEVICE_READY)
        assert [guest.told() for _ in ports] == [(n, DEVICE_ADD, 1, b"") for n in range(3)]
        yield guest


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


def test_output_in_order_whatever_its_buffers(single: Guest, sink: Sink) -> None:
    chance, want = random.Random(3), b""
    for _ in range(100):
        parts = [chance.randbytes(chance.randint(1, 3000)) for _ in range(chance.randint(1, 3))]
        single.put(1, *parts)
        until(single.driver.rings[1].used)
        want += b"".join(parts)
    assert sink.data == want


def test_output_waits_for_the_console_without_holding_the_device_up(
    single: Guest, sink: Sink
) -> None:
    sink.blocked = True
    single.put(1, b"x" * 6000)
    time.sleep(0.1)
    assert single.driver.rings[1].used() == []
    single.give(0)
    sink.port.type(b"input")
    assert single.take(0) == b"input"
    sink.blocked = False
    until(single.driver.rings[1].used)
    assert sink.data == b"x" * 6000
    sink.blocked = True
    single.put(1, b"lost")
    time.sleep(0.05)
    single.driver.start()  # a reset does not wait for it
    sink.blocked = False
    single.put(1, b"new")
    until(single.driver.rings[1].used)
    assert sink.data.endswith(b"xnew")


def test_input_waits_for_buffers(single: Guest, sink: Sink) -> None:
    sink.port.type(b"0123456789")
    assert sink.port.backlog == 10
    for want in (b"0123", b"4567", b"89"):
        single.give(0, 4)
        assert single.take(0) == want
    assert sink.port.backlog == 0


def test_the_size_is_in_the_configuration(single: Guest) -> None:
    single.driver.take_interrupts()
    single.device.resize(132, 50)
    assert single.driver.take_interrupts() & 2
    assert single.driver.read(mmio.CONFIG, 2) == 132
    assert single.driver.read(mmio.CONFIG + 2, 2) == 50
    assert single.driver.read(mmio.CONFIG + 4) == 1
    assert not single.driver.features >> F_MULTIPORT & 1
    single.driver.take_interrupts()
    single.driver.start()
    assert single.driver.take_interrupts() & 2  # a driver that looks only now learns it too


def test_emergency_write(single: Guest, sink: Sink) -> None:
    for char in b"oops":
        single.driver.write(mmio.CONFIG + EMERG_WR, char)
    assert sink.data == b"oops"


def test_ports_introduce_themselves(multi: Guest) -> None:
    multi.control(0, PORT_READY)
    assert multi.told() == (0, CONSOLE_PORT, 1, b"")
    assert multi.told() == (0, PORT_OPEN, 1, b"")
    multi.control(1, PORT_READY)
    assert multi.told() == (1, PORT_NAME, 1, b"chat\0")
    multi.control(2, PORT_READY)
    assert multi.told() == (2, PORT_NAME, 1, b"log\0")
    assert multi.told() == (2, PORT_OPEN, 1, b"")


def test_a_size_is_told_to_a_multiport_console(multi: Guest) -> None:
    multi.device.resize(100, 30)
    multi.control(0, PORT_READY)
    assert multi.told()[1] == CONSOLE_PORT
    assert multi.told() == (0, RESIZE, 0, struct.pack("<HH", 100, 30))
    assert multi.told()[1] == PORT_OPEN
    multi.device.resize(80, 24)
    assert multi.told() == (0, RESIZE, 0, struct.pack("<HH", 80, 24))


def test_a_socket_port(multi: Guest, tmp_path: Path) -> None:
    multi.control(1, PORT_READY)
    multi.told()
    multi.put(5, b"nobody hears this")
    until(multi.driver.rings[5].used)
    for word in (b"one", b"two"):
        with connect(tmp_path / "s") as sock:
            assert multi.told() == (1, PORT_OPEN, 1, b"")
            multi.put(5, b"hello ", word)
            until(multi.driver.rings[5].used)
            assert sock.recv(100) == b"hello " + word
            multi.control(1, PORT_OPEN)
            sock.sendall(b"hi " + word)
            multi.give(4)
            assert multi.take(4) == b"hi " + word
        assert multi.told() == (1, PORT_OPEN, 0, b"")


def test_without_descriptors_a_client_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop, which has other devices to serve, does not turn on it; the client is served when
    there are some again."""
    tries = []
    accept = SocketPort._accept
    monkeypatch.setattr(SocketPort, "_accept", lambda port: (tries.append(1), accept(port)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = []
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    with Guest([None, SocketPort(1, "chat", str(tmp_path / "s"))]) as guest, client:
        most = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    spare.append(os.dup(0))
            client.connect(str(tmp_path / "s"))
            time.sleep(0.7)
            assert 0 < len(tries) < 20
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in spare:
                os.close(fd)
        guest.control(1, PORT_READY)
        assert guest.told()[1:3] == (PORT_NAME, 1)
        assert guest.told()[1:3] == (PORT_OPEN, 1)


def test_input_before_the_guest_opens_a_port_waits(multi: Guest, tmp_path: Path) -> None:
    multi.control(1, PORT_READY)
    multi.told()
    multi.give(4)
    with connect(tmp_path / "s") as sock:
        sock.sendall(b"early")
        multi.told()
        time.sleep(0.05)
        assert multi.driver.rings[4].used() == []
        multi.control(1, PORT_OPEN)
        assert multi.take(4) == b"early"


def test_a_megabyte_through_a_socket_port_both_ways(multi: Guest, tmp_path: Path) -> None:
    multi.control(1, PORT_READY)
    multi.told()
    multi.control(1, PORT_OPEN)
    down, up = random.Random(1).randbytes(1 << 20), random.Random(2).randbytes(1 << 20)
    with connect(tmp_path / "s") as sock:
        multi.told()
        sender = threading.Thread(target=sock.sendall, args=(down,))
        sender.start()
        got = b""
        while len(got) < len(down):
            multi.give(4, SLOT)
            got += multi.take(4)
        assert got == down
        sender.join(10)
        back = bytearray()

        def read() -> None:
            while len(back) < len(up):
                time.sleep(0.0005)  # slower than the guest: it has to wait
                back.extend(sock.recv(1 << 14))

        reader = threading.Thread(target=read)
        reader.start()
        for at in range(0, len(up), SLOT):
            multi.put(5, up[at : at + SLOT])
            until(multi.driver.rings[5].used)
        reader.join(20)
        assert back == up


def test_a_file_port(multi: Guest, tmp_path: Path) -> None:
    multi.control(2, PORT_READY)
    for _ in range(10):
        multi.put(7, b"line\n")
        until(multi.driver.rings[7].used)
    assert (tmp_path / "f").read_bytes() == b"line\n" * 10


def test_a_reset_hangs_up_and_ports_work_again(multi: Guest, tmp_path: Path) -> None:
    multi.control(1, PORT_READY)
    multi.told()
    with connect(tmp_path / "s") as sock:
        multi.told()
        multi.driver.start()
        assert sock.recv(10) == b""
    multi.control(0, DEVICE_READY)
    for _ in range(3):
        multi.told()
    multi.control(1, PORT_READY)
    assert multi.told()[1] == PORT_NAME
    with connect(tmp_path / "s"):
        assert multi.told() == (1, PORT_OPEN, 1, b"")


def test_a_driver_without_multiport_has_the_console(sink: Sink, tmp_path: Path) -> None:
    ports = [sink.port, FilePort(1, "log", str(tmp_path / "f"))]
    with Guest(ports, without=1 << F_MULTIPORT) as guest:
        guest.put(1, b"hello")
        until(guest.driver.rings[1].used)
        assert sink.data == b"hello"
        guest.put(CONTROL_TX, CONTROL.pack(0, DEVICE_READY, 1))
        guest.give(CONTROL_RX)
        time.sleep(0.05)
        assert guest.driver.rings[CONTROL_RX].used() == []


@pytest.mark.parametrize("seed", range(3))
def test_hostile_control_messages(multi: Guest, sink: Sink, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        size = chance.choice([1, 7, 8, 8, 8, 9, 100, 5000])
        message = CONTROL.pack(
            chance.choice([0, 1, 2, 3, 0xFFFFFFFF]), chance.randint(0, 9), chance.choice([0, 1, 9])
        )
        multi.put(CONTROL_TX, (message + bytes(5000))[:size])
        until(multi.driver.rings[CONTROL_TX].used)
    assert not multi.driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET
    multi.driver.start()
    multi.put(1, b"fine")
    until(multi.driver.rings[1].used)
    assert sink.data == b"fine"


def test_output_under_way_is_put_out_once_after_a_restore(sink: Sink) -> None:
    with Guest([sink.port]) as guest:
        real = sink.port._may_write
        left = [2]  # pieces of 4096 bytes

        def may_write() -> bool:
            left[0] -= 1
            return left[0] >= 0

        sink.port._may_write = may_write
        guest.put(1, b"a" * 4096 + b"b" * 4096 + b"c" * 100)
        deadline = time.monotonic() + 10
        while len(sink.data) < 8192:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        state = guest.device.save()
        other_sink = Sink()
        other = VirtioConsole([other_sink.port])
        other.memory, other.interrupt = guest.driver.memory, guest.device.interrupt
        other.restore(state)
        other.resume()
        other.notify(1)
        assert other_sink.data == b"c" * 100
        assert len(guest.driver.rings[1].used()) == 1
        sink.port._may_write = real


def test_input_goes_to_the_uart_until_the_port_is_open(sink: Sink) -> None:
    uart = Uart()
    line = HvcLine(uart, sink.port)
    line.receive(b"early")
    assert line.backlog == uart.backlog == 5
    with Guest([sink.port]) as guest:
        deadline = time.monotonic() + 10
        while not sink.port.open:
            assert time.monotonic() < deadline
        line.receive(b"late")
        assert line.backlog == 4
        guest.give(0)
        assert guest.take(0) == b"late"
        line.send_break()
        guest.give(0)
        assert guest.take(0) == b"\x0f"
    assert uart.backlog == 5


def test_nothing_is_left(tmp_path: Path) -> None:
    fds, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    ports: list[Port | None] = [None, SocketPort(1, "chat", str(tmp_path / "s")),
                                FilePort(2, "log", str(tmp_path / "f"))]  # fmt: skip
    with Guest(ports) as guest:
        guest.control(1, PORT_READY)
        guest.told()
        sock = connect(tmp_path / "s")
        guest.told()
    sock.close()
    assert sorted(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() == threads
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("text", "says"), [
    ("", "'' is not name=, socket= or file="),
    ("name=a", "give it either socket= or file="),
    ("name=a,socket=x,file=y", "give it either socket= or file="),
    ("socket=x", "a name is 1 to 64 ASCII characters"),
    ("name=a/b,socket=x", "a name is 1 to 64 ASCII characters"),
    ("name=a,path=x", "'path' is not name=, socket= or file="),
])  # fmt: skip
def test_port_config_refuses(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        PortConfig.parse(text)
    assert str(caught.value).startswith("--port ")


def test_port_config(tmp_path: Path) -> None:
    assert PortConfig.parse("name=a,socket=x,,y") == PortConfig("a", socket="x,y")
    with pytest.raises(UsageError, match="No such file or directory; give a file"):
        PortConfig("a", file="/nowhere/x").open(1)
    with pytest.raises(UsageError, match="--port name=a,socket=/nowhere/x: No such file"):
        PortConfig("a", socket="/nowhere/x").open(1)
