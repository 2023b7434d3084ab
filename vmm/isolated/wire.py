"""Frames between a program and the process of its machine: JSON, bytes and descriptors, bounded.

A frame is a header (bytes of text, bytes of data, descriptors), the text (JSON), the data. The
descriptors come with the header's first byte. Each side takes a frame of the other for hostile:
what does not fit ends the connection with a `WireError`.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
import time

from vmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

HEADER = struct.Struct("<IIB")
TEXT_MAX = 256 << 10
"""Bytes of a frame's JSON."""
DATA_MAX = 1 << 20
"""Bytes of a frame's data."""
FDS_MAX = 8
"""Descriptors of a frame."""
SLICE = 0.05
"""Seconds of one wait; see `Patience`."""


class WireError(VmmError):
    """The other side broke the rules of this module, or has gone."""


class LateError(VmmError):
    """The other side did not answer in time."""


class Patience:
    """How long the other side may take.

    The time is counted in waits of SLICE seconds: on a host so busy that a wait of 50 ms takes 300,
    the other side gets no turn either, and has as much longer.

    Args:
        seconds: on a host that is not busy; None: as long as it takes.
        suspended: asked after each wait; while it is true (a function of the program runs, for
            which the other side waits), no time is counted.
    """

    __slots__ = ("_left", "_suspended", "seconds")

    def __init__(
        self, seconds: float | None = None, suspended: Callable[[], bool] | None = None
    ) -> None:
        self.seconds = seconds
        self._left = -1.0 if seconds is None else max(seconds / SLICE, 1.0)
        self._suspended = suspended

    def wait(self, sock: socket.socket, event: int) -> None:
        """Wait until `sock` can be read (select.POLLIN) or written to. Raises LateError."""
        fd = sock.fileno()
        if fd < 0:
            raise WireError("the connection is closed")
        poll = select.poll()
        poll.register(fd, event)
        while True:
            begun = time.monotonic()
            ready = poll.poll(SLICE * 1000)
            if not ready and sock.fileno() != fd:
                raise WireError("the connection is closed")
            if self._left >= 0 and not (self._suspended is not None and self._suspended()):
                # A wait that ends early counts too: a byte now and then is no answer.
                self._left -= min((time.monotonic() - begun) / SLICE, 1.0)
                if self._left <= 0:
                    raise LateError(f"no answer within {self.seconds:g} s")
            if ready:
                return


class Channel:
    """One end of a connection; one frame at a time in each direction.

    Args:
        sock: a connected stream socket of the UNIX domain; closed with the channel.
    """

    __slots__ = ("__weakref__", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def close(self) -> None:
        """Harmless twice."""
        self.sock.close()

    def send(
        self,
        message: object,
        data: bytes | memoryview = b"",
        fds: Sequence[int] = (),
        patience: Patience | None = None,
    ) -> None:
        """Send a frame. Raises WireError, LateError."""
        text = dumps(message)
        if len(text) > TEXT_MAX or len(data) > DATA_MAX or len(fds) > FDS_MAX:
            raise WireError(f"a frame of {len(text)} + {len(data)} bytes, {len(fds)} descriptors")
        patience = patience or Patience()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        head = HEADER.pack(len(text), len(data), len(fds)) + text
        for part in (head, data):
            view = memoryview(part)
            while view:
                patience.wait(self.sock, select.POLLOUT)
                try:
                    done = self.sock.sendmsg(
                        [view], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                    )
                except BlockingIOError:
                    continue
                except OSError as err:
                    raise WireError(f"the other side has gone: {err.strerror}") from None
                rights = []
                view = view[done:]

    def receive(self, patience: Patience | None = None) -> tuple[Any, bytes, list[int]]:
        """The message, the data and the descriptors of the next frame; they are the caller's.

        Raises:
            WireError: the other side has gone, or sends what is no frame.
            LateError: it takes longer than `patience`.
        """
        patience = patience or Patience()
        fds: list[int] = []
        try:
            head = self._take(HEADER.size, patience, fds)
            text_size, data_size, count = HEADER.unpack(head)
            if text_size > TEXT_MAX or data_size > DATA_MAX or count > FDS_MAX:
                raise WireError(f"a frame of {text_size} + {data_size} bytes, {count} descriptors")
            message = loads(self._take(text_size, patience, fds))
            data = self._take(data_size, patience, fds)
            if len(fds) != count:
                raise WireError(f"{len(fds)} descriptors in place of {count}")
        except BaseException:
            close_all(fds)
            raise
        return message, bytes(data), fds

    def _take(self, size: int, patience: Patience, fds: list[int]) -> bytearray:
        found = bytearray(size)
        view, space = memoryview(found), socket.CMSG_SPACE(FDS_MAX * 4)
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        while view:
            patience.wait(self.sock, select.POLLIN)
            try:
                done, rights, told, _ = self.sock.recvmsg_into([view], space, flags)
            except BlockingIOError:
                continue
            except OSError as err:
                raise WireError(f"the other side has gone: {err.strerror}") from None
            for level, kind, content in rights:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    came = array.array("i")
                    came.frombytes(content[: len(content) - len(content) % came.itemsize])
                    fds += came
            if told & socket.MSG_CTRUNC or len(fds) > FDS_MAX:
                raise WireError(f"more than {FDS_MAX} descriptors")
            if not done:
                raise WireError("the other side has gone")
            view = view[done:]
        return found


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a new connection."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def close_all(fds: Sequence[int]) -> None:
    """Close each."""
    for fd in fds:
        os.close(fd)


def dumps(value: object) -> bytes:
    """JSON of `value`, as UTF-8. Raises TypeError, ValueError where it has no such form."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()


def loads(text: bytes | bytearray) -> Any:
    """What the JSON `text` says. Raises WireError."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:
        raise WireError(f"what came is no JSON: {type(err).__name__}") from None


def _no_constant(name: str) -> object:
    raise ValueError(name)
