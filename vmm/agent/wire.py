"""The protocol between host and agent: frames, streams with windows; no input or output here.

A frame is 8 bytes (type, stream, zero, size; little-endian) and `size` bytes; vmm/agent/agent.h is
the other side. What the guest sends is hostile: every length is checked, no stream can bring more
than its window, and what is wrong raises AgentError, which ends that connection only.
"""

from __future__ import annotations

import errno
import os
import struct

from vmm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VERSION = 1
MAGIC = 0x414D4D56
FRAME = struct.Struct("<BBHI")
HELLO = struct.Struct("<IHH")
SEED = 32
"""Bytes that the host answers a machine's first hello with, for the guest's random numbers."""
_REQUEST = struct.Struct("<IHBBHHII")
_U32 = struct.Struct("<I")
_PAIR = struct.Struct("<II")

REQUEST, DATA, END, CREDIT, SIGNAL, RESIZE = 1, 2, 3, 4, 5, 6
STARTED, FAILED, EXITED = 16, 17, 18
IN, OUT, ERR = 0, 1, 2
EXECUTE, PUT, GET, POWER_OFF = 1, 2, 3, 4
NULL_IN, NULL_OUT, NULL_ERR, ERR_TO_OUT, TERMINAL, USER = 1, 2, 4, 8, 16, 32
CANNOT_EXECUTE, CANNOT_CHANGE_DIRECTORY, CANNOT_START, CANNOT_BECOME = 0, 1, 2, 3

WINDOW = 256 << 10
"""Bytes of a stream that its reader has not taken."""
CREDIT_AFTER = WINDOW // 4
CHUNK = 64 << 10
"""Bytes of a DATA frame at most."""
REQUEST_MAX = 1 << 20
"""Bytes of a request's strings; WORDS_MAX: of arguments and environment."""
WORDS_MAX = 128 << 10
ERRNO_MAX = 4096
USUAL = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/sh",
}
"""A command's environment in the guest."""
OF_USER = ("HOME", "USER", "LOGNAME", "SHELL")
"""Of these, what the guest's /etc/passwd says of the user a command runs as."""
TERM = "xterm"
"""The kind of terminal a command with one is told, where nothing else is said."""
_OUTPUT = (OUT, ERR)
_SIZES = {STARTED: 4, FAILED: 8, EXITED: 8, CREDIT: 4, END: 0}


def request(
    kind: int,
    argv: Sequence[str | bytes | os.PathLike[str]],
    *,
    directory: str | bytes | os.PathLike[str] = "",
    environment: Mapping[str, str] | None = None,
    flags: int = 0,
    size: tuple[int, int] = (24, 80),
    user: str = "",
) -> bytes:
    """A connection's first frame. `size` is a terminal's, rows and columns; `user` is USER[:GROUP],
    names or numbers in the guest.

    Raises:
        ValueError: a NUL in a string, or a `=` in a variable's name.
        OSError: E2BIG, as execve(2) says of too long a list.
    """
    pairs = (environment or {}).items()
    for name, _ in pairs:
        if not name or "=" in name:
            raise ValueError(f"illegal environment variable name {name!r}")
    words = [
        os.fsencode(directory),
        *([os.fsencode(user)] if user else []),
        *map(os.fsencode, argv),
        *(os.fsencode(name) + b"=" + os.fsencode(value) for name, value in pairs),
    ]
    if any(b"\0" in word for word in words):
        raise ValueError("embedded null byte")
    text = b"\0".join(words) + b"\0"
    if len(text) > REQUEST_MAX or len(words) > WORDS_MAX:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG), os.fsdecode(argv[0]))
    flags |= USER if user else 0
    head = _REQUEST.pack(MAGIC, VERSION, kind, flags, *size, len(argv), len(pairs))
    return FRAME.pack(REQUEST, 0, 0, len(head) + len(text)) + head + text


def check_hello(data: bytes) -> None:
    """What the agent says first on its own connection to the host; AgentError if it is not that."""
    magic, version, _ = HELLO.unpack(data)
    if magic != MAGIC:
        raise AgentError("what answers in the guest is not vmm's agent")
    if version != VERSION:
        raise AgentError(
            f"the guest's agent speaks version {version} of the protocol, this vmm speaks {VERSION}"
        )


def is_errno(number: int) -> bool:
    """Whether an error number from the guest can be one (Linux's are below 4096, MAX_ERRNO)."""
    return 0 < number < ERRNO_MAX


class Session:
    """One command's connection, as far as it is known: give it what was received, send `out`.

    Args:
        kind, flags: as in the request.

    Attributes:
        out: bytes to send; whoever sends them deletes them here.
        pid: the process id in the guest; 0 before it is known.
        failed: errno and what could not be done, where it could not be started.
        returncode: as subprocess has it; None while it runs.
        ended: of OUT and ERR, whether all has come.
        refused: the command reads its input no more.
    """

    def __init__(self, kind: int = EXECUTE, flags: int = 0) -> None:
        self.out = bytearray()
        self.pid = 0
        self.failed: tuple[int, int] | None = None
        self.returncode: int | None = None
        self.ended = [
            True,
            bool(flags & NULL_OUT),
            bool(flags & (NULL_ERR | ERR_TO_OUT | TERMINAL)),
        ]
        self.refused = bool(flags & NULL_IN)
        self._input_ended = self.refused
        self._credit = WINDOW
        self._buffers = [bytearray(), bytearray(), bytearray()]
        self._taken = [0, 0, 0]
        self._dropped = [False, False, False]
        self._received = bytearray()

    # --- from the guest ---------------------------------------------------------------------------

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what was received.

        Raises:
            AgentError: it is not what an agent says.
        """
        received = self._received
        received += data
        at, size = 0, len(received)
        while size - at >= FRAME.size:
            kind, stream, zero, length = FRAME.unpack_from(received, at)
            if length > CHUNK or zero:
                raise AgentError(f"the guest's agent sent a frame of {length} bytes")
            if size - at - FRAME.size < length:
                break
            at += FRAME.size
            if kind == DATA:
                self._data(stream, received, at, length)
            else:
                self._event(kind, stream, bytes(received[at : at + length]))
            at += length
        del received[:at]

    def _data(self, stream: int, received: bytearray, at: int, length: int) -> None:
        buffer = self._buffers[stream] if stream in _OUTPUT else None
        if buffer is not None and self._dropped[stream]:
            return
        if buffer is None or self.ended[stream]:
            raise AgentError(f"the guest's agent sent data of stream {stream}, which has none")
        if len(buffer) + self._taken[stream] + length > WINDOW:
            raise AgentError("the guest's agent sent more than it may")
        with memoryview(received) as view:
            buffer += view[at : at + length]

    def _event(self, kind: int, stream: int, data: bytes) -> None:
        if len(data) != _SIZES.get(kind, -1):
            raise AgentError(f"the guest's agent sent a frame of type {kind}, {len(data)} bytes")
        if kind == CREDIT:
            (credit,) = _U32.unpack(data)
            if stream != IN or credit > WINDOW - self._credit:
                raise AgentError("the guest's agent took more than there was")
            self._credit += credit
        elif kind == END:
            if stream == IN:
                self.refused = True
            elif stream in _OUTPUT:
                self.ended[stream] = True
            else:
                raise AgentError(f"the guest's agent ended stream {stream}")
        elif self.failed or self.returncode is not None or (self.pid and kind != EXITED):
            raise AgentError("the guest's agent says twice what became of a command")
        elif kind == STARTED:
            (self.pid,) = _U32.unpack(data)
            if not 0 < self.pid < 1 << 31:
                raise AgentError("the guest's agent started nothing")
        elif kind == FAILED:
            number, what = _PAIR.unpack(data)
            if not is_errno(number) or what > CANNOT_BECOME:
                raise AgentError(f"the guest's agent sent error {number} of kind {what}")
            self.failed = number, what
        elif not self.pid:
            raise AgentError("the guest's agent tells of the end of what it did not start")
        else:
            status, signum = _PAIR.unpack(data)
            if status > 255 or signum > 127:
                raise AgentError(f"the guest's agent sent exit status {status}, signal {signum}")
            self.returncode = -signum if signum else status
        if self.complete:
            self.refused = True

    def failure(
        self, argv: Sequence[object], directory: object, user: str = ""
    ) -> Exception | None:
        """`failed` as subprocess raises it: FileNotFoundError, PermissionError, ...; LookupError
        where the guest has no such user or group."""
        if self.failed is None:
            return None
        number, what = self.failed
        name = directory if what == CANNOT_CHANGE_DIRECTORY else argv[0]
        if what == CANNOT_BECOME:
            if number in (errno.ENOENT, errno.ESRCH):
                name, _, group = user.partition(":")
                which = f"user {name}" if number == errno.ENOENT else f"group {group}"
                file = "passwd" if number == errno.ENOENT else "group"
                return LookupError(f"the guest's /etc/{file} has no {which}")
            return OSError(number, os.strerror(number), f"user {user}")
        if what == CANNOT_START:
            return AgentError(f"the guest cannot start a process: {os.strerror(number)}")
        return OSError(number, os.strerror(number), str(name))

    @property
    def room(self) -> int:
        """Bytes of input that would be taken now."""
        return 0 if self._input_ended else self._credit

    @property
    def complete(self) -> bool:
        """Whether it has ended and all of its output has come."""
        return self.returncode is not None and all(self.ended)

    # --- for the host's program -------------------------------------------------------------------

    def available(self, stream: int) -> int:
        """Bytes of output that can be taken."""
        return len(self._buffers[stream])

    def take(self, stream: int, size: int = -1) -> bytes:
        """Up to `size` bytes of output (-1: all there is); more may come then."""
        buffer = self._buffers[stream]
        if size < 0 or size >= len(buffer):
            data = bytes(buffer)
            buffer.clear()
        else:
            with memoryview(buffer) as view:
                data = bytes(view[:size])
            del buffer[:size]
        self._taken[stream] += len(data)
        if self._taken[stream] >= CREDIT_AFTER and not self.ended[stream]:
            self.out += FRAME.pack(CREDIT, stream, 0, 4) + _U32.pack(self._taken[stream])
            self._taken[stream] = 0
        return data

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Input; how many bytes of it were taken: there is a window.

        Raises:
            BrokenPipeError: nobody reads it.
        """
        if self.refused or self._input_ended:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        done = min(len(data), self._credit)
        for at in range(0, done, CHUNK):
            size = min(CHUNK, done - at)
            self.out += FRAME.pack(DATA, IN, 0, size)
            self.out += data[at : at + size]
        self._credit -= done
        return done

    def end_input(self) -> None:
        """There is no more input; harmless twice."""
        if not self._input_ended:
            self._input_ended = True
            self.out += FRAME.pack(END, IN, 0, 0)

    def drop(self, stream: int) -> None:
        """Nobody here reads that output any more: the command finds its pipe broken."""
        if not self.ended[stream]:
            self.ended[stream] = self._dropped[stream] = True
            self.out += FRAME.pack(END, stream, 0, 0)

    def signal(self, signum: int, group: bool = False) -> None:
        """Have a signal sent to the process, or to its process group."""
        if not 0 < signum <= 64:
            raise ValueError(f"signal {signum} is not from 1 to 64")
        self.out += FRAME.pack(SIGNAL, group, 0, 4) + _U32.pack(signum)

    def resize(self, rows: int, columns: int) -> None:
        """Tell a terminal its size."""
        self.out += FRAME.pack(RESIZE, 0, 0, 4) + struct.pack("<HH", rows, columns)


def environment(
    given: Mapping[str, str | None] | None, *, user: str = "", tty: bool = False
) -> dict[str, str]:
    """The usual variables with what was given over them; None takes one out.

    With a `user`, HOME and the like are the guest's to say; with a terminal, there is a TERM.
    """
    merged: dict[str, str | None] = dict(USUAL)
    if user:
        for name in OF_USER:
            del merged[name]
    if tty:
        merged["TERM"] = TERM
    merged.update(given or {})
    return {name: value for name, value in merged.items() if value is not None}
