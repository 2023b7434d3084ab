"""The handler program that serves a snapshot's pages to machines, by userfaultfd.

    python -m vmm.snapshot.uffd DIR SOCKET      machines connect (vmm restore --pages uffd=SOCKET)
    python -m vmm.snapshot.uffd DIR --fd N      one machine, at the other end of socket N
    ... --trusted DIR ...                       bases elsewhere are opened, whoever made DIR

A machine sends a line of JSON, `{"regions": [[address, bytes, offset in the memory file], ...],
"snapshot": checksum}`, with the userfaultfd of its memory; the answer is `{"pid": N}` when it is
served, or `{"error": text}`, which may also come later. Each chunk is compared with its checksum
before it is handed over.

Each machine has a process of its own here that serves it. This one holds the userfaultfd too, and
does nothing else: if the other dies, who waits for a page waits on until the machine has been told
and has stopped its vCPUs. Without it the kernel would answer with zeroes.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress

from vmm.errors import SnapshotError, VmmError
from vmm.memory import userfault
from vmm.snapshot.index import CHUNK, crc
from vmm.snapshot.memory import within
from vmm.snapshot.store import Snapshot, close_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.snapshot.memory import Layer

USAGE = "usage: python -m vmm.snapshot.uffd DIR SOCKET | DIR --fd N [before DIR: --trusted]"
LINE_MAX = 1 << 16
ADDRESS_MAX = 1 << 57
"""Where user space ends, with five levels of page tables."""
GREETING_WITHIN = 5.0
"""Seconds that a machine has to say what it wants."""
GREETING_MAX = 64
"""Clients that have said nothing yet: one more, and the first of them is sent away."""
ACCEPT_AGAIN = 0.2
STOP_WITHIN = 2.0
"""Seconds a machine has to stop its vCPUs when it is told that pages are lost."""
END_WITHIN = 0.5
"""Seconds that the processes that serve machines have to end, at the end of this one."""


WRONG = (VmmError, OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError)
"""What reading a machine's request may raise."""


class Pages:
    """The chunks of a snapshot's memory, checked."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._layers = snapshot.layers(whole=True)
        self._paths = snapshot.memory_paths()

    def chunk(self, number: int, size: int) -> bytes:
        """Chunk `number` of RAM, `size` bytes. Raises SnapshotError."""
        first, *later = zip(self._layers, self._paths, strict=True)
        data = bytearray(self._read(*first, number, size))
        offset = number * CHUNK
        for layer, path in later:
            runs = list(within(layer.index.runs, offset, size))
            if runs:
                found = self._read(layer, path, number, size)
                for start, length in runs:
                    at = start - offset
                    data[at : at + length] = found[at : at + length]
        return bytes(data)

    @staticmethod
    def _read(layer: Layer, path: str, number: int, size: int) -> bytes:
        data = os.pread(layer.fd, size, number * CHUNK)
        if crc(data) != layer.index.sums.get(number, 0):
            raise SnapshotError(
                f"{path} is corrupt: the {CHUNK >> 10} KiB at byte {number * CHUNK:#x} do not have "
                "their checksum"
            )
        return data.ljust(size, b"\0")

    def close(self) -> None:
        close_all(self._layers)


def serve(pages: Pages, fd: int, sock: socket.socket, regions: list[list[int]], size: int) -> None:
    """Answer the faults of one machine, whose userfaultfd is `fd`, until it closes `sock`."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(sock, select.POLLIN)
    while sock.fileno() not in {ready for ready, _ in poll.poll()}:
        for address in userfault.faults(fd):
            for hva, length, offset in regions:
                if hva <= address < hva + length:
                    number = (offset + address - hva) // CHUNK
                    _give(pages, fd, regions, number, size)


def _give(pages: Pages, fd: int, regions: list[list[int]], number: int, size: int) -> None:
    start, end = number * CHUNK, min((number + 1) * CHUNK, size)
    data = pages.chunk(number, end - start)
    for hva, length, offset in regions:
        low, high = max(start, offset), min(end, offset + length)
        if low < high:
            userfault.fill(fd, hva + low - offset, data[low - start : high - start])


class Client:
    """One machine: its socket, its userfaultfd, and the process that serves it.

    It is silent at first, then served; when that process has ended it may be stopping; and it is
    over when it is closed and that process has been waited for. No call here waits for it.

    Attributes:
        until: when it must have said what it wants, or have stopped (time.monotonic); else None.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.uffd = -1
        self.pid = 0
        self.pidfd = -1
        self.until: float | None = time.monotonic() + GREETING_WITHIN

    @property
    def silent(self) -> bool:
        """Whether it has not said yet what it wants."""
        return self.pidfd < 0 and self.uffd < 0 and self.sock.fileno() >= 0

    @property
    def over(self) -> bool:
        """Whether nothing is left of it."""
        return self.pidfd < 0 and self.sock.fileno() < 0

    def register(self, poll: select.poll) -> None:
        """Have `poll` tell what `look` is to look at."""
        for fd in (self.pidfd, self.sock.fileno()):
            if fd >= 0:
                poll.register(fd, select.POLLIN)

    def look(self, ready: set[int], begin: Callable[[Client], None]) -> None:
        """Do what its descriptors in `ready`, and the time, ask for."""
        if self.pidfd in ready:
            self._ended()
        elif self.sock.fileno() in ready:
            if self.silent:
                begin(self)
            else:
                self.close()
        elif self.until is not None and time.monotonic() > self.until:
            if self.silent:
                self.tell(error="nothing was asked for in time")
            self.close()

    def begin(self, snapshot: Snapshot, pages: Pages, others: list[Client]) -> None:
        """Read what it wants, and have it served."""
        try:
            regions = self._greeting(snapshot)
            self._start(pages, regions, snapshot.memory_size, others)
            self.until = None
            self.tell(pid=self.pid)
        except WRONG as err:
            self.tell(error=str(err))
            self.close()

    def _greeting(self, snapshot: Snapshot) -> list[list[int]]:
        # Room for one descriptor has room for two, in whole words.
        flags = socket.MSG_CMSG_CLOEXEC
        data, control, _, _ = self.sock.recvmsg(LINE_MAX, socket.CMSG_SPACE(4), flags)
        for level, kind, part in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self.uffd, *more = array.array("i", part[: len(part) // 4 * 4])
                for fd in more:
                    os.close(fd)
        request = json.loads(data)
        if self.uffd < 0:
            raise ValueError("no userfaultfd came with the request")
        if request["snapshot"] != snapshot.checksum:
            raise SnapshotError(f"the handler serves {snapshot.path}, which is another snapshot")
        regions = [[int(number) for number in region] for region in request["regions"]]
        if any(len(region) != 3 or min(region) < 0 for region in regions):
            raise ValueError("a region is [address, bytes, offset]")
        for address, length, offset in regions:
            if offset + length > snapshot.memory_size or address + length > ADDRESS_MAX:
                raise ValueError("a region is beyond the snapshot's memory")
        return regions

    def _start(
        self, pages: Pages, regions: list[list[int]], size: int, others: list[Client]
    ) -> None:
        self.pid = os.fork()
        if self.pid:
            try:
                self.pidfd = os.pidfd_open(self.pid)
            except OSError:
                self.sock.shutdown(socket.SHUT_RDWR)
                os.waitpid(self.pid, 0)
                raise
            return
        status = 1
        try:
            for other in others:  # theirs must close when their own processes end
                if other is not self:
                    other.drop()
            serve(pages, self.uffd, self.sock, regions, size)
            status = 0
        except VmmError as err:
            self.tell(error=str(err))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)

    def tell(self, **message: object) -> None:
        with suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def _ended(self) -> None:
        """The process that serves it has ended."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.pid, self.pidfd = 0, -1
        code = os.waitstatus_to_exitcode(status)
        how = f"killed by signal {-code}" if code < 0 else f"status {code}"
        if self.sock.fileno() >= 0:
            self.tell(error=f"the process that served them, {how}, has ended")
            self.until = time.monotonic() + STOP_WITHIN  # it closes when its vCPUs stop

    def close(self) -> None:
        """The machine has ended, or is about to; its process sees that and ends."""
        self.until = None
        with suppress(OSError):  # a signal would be refused: see vmm.sandbox.helper
            self.sock.shutdown(socket.SHUT_RDWR)
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1
        self.sock.close()

    def drop(self) -> None:
        """Close its descriptors in this process alone."""
        for fd in (self.uffd, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.uffd = self.pidfd = -1
        self.sock.close()


def watch(snapshot: Snapshot, listener: socket.socket | None, first: socket.socket | None) -> None:
    """Serve clients: the `first`, and those that connect; without a listener, until the last."""
    pages = Pages(snapshot)
    clients: list[Client] = []
    if first is not None:
        clients.append(Client(first))

    def begin(client: Client) -> None:
        client.begin(snapshot, pages, clients)

    try:
        while clients or listener is not None:
            ready = _wait(clients, listener)
            for client in clients:
                client.look(ready, begin)
            if listener is not None and listener.fileno() in ready:
                _accept(clients, listener)
            clients = [client for client in clients if not client.over]
    finally:
        limit = time.monotonic() + END_WITHIN
        for client in clients:
            client.close()
        while clients and time.monotonic() < limit:  # a process that is stopped ends later
            ready = _wait(clients, None, limit)
            for client in clients:
                client.look(ready, begin)
            clients = [client for client in clients if not client.over]


def _wait(
    clients: list[Client], listener: socket.socket | None, limit: float | None = None
) -> set[int]:
    """The descriptors that have something, once there are any or somebody's time is over."""
    poll = select.poll()
    if listener is not None:
        poll.register(listener, select.POLLIN)
    limits = [] if limit is None else [limit]
    for client in clients:
        client.register(poll)
        if client.until is not None:
            limits.append(client.until)
    left = max(min(limits) - time.monotonic(), 0) * 1000 + 1 if limits else None
    return {fd for fd, _ in poll.poll(left)}


def _accept(clients: list[Client], listener: socket.socket) -> None:
    try:
        sock, _ = listener.accept()
    except OSError:  # gone again, or no descriptors for now: those served go on
        time.sleep(ACCEPT_AGAIN)
        return
    silent = [client for client in clients if client.silent]
    if len(silent) >= GREETING_MAX:
        silent[0].tell(error="too many others have connected and asked for nothing")
        silent[0].close()
    clients.append(Client(sock))


def main(argv: list[str]) -> int:
    """The program; its exit status."""
    trusted = True if argv[:1] == ["--trusted"] else None
    argv = argv[1:] if trusted else argv
    if len(argv) not in (2, 3) or (len(argv) == 3 and argv[1] != "--fd"):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        with Snapshot(argv[0], trusted=trusted) as snapshot:
            if len(argv) == 3:
                watch(snapshot, None, socket.socket(fileno=int(argv[2])))
                return 0
            from vmm.virtio import unix

            listener, identity = unix.listen(argv[1], argv[1])
            try:
                listener.setblocking(True)
                watch(snapshot, listener, None)
            finally:
                unix.remove(argv[1], identity)
    except VmmError as err:
        print(f"vmm.snapshot.uffd: {err}", file=sys.stderr)
        return err.exit_status
    except KeyboardInterrupt:
        pass
    return 0


def command() -> None:
    """The program, with the arguments that it was started with."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    command()
