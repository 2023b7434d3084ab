"""The vhost-user protocol, front-end side (QEMU, docs/interop/vhost-user.rst)."""

from __future__ import annotations

import array
import os
import socket
import struct
import time
from _thread import RLock

from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from vmm.child import Child

    T = TypeVar("T")

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
GET_CONFIG = 24
SET_CONFIG = 25
GET_INFLIGHT_FD = 31
SET_INFLIGHT_FD = 32

F_PROTOCOL_FEATURES = 30
"""A feature bit of vhost-user's own, never shown to a driver."""
PROTOCOL_F_MQ = 0
PROTOCOL_F_REPLY_ACK = 3
PROTOCOL_F_CONFIG = 9
PROTOCOL_F_INFLIGHT_SHMFD = 12

VERSION = 1
REPLY = 1 << 2
NEED_REPLY = 1 << 3
PAYLOAD_MAX = 4096
CONFIG_MAX = 256
FDS_MAX = 8
"""Descriptors that may come with one answer before it is given up on."""
_HEADER = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_VRING = struct.Struct("<II")
_ADDRESSES = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")
_CONFIG = struct.Struct("<III")
TIMEOUT = 20.0
"""Seconds a back end has to answer, to the last byte; one that does not is taken for dead."""
LOOK = 0.05
"""Seconds between looks whether it has less."""
SAYS_WITHIN = 1.0
"""Seconds that a program that has hung up has to end, and to say why."""


class BackEndGone(HostError):
    """The back end closed the connection, or does not answer.

    Attributes:
        silent: it has not closed it.
    """

    silent = False

    def reason(self, child: Child) -> str:
        """Why it is gone, in the words of the program that it is, where that said something."""
        if self.silent:
            return child.said() or "it does not answer in time"
        if child.wait(SAYS_WITHIN):
            return child.said() or f"it {child.how()}"
        return child.said() or "it has closed its connection"


class Connection:
    """A connected socket to a back end, and the messages a front end sends.

    `name` is what messages call the back end. All methods raise BackEndGone where it is gone.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.name = name
        self.ack = False
        """VHOST_USER_PROTOCOL_F_REPLY_ACK was negotiated."""
        self.over: Callable[[], bool] = bool
        """Whether nobody wants answers any more."""
        self._lock = RLock()
        self._limit = 0.0
        """When the answer that is waited for must be there, of time.monotonic; 0.0: there is
        none."""
        sock.settimeout(TIMEOUT)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def hurry(self, within: float) -> None:
        """Give a back end that has not answered so many seconds more; from any thread."""
        if self._limit:
            self._limit = min(self._limit, time.monotonic() + within)

    # --- messages ---------------------------------------------------------------------------------

    def get_u64(self, request: int) -> int:
        """A request whose answer is a number."""
        return int(_U64.unpack(self._ask(request, b"", _U64.size))[0])

    def set_u64(self, request: int, value: int) -> None:
        """A request with a number."""
        self._tell(request, _U64.pack(value))

    def set_owner(self) -> None:
        """The session begins."""
        self._tell(SET_OWNER, b"")

    def set_mem_table(self, regions: Sequence[tuple[int, int, int, int]]) -> None:
        """(gpa, bytes, our virtual address, descriptor) of each memory region."""
        payload = struct.pack("<II", len(regions), 0)
        for gpa, size, hva, _ in regions:
            payload += _REGION.pack(gpa, size, hva, 0)
        self._tell(SET_MEM_TABLE, payload, [fd for *_, fd in regions])

    def set_vring(self, request: int, index: int, value: int) -> None:
        """SET_VRING_NUM, _BASE or _ENABLE."""
        self._tell(request, _VRING.pack(index, value))

    def get_vring_base(self, index: int) -> int:
        """Stop queue `index`; where it stood."""
        answer = self._ask(GET_VRING_BASE, _VRING.pack(index, 0), _VRING.size)
        return int(_VRING.unpack(answer)[1])

    def set_vring_addr(self, index: int, desc: int, used: int, avail: int) -> None:
        """Where the ring is, in our virtual addresses."""
        self._tell(SET_VRING_ADDR, _ADDRESSES.pack(index, 0, desc, used, avail, 0))

    def set_vring_fd(self, request: int, index: int, fd: int) -> None:
        """SET_VRING_KICK or _CALL with an eventfd."""
        self._tell(request, _U64.pack(index), [fd])

    def get_config(self, size: int) -> bytes:
        """The device's configuration space."""
        payload = _CONFIG.pack(0, size, 0) + bytes(size)
        return self._ask(GET_CONFIG, payload, len(payload))[_CONFIG.size :]

    def set_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to it."""
        self._tell(SET_CONFIG, _CONFIG.pack(offset, len(data), 0) + data)

    def get_inflight(self, description: bytes) -> tuple[int, bytes]:
        """Have a record of requests under way made: its descriptor, and its description."""
        with self._lock:
            self._send(GET_INFLIGHT_FD, VERSION, description, ())
            fds: list[int] = []
            try:
                answer = self._receive(GET_INFLIGHT_FD, len(description), fds)
                if len(fds) != 1:
                    raise BackEndGone(
                        f"{self.name} gave {len(fds)} descriptors for inflight, not one"
                    )
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise
            return fds[0], answer

    def set_inflight(self, fd: int, description: bytes) -> None:
        """Use this record."""
        self._tell(SET_INFLIGHT_FD, description, [fd])

    # --- transport --------------------------------------------------------------------------------

    def _tell(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        with self._lock:
            flags = VERSION | (NEED_REPLY if self.ack else 0)
            self._send(request, flags, payload, fds)
            if self.ack and _U64.unpack(self._receive(request, _U64.size))[0]:
                raise BackEndGone(f"{self.name} refused vhost-user request {request}")

    def _ask(self, request: int, payload: bytes, size: int) -> bytes:
        with self._lock:
            self._send(request, VERSION, payload, ())
            return self._receive(request, size)

    def _gone(self, err: OSError) -> BackEndGone:
        if isinstance(err, ConnectionError):
            return BackEndGone(f"{self.name} has closed its connection")
        if not isinstance(err, TimeoutError):
            return BackEndGone(f"{self.name}: {err}")
        gone = BackEndGone(f"{self.name} does not answer in time")
        gone.silent = True
        return gone

    def _send(self, request: int, flags: int, payload: bytes, fds: Sequence[int]) -> None:
        message = _HEADER.pack(request, flags, len(payload)) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._limit = time.monotonic() + TIMEOUT
        try:
            sent = self._patiently(lambda: self.sock.sendmsg([message], rights))
            while sent < len(message):
                rest = message[sent:]
                sent += self._patiently(lambda: self.sock.send(rest))  # noqa: B023 (at once)
        finally:
            self._limit = 0.0

    def _patiently(self, call: Callable[[], T]) -> T:
        """What `call`, of the socket, gives before the limit. Raises BackEndGone."""
        while True:
            if self._limit < time.monotonic() or self.over():
                raise self._gone(TimeoutError())
            self.sock.settimeout(LOOK)
            try:
                return call()
            except TimeoutError:
                continue
            except OSError as err:
                raise self._gone(err) from err

    def _receive(self, request: int, size: int, fds: list[int] | None = None) -> bytes:
        self._limit = time.monotonic() + TIMEOUT
        try:
            number, flags, length = _HEADER.unpack(self._exactly(_HEADER.size, fds))
            if number != request or not flags & REPLY or length > PAYLOAD_MAX:
                raise BackEndGone(f"{self.name}: answered request {request} with {number}")
            payload = self._exactly(length)
        finally:
            self._limit = 0.0
        if length != size:
            raise BackEndGone(f"{self.name}: {length} bytes answer request {request}, not {size}")
        return payload

    def _with_fds(self, size: int, fds: list[int]) -> bytes:
        """Receive up to `size` bytes, and a descriptor, where one comes with them. (`recv_fds` of
        the socket module ignores its flags: a program started meanwhile would inherit it.)"""
        room = socket.CMSG_LEN(4)
        piece, ancillary, _, _ = self.sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds += array.array("i", data[: len(data) // 4 * 4])
        return piece

    def _exactly(self, size: int, fds: list[int] | None = None) -> bytes:
        data = b""
        while len(data) < size:
            left = size - len(data)
            if fds is None:
                piece = self._patiently(lambda: self.sock.recv(left))  # noqa: B023 (at once)
            else:
                into = fds
                piece = self._patiently(lambda: self._with_fds(left, into))  # noqa: B023
                if len(fds) > FDS_MAX:
                    raise BackEndGone(f"{self.name} sends descriptors without end")
            if not piece:
                raise BackEndGone(f"{self.name} has closed its connection")
            data += piece
        return data
