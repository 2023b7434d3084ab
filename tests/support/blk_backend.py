"""A qemu-storage-daemon of a test's own that serves a raw image by vhost-user-blk."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path


class BlkBackend:
    """It listens on `socket`; `start` and `kill` as often as one likes."""

    def __init__(
        self,
        image: Path,
        socket: Path,
        *,
        queues: int = 1,
        writable: bool = True,
        slow: bool = False,
    ) -> None:
        self.slow = slow
        self.image, self.socket, self.queues, self.writable = image, socket, queues, writable
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        node = f"driver=file,node-name=disk,filename={self.image},discard=unmap"
        writable = "on" if self.writable else "off"
        limits, name = [], "disk"
        if self.slow:  # takes requests, does the first and keeps the others for minutes
            limits = [
                "--object",
                "throttle-group,id=g,limits.bps-total=1",
                "--blockdev",
                "driver=throttle,node-name=slow,throttle-group=g,file=disk",
            ]
            name = "slow"
        self.process = subprocess.Popen(
            ["qemu-storage-daemon",
             "--blockdev", f"{node},read-only={'off' if self.writable else 'on'}", *limits,
             "--export", f"type=vhost-user-blk,id=e,node-name={name},writable={writable},"
             f"addr.type=unix,addr.path={self.socket},num-queues={self.queues}"]
        )  # fmt: skip
        limit = time.monotonic() + 30
        while not self.listens():
            assert self.process.poll() is None and time.monotonic() < limit
            time.sleep(0.005)

    def listens(self) -> bool:
        """Whether somebody listens on its socket: __SO_ACCEPTCON; connecting would be the one
        connection it takes."""
        rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()]
        return any(row[-1] == str(self.socket) and row[3] == "00010000" for row in rows)

    def kill(self) -> None:
        """At once, as by the host's OOM killer; its socket stays, and nobody listens on it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            self.socket.unlink(missing_ok=True)
