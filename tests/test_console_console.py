"""vmm.console.console: the parts together, with a UART as the guest drives it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from vmm.console.backends import PtyBackend
from vmm.console.console import Console
from vmm.devices.uart import LSR, MCR, RBR, THR, Uart
from vmm.errors import UsageError


def echo(uart: Uart, stop: threading.Event) -> None:
    """A guest: prompts, and answers each byte it gets with the byte in brackets."""
    uart.write(MCR, 1, 0x03)
    uart.write_many(b"? ")
    while not stop.is_set():
        if uart.read(LSR, 1) & 1:
            byte = uart.read(RBR, 1)
            for out in (ord("["), byte, ord("]"), ord("\n")):
                uart.write(THR, 1, out)


def test_a_dialogue_without_any_back_end() -> None:
    console, uart, stop = Console("none"), Uart(), threading.Event()
    console.attach(uart)
    guest = threading.Thread(target=echo, args=(uart, stop))
    guest.start()
    console.tail.wait_for("? ", timeout=30)
    uart.receive(b"x")
    assert console.tail.wait_for(re.compile(r"\[.\]"), timeout=30) == "? [x]"
    stop.set()
    guest.join()
    uart.write_many(b"last words")
    console.close()
    assert console.tail.bytes().endswith(b"last words")


def test_file_gets_everything_before_close_returns(tmp_path: Path) -> None:
    console, uart = Console(f"file:{tmp_path}/log"), Uart()
    console.attach(uart)
    uart.write_many(b"line\nhalf")
    console.close()
    assert (tmp_path / "log").read_bytes() == b"line\nhalf"
    assert console.tail.bytes() == b"line\nhalf"


def test_pty_dialogue_and_nothing_left() -> None:
    fds, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    console, uart, stop = Console("pty"), Uart(), threading.Event()
    assert isinstance(console.backend, PtyBackend)
    console.attach(uart)
    fd = os.open(console.backend.path, os.O_RDWR | os.O_NOCTTY)
    guest = threading.Thread(target=echo, args=(uart, stop))
    guest.start()
    os.write(fd, b"\x01")
    got = b""
    while b"]" not in got:
        got += os.read(fd, 100)
    assert got.startswith(b"? [\x01]")
    stop.set()
    guest.join()
    os.close(fd)
    console.close()
    console.close()
    assert sorted(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() == threads


def test_a_wrong_spec_is_told_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="--console socket: no such console"):
        Console("socket")


MONITOR = """
import threading
from vmm.console.console import Console
from vmm.devices.uart import Uart
console, uart, ended = Console("auto"), Uart(), threading.Event()
console.attach(uart, ended.set)
uart.write_many({output})
ended.wait(60)
console.close()
"""


def monitor(slave: int, stdout: int, output: str) -> subprocess.Popen[bytes]:
    """A program with a console, on the terminal `slave`."""
    return subprocess.Popen(
        [sys.executable, "-c", MONITOR.format(output=output)],
        stdin=slave,
        stdout=stdout,
        preexec_fn=lambda: os.login_tty(os.dup(slave)) if stdout == slave else os.setsid(),
    )


def read_until(fd: int, text: bytes) -> bytes:
    got = b""
    while text not in got:
        got += os.read(fd, 4096)
    return got


@pytest.mark.timeout(60)
def test_help_and_end_at_a_terminal() -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    child = monitor(slave, slave, "b'login: '")
    read_until(master, b"login: ")
    assert not termios.tcgetattr(slave)[3] & termios.ECHO
    os.write(master, b"\x01h")
    read_until(master, b"Ctrl-A h   this help\r\n")
    os.write(master, b"\x01x")
    assert child.wait() == 0
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


@pytest.mark.timeout(60)
def test_the_end_key_works_while_the_outputs_reader_is_stuck() -> None:
    master, slave = os.openpty()
    reading, writing = os.pipe()
    filler = os.dup(writing)
    os.set_blocking(filler, False)
    while True:  # a reader that has paused: the pipe is full
        try:
            os.write(filler, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(filler, True)
    child = monitor(slave, writing, "b'half'")
    while termios.tcgetattr(slave)[3] & termios.ECHO:
        pass
    threading.Event().wait(0.2)  # the pump has come to flush
    os.write(master, b"\x01x")
    assert child.wait() == 0
    for fd in (master, slave, reading, writing, filler):
        os.close(fd)
