"""Guests of a few instructions, as ELF files with a PVH note: 32-bit protected mode, flat segments,
no paging, no IDT, interrupts off, started at ENTRY."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from vmm.testing.guests import (
    COUNTER,
    ENTRY,
    HALT,
    LOGIN,
    POWEROFF,
    SPIN,
    counting,
    exits,
    image,
    out,
    prints,
)

__all__ = ["COUNTER", "ENTRY", "HALT", "LOGIN", "POWEROFF", "SPIN", "counting", "exits", "prints"]

ROOT = Path(__file__).resolve().parents[2]

TRIPLE_FAULT = b"\x0f\x0b"  # ud2
POPCNT = b"\xf3\x0f\xb8\xc0"  # popcnt eax, eax: PVM cannot emulate it


COUNTING = counting(COUNTER)
RESET = out(0x602, 1)
PANIC = out(0x505, 1)


def _echo() -> bytes:
    """Sends back what it receives in brackets; `B` for a break; status 7 at a `q`.

    wait: mov dx, 0x3fd; in al, dx; test al, 1; jz wait
          mov ah, al; mov dx, 0x3f8; in al, dx
          cmp al, 'q'; jne 1f; mov al, 7; out 0xf4, al; 1:
          test ah, 0x10; jz 2f; mov al, 'B'; 2:
          mov ah, al; mov al, '['; out dx, al; mov al, ah; out dx, al; mov al, ']'; out dx, al
          jmp wait
    """
    code = bytes.fromhex(
        "66bafd03 ec a801 74f7 88c4 66baf803 ec 3c71 7504 b007 e6f4 f6c410 7402 b042"
        "88c4 b05b ee 88e0 ee b05d ee"
    )
    return code + b"\xeb" + struct.pack("b", -len(code) - 2)


SILENT_ECHO = _echo()
ECHO = prints(b"ready\n") + SILENT_ECHO
# Waits until the power button was pressed (the GED's selector says so), then powers off.
# wait: mov dx, 0x604; in eax, dx; test al, 1; jz wait
POLITE = prints(b"ready\n") + bytes.fromhex("66ba0406 ed a801 74f7") + POWEROFF + HALT

# Looks at the GED's selector once, as a driver does, and never again.
DEAF = bytes.fromhex("66ba0406 ed") + prints(b"ready\n") + HALT


def kernel(directory: Path, code: bytes) -> str:
    """The path of a new ELF file that runs `code`."""
    path = directory / f"guest-{len(list(directory.glob('guest-*')))}"
    path.write_bytes(image(code))
    return str(path)


# --- the command ------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vmm", *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's, where `python -m vmm` works from any directory."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """`vmm` with these arguments, to its end."""
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command(*arguments),
        **{
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "timeout": 120,
            "check": False,
            "env": environment(),
            **options,
        },
    )


class AtTerminal:
    """`vmm` on a terminal of its own, of which we hold the other end (a context manager).

    The slave stays open here, so that its modes can be looked at after the end.
    """

    def __init__(self, *arguments: str, term: str = "dumb") -> None:
        self.master, self.slave = os.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.output = b""
        self._ended: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.master)
                os.login_tty(self.slave)
                os.execve(sys.executable, command(*arguments), environment(TERM=term))
            finally:
                os._exit(99)

    def __enter__(self) -> AtTerminal:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)
        os.close(self.slave)

    @property
    def is_raw(self) -> bool:
        lflag: int = termios.tcgetattr(self.slave)[3]
        return not lflag & (termios.ECHO | termios.ICANON | termios.ISIG)

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def kill(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def expect(self, text: bytes, seconds: float = 60) -> bytes:
        """Read until `text` came; what was read before it is returned, and forgotten."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            self._read(0.1)
        before, self.output = self.output.split(text, 1)
        return before

    def wait(self, seconds: float = 60) -> int:
        """The status (minus a signal's number)."""
        deadline = time.monotonic() + seconds
        while self._ended is None:
            assert time.monotonic() < deadline, self.output
            self._read(0.02)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._ended = os.waitstatus_to_exitcode(status)
        self._read(0)
        return self._ended

    def _read(self, seconds: float) -> None:
        if select.select([self.master], [], [], seconds)[0]:
            self.output += os.read(self.master, 65536)


def opened_since(before: Sequence[str]) -> list[str]:
    """Descriptors that were not there when `descriptors` said `before`.

    One that has gone is no leak: an earlier test's, which was garbage until now.
    """
    return [each for each in descriptors() if each not in before]


def descriptors() -> Sequence[str]:
    """What this process's descriptors are, sorted; for comparing before and after."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # listdir's own
            found.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return sorted(found)
