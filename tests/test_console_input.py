"""vmm.console.input: the thread between a descriptor and a UART."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vmm.console.escape import END, EscapeParser
from vmm.console.input import BACKLOG_LIMIT, InputPump
from vmm.devices.uart import FCR, IER, LSR, MCR, RBR, THR, Uart

Pipe = tuple[int, int]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@pytest.fixture
def uart() -> Uart:
    uart = Uart()
    for offset, value in ((FCR, 1), (MCR, 0x0B), (IER, 1)):
        uart.write(offset, 1, value)
    return uart


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            continue


def drain(uart: Uart) -> bytes:
    got = bytearray()
    while uart.read(LSR, 1) & 1:
        got.append(uart.read(RBR, 1))
    return bytes(got)


def test_input_arrives_and_its_end_ends_only_it(uart: Uart, pipe: Pipe) -> None:
    pump = InputPump(uart, pipe[0])
    pump.start()
    os.write(pipe[1], b"hello \x01x")
    os.close(pipe[1])
    eventually(lambda: uart.backlog == 8)
    assert drain(uart) == b"hello \x01x", "no escape key in piped input"
    sent: list[bytes] = []
    uart.sink = sent.append
    uart.write(THR, 1, ord("$"))
    eventually(lambda: sent == [b"$"])
    pump.stop()


def test_half_a_line_is_flushed_without_input(uart: Uart) -> None:
    sent: list[bytes] = []
    uart.sink = sent.append
    pump = InputPump(uart)
    pump.start()
    for text in (b"login: ", b"again: "):
        uart.write_many(text)
        eventually(lambda: bool(sent))
        assert sent.pop() == text
    pump.stop()


def test_escape_keys(uart: Uart, pipe: Pipe) -> None:
    actions: list[str] = []
    pump = InputPump(uart, pipe[0], EscapeParser(), actions.append)
    pump.start()
    os.write(pipe[1], b"a\x01cb\x01x")
    eventually(lambda: actions == [END])
    pump.stop()
    lsr_and_data = []
    while (lsr := uart.read(LSR, 1)) & 1:
        lsr_and_data.append((lsr & 0x10, uart.read(RBR, 1)))
    assert lsr_and_data == [(0, ord("a")), (0x10, 0), (0, ord("b"))]


def test_a_guest_that_does_not_read_stops_the_writer_not_the_monitor(pipe: Pipe) -> None:
    uart = Uart()  # not receiving
    pump = InputPump(uart, pipe[0])
    pump.start()
    data = os.urandom(400_000)

    def write() -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(pipe[1], view) :]

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    eventually(lambda: uart.backlog >= BACKLOG_LIMIT)
    time.sleep(0.1)
    assert uart.backlog < BACKLOG_LIMIT + 8192
    uart.write(MCR, 1, 0x03)
    got = bytearray()
    deadline = time.monotonic() + 60
    while len(got) < len(data) and time.monotonic() < deadline:
        got += drain(uart)
        time.sleep(0.001)
    assert got == data
    writer.join()
    pump.stop()


def test_a_pty_may_be_connected_later(uart: Uart) -> None:
    master, slave = os.openpty()
    path = os.ttyname(slave)
    os.close(slave)
    os.set_blocking(master, False)
    pump = InputPump(uart, master)
    pump.start()
    for _ in range(2):
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        os.write(fd, b"x\n")
        eventually(lambda: uart.backlog > 0)
        assert drain(uart).startswith(b"x")
        os.close(fd)
    pump.stop()
    os.close(master)


def test_stop_from_its_own_action(uart: Uart, pipe: Pipe) -> None:
    pump = InputPump(uart, pipe[0], EscapeParser(), lambda action: pump.stop())
    pump.start()
    os.write(pipe[1], b"\x01x")
    eventually(lambda: pump._stopping)
    pump.stop()
    pump.stop()


def test_nothing_is_left_behind(uart: Uart, pipe: Pipe) -> None:
    fds, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(50):
        pump = InputPump(uart, pipe[0])
        pump.start()
        uart.write(THR, 1, 65)
        pump.stop()
    assert sorted(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() == threads
    os.write(pipe[1], b"still ours")
    assert os.read(pipe[0], 100) == b"still ours"
