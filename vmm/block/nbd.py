"""Images that an NBD server reads and writes for this process's own disk device: a
qemu-storage-daemon (vmm.block.storage_daemon).

The NBD protocol (its doc/proto.md) over UNIX sockets, with simple replies: a worker takes one of a
few connections for a request and waits for the answer on it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from _queue import SimpleQueue
from contextlib import suppress

from vmm.block.vector import cut
from vmm.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.child import Child
    from vmm.errors import VmmError

CONNECTIONS = 8
"""As many as a disk has workers (vmm.virtio.blk)."""
TRANSFER_MAX = 32 << 20
"""Bytes in one read or write: what every server takes."""
RANGE_MAX = 1 << 31
"""Bytes in one trim or write zeroes."""
VIEWS_MAX = 512
"""Buffers in one sendmsg(2) or recvmsg(2)."""
ENDED_WITHIN = 5.0
"""Seconds that a server has to end, before another one opens its image."""
ENDS_WITHIN = 0.5
"""Seconds that a server of ours, which has hung up, has to end, for how it did to be told."""
TIMEOUT = 20.0
"""Seconds the server has to open the image and greet."""

MAGIC, OPTION_MAGIC, REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_GO, REP_ACK, REP_INFO, INFO_EXPORT = 7, 1, 3, 0
OPTION_BYTES_MAX = 4096
SIZE_MAX = (1 << 63) - 1
"""Bytes of a disk: what a file's offset can be."""
FLAG_TRIM, FLAG_WRITE_ZEROES, FLAG_MULTI_CONN = 1 << 5, 1 << 6, 1 << 8
CMD_READ, CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES = 0, 1, 3, 4, 6
CMD_NO_HOLE = 1 << 1
REQUEST_MAGIC, SIMPLE_MAGIC = 0x25609513, 0x67446698
_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IIQ")
_OPTION_REPLY = struct.Struct(">QIII")
EXPORT = "disk"


class NbdImage:
    """An image as `vmm.block.raw.RawImage` is one, read and written by an NBD server.

    Args:
        path: for messages.
        connections: sockets that a server accepts, or has accepted; closed with the image.
        readonly: nothing is written.
        flushes: False: flushes are not carried out.
        child: the server's process, ended with the image.
        again: starts another server, after the first has ended, that has the image grow to so many
            bytes: our ends of connections to it, its process, and what it could not do.

    Raises:
        HostError: the server does not answer, or not as it should.
    """

    frozen = False
    direct = True
    """Every request may wait: none is made in a queue's own thread."""

    def __init__(
        self,
        path: str,
        connections: Sequence[socket.socket],
        *,
        readonly: bool = False,
        flushes: bool = True,
        child: Child | None = None,
        again: Callable[[int], tuple[list[socket.socket], Child, VmmError | None]] | None = None,
    ) -> None:
        self.path = path
        self.readonly = readonly
        self.flushes = flushes
        self._child = child
        self._again = again
        self._closed = False
        self._begin(connections)

    def _begin(self, connections: Sequence[socket.socket]) -> None:
        self._connections = list(connections)
        self._free: SimpleQueue[socket.socket] = SimpleQueue()
        self.size = 0
        try:
            limit = time.monotonic() + TIMEOUT
            for number, connection in enumerate(self._connections):
                self.size, flags = _greet(connection, limit)
                connection.settimeout(None)
                if number and not flags & FLAG_MULTI_CONN:
                    break  # a flush would not be one of the others' writes
                self._free.put(connection)
        except (OSError, ValueError, struct.error) as err:
            self._hang_up()
            raise HostError(f"--drive {self.path}: {err}") from err
        self._trims = bool(flags & FLAG_TRIM)
        self._zeroes = bool(flags & FLAG_WRITE_ZEROES)

    def __repr__(self) -> str:
        return f"NbdImage({self.path!r}, {self.size} bytes)"

    @property
    def peer_fd(self) -> int:
        """A socket that hangs up when the server has ended."""
        return self._connections[0].fileno()

    @property
    def session(self) -> object:
        """Stands for the server of now: `grow` begins with another."""
        return self._connections

    def lost(self, session: object) -> bool:
        """Whether the server of `session` was not ended, or replaced, by this object."""
        return session is self._connections

    def why_gone(self) -> str:
        """What is known of why the server has gone."""
        if self._child is None or not self._child.wait(ENDS_WITHIN):
            return "the NBD server has ended"
        return f"{self._child.name} {self._child.how()}"

    def _hang_up(self) -> None:
        connections, self._connections = self._connections, []
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close(self) -> None:
        """Hang up and end the server; harmless twice."""
        if not self._closed:
            self._closed = True
            self._hang_up()
            if self._child is not None:
                self._child.close()

    def found(self) -> int:
        """Bytes that the disk has now: nobody else enlarges an image in use."""
        return self.size

    def grow(self, size: int) -> None:
        """Have `size` bytes, no fewer than now, by another server. While nobody reads or writes.
        Raises UsageError, HostError."""
        if size == self.size:
            return
        if self._again is None or self.readonly:
            raise UsageError(f"{self.path}: this image is only read, and cannot grow")
        self._hang_up()
        if self._child is not None:
            self._child.close(patience=ENDED_WITHIN)
        connections, self._child, failure = self._again(size)
        self._begin(connections)
        if failure is not None:
            raise failure

    # --- I/O: all raise OSError -------------------------------------------------------------------

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from byte `offset`."""
        for part, at, size in _parts(views, offset):
            self._request(CMD_READ, 0, at, size, into=part)

    def read_cached(self, views: Sequence[memoryview], offset: int, size: int) -> bool:
        """False: see `direct`."""
        return False

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views` at byte `offset`."""
        for part, at, size in _parts(views, offset):
            self._request(CMD_WRITE, 0, at, size, out=part)

    def flush(self) -> None:
        """Return when all that was written is on stable storage."""
        if self.flushes and not self.readonly:
            self._request(CMD_FLUSH, 0, 0, 0)

    def discard(self, offset: int, size: int) -> None:
        """The contents are no longer needed; what is read there later may be anything."""
        if self._trims:
            for at in range(offset, offset + size, RANGE_MAX):
                self._request(CMD_TRIM, 0, at, min(RANGE_MAX, offset + size - at))

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Zeroes from `offset` on, giving the space back if `unmap`."""
        if not self._zeroes:
            zeroes = memoryview(bytes(min(size, 1 << 20)))
            for at in range(offset, offset + size, len(zeroes)):
                self.write([zeroes[: min(len(zeroes), offset + size - at)]], at)
            return
        flags = 0 if unmap else CMD_NO_HOLE
        for at in range(offset, offset + size, RANGE_MAX):
            self._request(CMD_WRITE_ZEROES, flags, at, min(RANGE_MAX, offset + size - at))

    def _request(
        self,
        kind: int,
        flags: int,
        offset: int,
        size: int,
        *,
        out: Sequence[memoryview] = (),
        into: Sequence[memoryview] = (),
    ) -> None:
        connection = self._free.get()
        try:
            head = _REQUEST.pack(REQUEST_MAGIC, flags, kind, 0, offset, size)
            _send(connection, [memoryview(head), *out])
            magic, error, handle = _SIMPLE.unpack(_exactly(connection, _SIMPLE.size))
            if magic != SIMPLE_MAGIC or handle:
                with suppress(OSError):  # whatever comes next on it is no answer either
                    connection.shutdown(socket.SHUT_RDWR)
                raise OSError(errno.EIO, "the NBD server answers out of order")
            if error:
                number = error if error in errno.errorcode else errno.EIO
                raise OSError(number, os.strerror(number))
            _receive(connection, into)
        finally:
            self._free.put(connection)


def _parts(views: Sequence[memoryview], offset: int) -> list[tuple[Sequence[memoryview], int, int]]:
    """`views` in parts of TRANSFER_MAX bytes at most: (views, byte offset, size)."""
    left = sum(map(len, views))
    found: list[tuple[Sequence[memoryview], int, int]] = []
    while left > TRANSFER_MAX:
        part, views = cut(views, TRANSFER_MAX)
        found.append((part, offset, TRANSFER_MAX))
        offset += TRANSFER_MAX
        left -= TRANSFER_MAX
    return [*found, (views, offset, left)]


def _send(connection: socket.socket, views: Sequence[memoryview]) -> None:
    left = sum(map(len, views))
    while left:
        try:
            done = connection.sendmsg(views[:VIEWS_MAX])
        except OSError as err:
            raise _gone() from err
        left -= done
        if left:
            _, views = cut(views, done)


def _receive(connection: socket.socket, views: Sequence[memoryview]) -> None:
    left = sum(map(len, views))
    while left:
        try:
            done = connection.recvmsg_into(views[:VIEWS_MAX])[0]
        except OSError as err:
            raise _gone() from err
        if not done:
            raise _gone()
        left -= done
        if left:
            _, views = cut(views, done)


def _exactly(connection: socket.socket, size: int, limit: float | None = None) -> bytes:
    """`size` bytes; all of them before the time `limit`, where there is one."""
    data = bytearray(size)
    if limit is not None:
        view = memoryview(data)
        while view:
            connection.settimeout(max(limit - time.monotonic(), 0.001))
            view = view[_some(connection, view) :]
        return bytes(data)
    _receive(connection, [memoryview(data)])
    return bytes(data)


def _some(connection: socket.socket, view: memoryview) -> int:
    """Receive what is there into `view`; how many bytes."""
    try:
        done = connection.recv_into(view)
    except OSError as err:
        raise _gone() from err
    if not done:
        raise _gone()
    return done


def _gone() -> OSError:
    return OSError(errno.EIO, "the NBD server has ended")


def _greet(connection: socket.socket, limit: float) -> tuple[int, int]:
    """Begin a session, until the time `limit`: the export's size in bytes, and its flags."""
    greeting = _exactly(connection, 18, limit)
    if greeting[:16] != MAGIC + OPTION_MAGIC or not greeting[17] & FIXED_NEWSTYLE:
        raise ValueError("not an NBD server's greeting")
    name = EXPORT.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    _send(connection, [memoryview(
        struct.pack(">I", FIXED_NEWSTYLE | NO_ZEROES)
        + OPTION_MAGIC + struct.pack(">II", OPT_GO, len(data)) + data
    )])  # fmt: skip
    size = flags = 0
    for _ in range(100):
        magic, option, kind, length = _OPTION_REPLY.unpack(_exactly(connection, 20, limit))
        if magic != REPLY_MAGIC or option != OPT_GO or length > OPTION_BYTES_MAX:
            raise ValueError("not an NBD server's answer")
        answer = _exactly(connection, length, limit)
        if kind == REP_ACK:
            if size > SIZE_MAX:
                raise ValueError(f"a disk of {size} bytes")
            return size, flags
        if kind != REP_INFO:
            raise ValueError(f"no export: {answer.decode(errors='replace')[:200]!r}")
        if answer[:2] == struct.pack(">H", INFO_EXPORT):
            size, flags = struct.unpack_from(">QH", answer, 2)
    raise ValueError("an NBD server that comes to no end")
