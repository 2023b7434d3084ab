"""A machine whose memory another process hands over, page by page (vmm.snapshot.uffd)."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
from contextlib import suppress

from vmm import json_object
from vmm.child import Child
from vmm.errors import HostError, SnapshotError, UsageError
from vmm.kvm.ffi import address_of
from vmm.machine import exits
from vmm.machine.exits import MachineExit
from vmm.memory import GuestMemory, userfault
from vmm.sandbox.helper import PYTHON_ENVIRONMENT, READ, Confinement, python_files
from vmm.snapshot.restore import FromFiles
from vmm.virtio import unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.config import MachineConfig
    from vmm.machine import Machine
    from vmm.snapshot.store import Snapshot

KIND = "uffd"
"""Of memory regions: what is not there is somewhere else."""
LINE_MAX = 1000
"""Characters of what a handler says that are passed on."""
ANSWER_WITHIN = 60.0
"""Seconds; a Python starts in between."""
HANDLER = (
    "import sys; sys.path.append(sys.argv.pop(1)); from vmm.snapshot.uffd import command; command()"
)
"""The handler's program; its first argument is PACKAGES."""
PACKAGES = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The directory that has this package."""


class FromHandler(FromFiles):
    """Memory is filled by a handler: one of its own, or the one that listens on `where`."""

    def __init__(self, snapshot: Snapshot, state: dict[str, Any], where: str) -> None:
        super().__init__(snapshot, state)
        self._where = where
        self._child: Child | None = None
        self._sock: socket.socket | None = None
        self._closing = False
        self._reason: MachineExit | None = None
        self._asked: list[Callable[[], object]] = []
        self._wake = -1
        """Written to when something was put into `_asked`."""

    def map_memory(self, config: MachineConfig) -> GuestMemory:
        snapshot = self._snapshot
        memory = GuestMemory(snapshot.memory_size)
        try:
            uffd = userfault.open_userfault()
            try:
                regions, offset = [], 0
                for region in memory.regions:
                    region.kind = KIND
                    userfault.register(uffd, region.hva, region.size)
                    regions.append((address_of(region.map), region.size, offset))
                    offset += region.size
                self._connect(uffd, {"regions": regions, "snapshot": snapshot.checksum})
            finally:
                # The handler has it now. With ours, a handler's end would leave who waits for a
                # page waiting for ever; it may be the thread that has the GIL.
                os.close(uffd)
        except BaseException:
            self._hang_up()
            memory.close()
            raise
        return memory

    def _connect(self, uffd: int, request: dict[str, object]) -> None:
        if self._where:
            unix.check_path(f"--pages uffd={self._where}", self._where)
            sock = self._sock = socket.socket(socket.AF_UNIX)
            try:
                unix.connect(sock, self._where)
            except OSError as err:
                raise UsageError(
                    f"--pages uffd={self._where}: {err.strerror}; start python -m "
                    f"vmm.snapshot.uffd {self._snapshot.path} {self._where}"
                ) from None
        else:
            self._sock, other = socket.socketpair()
            with other:
                number = str(other.fileno())
                # -P: no module comes from the current directory, which may be anybody's; this
                # package comes from where it is now.
                program = [sys.executable, "-P", "-c", HANDLER, PACKAGES]
                if self._snapshot.is_trusted:
                    program.append("--trusted")
                program += [self._snapshot.path, "--fd", number]
                self._child = Child(
                    program,
                    _confinement(self._snapshot),
                    pass_fds=[other.fileno()],
                    name="uffd-handler",
                )
        sock = self._sock
        assert sock is not None
        line = json.dumps(request).encode() + b"\n"
        try:
            socket.send_fds(sock, [line], [uffd])
            sock.settimeout(ANSWER_WITHIN)
            answer = sock.recv(4096)
            sock.settimeout(None)
        except TimeoutError:
            raise HostError(f"the handler of {self._snapshot.path} does not answer") from None
        except OSError:
            answer = b""
        if not answer:
            said = self._child.said() if self._child is not None else ""
            raise HostError(f"the handler of {self._snapshot.path} ended at once: {said}")
        try:
            told = json_object.read(answer)
            if "error" not in told:
                self.pid = int(told["pid"])
                return
            said = str(told["error"])
        except (ValueError, TypeError, KeyError):
            said = "it does not answer as a handler does"
        raise SnapshotError(f"the handler of {self._snapshot.path}: {said}")

    def threads(self) -> list[Callable[[Callable[[], object]], object]]:
        return [*super().threads(), self._in_thread]

    def _in_thread(self, function: Callable[[], object]) -> None:
        """Have the thread that waits for the handler's end call `function`."""
        done = threading.Event()

        def call() -> None:
            try:
                function()
            finally:
                done.set()

        self._asked.append(call)
        os.eventfd_write(self._wake, 1)
        done.wait()

    def apply(self, machine: Machine) -> None:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        thread = threading.Thread(target=self._watch, args=(machine,), name="pager", daemon=True)
        machine.at_close(lambda: self._close(thread))
        machine.doubt = self._is_lost
        thread.start()
        super().apply(machine)

    def _watch(self, machine: Machine) -> None:
        """Wait for the handler's end, or what it has to say before."""
        sock = self._sock
        assert sock is not None
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while self._wake in (fds := [fd for fd, _ in poll.poll()]) and len(fds) == 1:
            os.eventfd_read(self._wake)
            while self._asked:
                self._asked.pop(0)()
        said = b""
        with suppress(OSError):  # it stays there: `_is_lost` may look after the handler has gone
            said = sock.recv(4096, socket.MSG_PEEK)
        if self._closing:
            return
        self._reason = _lost(said)
        machine.end(self._reason)
        # Now that no vCPU will enter the guest, who waits for a page may go on with zeroes.
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _is_lost(self) -> MachineExit | None:
        """Whether the handler has ended, which is then why the guest fails: this process may have
        waited for a page itself, and not have been able to do anything."""
        sock = self._sock
        if sock is None or self._closing or self._reason is not None:
            return self._reason
        try:
            return _lost(sock.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:  # it has not
            return None

    def _close(self, thread: threading.Thread) -> None:
        self._closing = True
        self._hang_up()
        thread.join()
        os.close(self._wake)

    def _hang_up(self) -> None:
        sock, child = self._sock, self._child
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if child is not None:
            child.close()
        if sock is not None:
            sock.close()


def _confinement(snapshot: Snapshot | None) -> Confinement:
    """What a handler needs: Python's own files, and the snapshot with those it is based on."""
    files = python_files()
    while snapshot is not None:
        files.append((snapshot.path, READ))
        snapshot = snapshot.base
    return Confinement(files, environment=PYTHON_ENVIRONMENT)


def _lost(said: bytes) -> MachineExit:
    """For what the handler said last, if anything."""
    why = "it has ended"
    with suppress(ValueError, KeyError, IndexError):
        why = str(json_object.read(said.splitlines()[0])["error"])[:LINE_MAX]
    text = f"pages of its snapshot that it had not read yet are lost: {why}"
    return MachineExit(exits.MEMORY_LOST, text)
