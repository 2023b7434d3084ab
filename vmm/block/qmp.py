"""The monitor of a qemu-storage-daemon (QMP): one command at a time, from any thread."""

from __future__ import annotations

import json
import socket
import time
from _thread import allocate_lock

from vmm.errors import HostError, UsageError
from vmm.guest_text import visible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANSWER_WITHIN = 20.0
"""Seconds, from a command to the last byte of its answer."""
LINE_MAX = 1 << 16
"""Bytes of an answer."""
EVENTS_MAX = 1000
"""Events that may come before it."""


class Qmp:
    """A connection to a monitor.

    Args:
        sock: connected to it; closed with this.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._lock = allocate_lock()
        self._sock = sock
        self._rest = b""
        self._limit = 0.0
        self._greeted = False

    def ask(self, command: str, **arguments: object) -> None:
        """Have `command` carried out.

        Raises:
            UsageError: the daemon refuses it, in its words.
            HostError: it has ended, or does not answer.
        """
        with self._lock:
            self._limit = time.monotonic() + ANSWER_WITHIN
            try:
                if not self._greeted:
                    self._read()  # the greeting
                    self._ask("qmp_capabilities", {})
                    self._greeted = True
                self._ask(command, arguments)
            except (OSError, ValueError, RecursionError) as err:
                raise HostError(f"qemu-storage-daemon: its monitor does not answer: {err}") from err

    def _ask(self, command: str, arguments: dict[str, object]) -> None:
        words = {"execute": command, "arguments": arguments}
        self._sock.settimeout(max(self._limit - time.monotonic(), 0.001))
        self._sock.sendall(json.dumps(words).encode() + b"\n")
        for _ in range(EVENTS_MAX):
            answer = self._read()
            if "error" in answer:
                error = answer["error"]
                said = error.get("desc") if isinstance(error, dict) else error
                told = visible(" ".join(str(said).split()))
                raise UsageError(f"qemu-storage-daemon: {told}")
            if "return" in answer:
                return
        raise OSError("it tells of events without end")

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            if len(self._rest) > LINE_MAX:
                raise ValueError(f"{self._rest[:40]!r} comes to no end")
            self._sock.settimeout(max(self._limit - time.monotonic(), 0.001))
            data = self._sock.recv(LINE_MAX)
            if not data:
                raise OSError("it has hung up")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError(f"{line[:40]!r} is no answer")
        return answer

    def close(self) -> None:
        """Hang up; harmless twice."""
        self._sock.close()
