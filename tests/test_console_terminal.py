"""vmm.console.terminal on real pseudo-terminals: raw inside, restored however it ends."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
from collections.abc import Callable

import pytest

from vmm.console.terminal import Terminal


def modes(fd: int) -> tuple[int, ...]:
    iflag, oflag, cflag, lflag = termios.tcgetattr(fd)[:4]
    return iflag, oflag, cflag, lflag


def is_raw(fd: int) -> bool:
    return not termios.tcgetattr(fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


class Child:
    """A Python program on a terminal of its own; we keep the other side, and the slave open so
    that its modes can be looked at after the program ended."""

    def __init__(self, body: str) -> None:
        program = f"import os, signal, sys, time\nfrom vmm.console.terminal import Terminal\n{body}"
        self.master, self.slave = os.openpty()
        self.before = modes(self.slave)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.master)
            os.login_tty(self.slave)
            os.execv(sys.executable, [sys.executable, "-c", program])
        self.output = b""

    def expect(self, text: bytes) -> None:
        deadline = time.monotonic() + 30
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            if select.select([self.master], [], [], 0.1)[0]:
                self.output += os.read(self.master, 4096)

    def wait(self) -> int:
        """Exit status, or minus the signal that ended it."""
        _, status = os.waitpid(self.pid, 0)
        assert modes(self.slave) == self.before, self.output
        os.close(self.slave)
        os.close(self.master)
        return os.waitstatus_to_exitcode(status)


WAITING = """
with Terminal(0):
    print("raw", flush=True)
    time.sleep(60)
"""


def test_modes_inside_are_qemus() -> None:
    master, slave = os.openpty()
    before = modes(slave)
    with Terminal(slave):
        iflag, oflag, _, lflag = modes(slave)
        assert is_raw(slave)
        assert not iflag & (termios.ICRNL | termios.IXON | termios.INLCR | termios.ISTRIP)
        assert oflag & termios.OPOST
        assert not lflag & termios.IEXTEN
    assert modes(slave) == before
    os.close(master)
    os.close(slave)


def test_control_keys_come_through() -> None:
    master, slave = os.openpty()
    with Terminal(slave):
        keys = bytes(range(1, 128))
        os.write(master, keys)
        assert os.read(slave, 200) == keys
    os.close(master)
    os.close(slave)


def test_what_is_no_terminal_is_left_alone() -> None:
    reading, writing = os.pipe()
    for fd in (reading, -1):
        with Terminal(fd) as terminal:
            assert not terminal.is_terminal
    os.close(reading)
    os.close(writing)


def test_restored_once_and_handlers_given_back() -> None:
    master, slave = os.openpty()
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    terminal = Terminal(slave)
    with terminal:
        terminal.restore()
        assert not is_raw(slave)
    terminal.restore()
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    os.close(master)
    os.close(slave)


def test_an_exception_restores() -> None:
    master, slave = os.openpty()
    before = modes(slave)
    with pytest.raises(ZeroDivisionError), Terminal(slave):
        _ = 1 // 0
    assert modes(slave) == before
    os.close(master)
    os.close(slave)


def test_a_hung_up_terminal_raises_nothing() -> None:
    master, slave = os.openpty()
    with Terminal(slave):
        os.close(master)
    os.close(slave)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_signals_restore_and_still_kill(number: signal.Signals) -> None:
    child = Child(WAITING)
    child.expect(b"raw")
    assert is_raw(child.slave)
    os.kill(child.pid, number)
    assert child.wait() == -number


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("t = Terminal(0)\nt.__enter__()\nsys.exit(7)\n", 7),
        ("t = Terminal(0)\nt.__enter__()\nraise RuntimeError\n", 1),
        ("with Terminal(0):\n    sys.exit(3)\n", 3),
    ],
    ids=["exit without leaving", "exception without leaving", "exit inside"],
)
def test_the_interpreters_exit_restores(body: str, status: int) -> None:
    assert Child(f"time.sleep(0.1)\n{body}").wait() == status


def test_a_handler_of_the_program_comes_first() -> None:
    child = Child(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n" + WAITING,
    )
    child.expect(b"raw")
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 9


def test_continued_after_sigstop_it_is_raw_again() -> None:
    child = Child(WAITING)
    child.expect(b"raw")
    os.kill(child.pid, signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    # What the shell would do while it has the terminal.
    attributes = termios.tcgetattr(child.slave)
    attributes[3] |= termios.ECHO | termios.ICANON | termios.ISIG
    termios.tcsetattr(child.slave, termios.TCSANOW, attributes)
    os.kill(child.pid, signal.SIGCONT)
    wait_until(lambda: is_raw(child.slave))
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM


JOB = """
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    with Terminal(0):
        print("raw", os.getpid(), flush=True)
        time.sleep(60)
    os._exit(0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
os.waitpid(pid, os.WUNTRACED)
os.tcsetpgrp(0, os.getpgrp())
print("stopped", flush=True)
sys.stdin.readline()
os.tcsetpgrp(0, pid)
os.kill(pid, signal.SIGCONT)
_, status = os.waitpid(pid, 0)
sys.exit(-os.waitstatus_to_exitcode(status))
"""


def test_sigtstp_under_a_job_control_shell() -> None:
    child = Child(JOB)
    child.expect(b"raw")
    child.expect(b"\n")
    pid = int(child.output.split(b"raw ")[1].split()[0])
    assert is_raw(child.slave)
    os.kill(pid, signal.SIGTSTP)
    child.expect(b"stopped")
    assert not is_raw(child.slave)
    os.write(child.master, b"\n")
    wait_until(lambda: is_raw(child.slave))
    os.kill(pid, signal.SIGTERM)
    assert child.wait() == signal.SIGTERM


def test_in_the_background_the_terminal_is_not_touched() -> None:
    child = Child(
        """
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    with Terminal(0):
        time.sleep(0.2)
    os._exit(5)
_, status = os.waitpid(pid, os.WUNTRACED)
sys.exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 99)
"""
    )
    assert child.wait() == 5, "99: it was stopped by SIGTTOU"
