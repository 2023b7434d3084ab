"""The rate limit of a disk that qemu-storage-daemon serves, changed through its monitor (QMP)."""

from __future__ import annotations

import json
import socket
from _thread import allocate_lock

from vmm.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANSWER_WITHIN = 20.0
"""Seconds."""


class RemoteLimit:
    """As `vmm.virtio.limit.Limit`, as far as a program changes one; from any thread.

    Args:
        sock: connected to the daemon's monitor; closed with this.
        group: the id of the throttle group.
        rates: (bytes, ops) a second, as the daemon was started.

    Attributes:
        rates: (bytes, ops) a second; 0 where there is no limit.
    """

    def __init__(self, sock: socket.socket, group: str, rates: tuple[float, float]) -> None:
        self.rates = rates
        self._path = f"/objects/{group}"
        self._lock = allocate_lock()
        self._sock = sock
        sock.settimeout(ANSWER_WITHIN)
        self._file = sock.makefile("rb")
        self._greeted = False

    def change(
        self, *, bytes: float = 0, ops: float = 0, burst_bytes: float = 0, burst_ops: float = 0
    ) -> None:
        """Other limits for requests from now on (those that wait already are not looked at again);
        0: none. A burst is a second's worth at least, or 0.

        Raises:
            UsageError: the daemon refuses it.
            HostError: it has ended.
        """
        limits = {
            "bps-total": int(bytes), "bps-total-max": int(burst_bytes),
            "iops-total": int(ops), "iops-total-max": int(burst_ops),
        }  # fmt: skip
        with self._lock:
            try:
                if not self._greeted:
                    self._read()  # the greeting
                    self._ask("qmp_capabilities")
                    self._greeted = True
                self._ask("qom-set", path=self._path, property="limits", value=limits)
            except (OSError, ValueError) as err:
                raise HostError(f"qemu-storage-daemon's monitor does not answer: {err}") from err
            self.rates = (bytes, ops)

    def _ask(self, command: str, **arguments: object) -> None:
        words = {"execute": command, "arguments": arguments}
        self._sock.sendall(json.dumps(words).encode() + b"\n")
        while True:
            answer = self._read()
            if "error" in answer:
                raise UsageError(f"qemu-storage-daemon: {answer['error'].get('desc')}")
            if "return" in answer:
                return

    def _read(self) -> dict[str, Any]:
        line = self._file.readline(1 << 16)
        if not line:
            raise OSError("it has hung up")
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Hang up; harmless twice."""
        self._file.close()
        self._sock.close()
