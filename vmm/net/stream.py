"""Frames over a stream socket, as QEMU's `-netdev stream` and passt have them: four bytes of
length, big-endian, then the frame. No virtio-net header passes, so each frame is whole by itself.

Both directions are batched: many frames are one sendmsg(2), or one recv(2) into a buffer of ours.
"""

from __future__ import annotations

import os
import struct
from _socket import AF_UNIX, MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_CLOEXEC, SOCK_STREAM
from _socket import socket as Socket  # the C type: the socket module costs a start 3 ms

from vmm import socket_owner
from vmm.errors import UsageError
from vmm.forked import drop_in_child
from vmm.net.port import GONE, Backend, LinkLost, Port, scatter
from vmm.virtio.net_spec import FRAME_MAX, HEADER_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTH = struct.Struct(">I")
STAGE = 512 << 10
"""Bytes read at once; more than the largest frame."""
GATHER_BYTES = 192 << 10
GATHER_VIEWS = 960
"""What one sendmsg takes: about a socket's buffer; less than IOV_MAX."""
CONNECT_WITHIN = 20.0
"""Seconds to wait for a program whose queue of connections is full."""
ADDRESS_MAX = 107
"""Bytes of a socket's path that its address has room for."""
_HEADER = bytes(HEADER_SIZE)
_ROOM = HEADER_SIZE - LENGTH.size
"""Before the first frame's length, for its header."""


class StreamPort(Port):
    """Frames over connected socket `sock`, which it closes.

    Args:
        header: the virtio-net header the guest sees before each frame.
    """

    def __init__(self, sock: Socket, header: bytes = _HEADER) -> None:
        self._sock = sock
        self.fd = sock.fileno()
        drop_in_child(self)
        self.header = header
        self._stage = bytearray(STAGE)
        self._view = memoryview(self._stage)
        self._start = self._end = _ROOM
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._rest = b""
        for option in (7, 8):  # SO_SNDBUF, SO_RCVBUF: as much as the host allows
            sock.setsockopt(1, option, 4 << 20)

    # --- receiving --------------------------------------------------------------------------------

    def read(self, views: list[memoryview]) -> int:
        if not self._whole() and not self._fill():
            return 0
        (size,) = LENGTH.unpack_from(self._stage, self._start)
        begin = self._start + 4 - HEADER_SIZE
        # The header goes before the frame, over its length and the end of the frame before it.
        self._stage[begin : begin + HEADER_SIZE] = self.header
        size += HEADER_SIZE
        self._start = begin + size
        frame, first = self._view[begin : begin + size], views[0]
        if len(first) >= size:
            first[:size] = frame
        else:
            scatter(views, frame)
        return int(size)

    def _whole(self) -> bool:
        """Whether a whole frame is in the buffer."""
        have = self._end - self._start
        if have < 4:
            return False
        (size,) = LENGTH.unpack_from(self._stage, self._start)
        if size > FRAME_MAX:
            raise LinkLost(f"it sent a frame of {size} bytes")
        return bool(have >= 4 + size)

    def _fill(self) -> bool:
        """Read what is there; whether a whole frame is in the buffer then."""
        have = self._end - self._start
        if have and self._start > _ROOM:
            self._stage[_ROOM : _ROOM + have] = self._stage[self._start : self._end]
        self._start, self._end = _ROOM, _ROOM + have
        try:
            got = self._sock.recv_into(self._view[self._end :], 0, MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as err:
            raise LinkLost(GONE if isinstance(err, ConnectionError) else err.strerror) from err
        if not got:
            raise LinkLost(GONE)
        self._end += got
        return self._whole()

    # --- sending ----------------------------------------------------------------------------------

    def write(self, views: Sequence[memoryview]) -> bool:
        return self.append(b"", views, HEADER_SIZE)

    def append(self, head: bytes, views: Sequence[memoryview], skip: int) -> bool:
        """Send the frame that is `head`, then what follows the first `skip` bytes of `views`; as
        `write`."""
        out, before = self._out, len(self._out)
        size = len(head)
        out.append(b"")
        for view in views:
            if skip:
                part = view[skip:]
                skip -= len(view) - len(part)
                if not len(part):
                    continue
                view = part
            out.append(view)
            size += len(view)
        out[before] = LENGTH.pack(size) + head
        self._out_bytes += size + 4
        if self._out_bytes >= GATHER_BYTES or len(out) >= GATHER_VIEWS:
            return self.flush()
        return True

    def flush(self) -> bool:
        if self._rest or not self._out:
            return not self._rest
        out, total = self._out, self._out_bytes
        self._out, self._out_bytes = [], 0
        sent = self._send(out[:1024])
        if sent < total:  # the views are the guest's again when we return
            self._rest = b"".join(out)[sent:]
            self.blocked = True
        return not self.blocked

    def resume(self) -> None:
        sent = self._send([self._rest])
        self._rest = self._rest[sent:]
        self.blocked = bool(self._rest)

    def _send(self, parts: Sequence[bytes | memoryview]) -> int:
        try:
            return self._sock.sendmsg(parts, (), MSG_DONTWAIT | MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as err:
            self._rest, self.blocked = b"", False
            raise LinkLost(GONE if isinstance(err, ConnectionError) else err.strerror) from err

    def close(self) -> None:
        """Close the socket."""
        self.fd = -1
        self._sock.close()


class StreamBackend(Backend):
    """A port over one connected stream socket."""

    def __init__(
        self, sock: Socket, *, mtu: int, peer: str, port: StreamPort | None = None
    ) -> None:
        super().__init__()
        self.mtu = mtu
        self.peer = peer
        self._port = port or StreamPort(sock)
        self.peer_fd = sock.fileno()
        self.ports.append(self._port)

    def close(self) -> None:
        self._port.close()


def connect(path: str, *, mtu: int = 0, what: str) -> StreamBackend:
    """Connect to the UNIX socket `path`. Raises UsageError."""
    sock = Socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        sock.settimeout(CONNECT_WITHIN)  # where the program takes no more connections
        if len(os.fsencode(path)) > ADDRESS_MAX:
            from vmm.virtio import unix

            unix.check_path(what, path)
            unix.connect(sock, path)
        else:
            sock.connect(path)
            socket_owner.check(sock, path)
        sock.settimeout(None)
    except (OSError, ValueError) as err:
        sock.close()
        reason = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
        raise UsageError(
            f"{what}: {reason}; give the socket of a program that listens, as passt --socket does"
        ) from err
    return StreamBackend(sock, mtu=mtu, peer=f"socket {path}")
