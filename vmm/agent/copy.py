"""Files between host and guest: `put` and `get`.

Each is a command's connection whose input or output is a stream of entries (vmm.agent.tree).
"""

from __future__ import annotations

import errno
import io
import os
import struct
import time
from contextlib import closing

from vmm.agent import wire
from vmm.agent.connection import SILENCE, Connection
from vmm.agent.tree import MAX_BYTES, Unpacker, pack, pack_file
from vmm.agent.wire import ERR, OUT, Session
from vmm.config_types import shown
from vmm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from vmm.agent.process import Dialer

    Path = str | os.PathLike[str]
    Progress = Callable[[int], object]

PATH_MAX = 4096
FILTERS = ("data", "all")


class Transfer:
    """A connection on which the agent makes or reads a tree at `path` in the guest.

    Whatever `timeout` is, an agent that neither sends nor takes anything for `SILENCE` seconds is
    given up.
    """

    def __init__(
        self, link: Dialer, kind: int, path: str, timeout: float | None, why: str = ""
    ) -> None:
        flags = wire.NULL_OUT if kind == wire.PUT else wire.NULL_IN
        self._path = path
        self._puts = kind == wire.PUT
        self._timeout = timeout
        self._until = None if timeout is None else time.monotonic() + timeout
        session = self._session = Session(kind, flags)
        session.out += wire.request(kind, [path], flags=flags)
        self._connection = Connection(link.connect(), session, link.why_lost)
        try:
            self._send()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up; what is under way in the guest ends."""
        self._connection.close()

    def _limit(self) -> float:
        """Until when something must happen; TimeoutError where the time for all is up."""
        now = time.monotonic()
        if self._until is not None and now > self._until:
            raise self._late()
        quiet = now + SILENCE
        return quiet if self._until is None else min(quiet, self._until)

    def _late(self) -> Exception:
        if self._until is not None and time.monotonic() >= self._until:
            return TimeoutError(f"{self._path}: not done within {self._timeout:g} s")
        return AgentError(f"{self._path}: the guest's agent has been silent for {SILENCE:g} s")

    def _wait(self, ready: Callable[[], object]) -> None:
        if not self._connection.wait_for(lambda: bool(ready()), self._limit()):
            raise self._late()

    def _send(self) -> None:
        if not self._connection.send(self._limit()):
            raise self._late()

    def wanted(self) -> bool:
        """Whether the stream is to go on, asked by who waits for something on this host.

        Raises:
            TimeoutError, AgentError: the time for all is up; the connection is lost.
        """
        session, now = self._session, time.monotonic()
        puts = self._puts

        def over() -> bool:
            return bool(session.failed or session.complete or (puts and session.refused))

        self._connection.wait_for(over, now)
        if self._until is not None and now > self._until:
            raise self._late()
        return not over() if puts else not session.failed

    def write(self, data: bytes) -> bool:
        """Send a part of the stream; False where the agent takes no more: it has failed."""
        session, view = self._session, memoryview(data)
        while view:
            self._wait(lambda: session.room > 0 or session.refused or session.failed)
            if session.refused or session.failed:
                return False
            view = view[session.write(view) :]
            self._send()
        return True

    def read(self, size: int) -> bytes:
        """So many bytes of the stream. OSError where the agent has failed."""
        session, parts = self._session, []
        while size:
            self._wait(lambda: session.available(OUT) or session.ended[OUT] or session.failed)
            data = self._connection.take(OUT, size, self._limit())
            if not data:
                self.finish()
                raise AgentError(f"the guest's stream of {self._path} ends in the middle")
            parts.append(data)
            size -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            OSError: the agent could not do it, with the path in the guest.
        """
        session, said = self._session, b""
        session.end_input()
        self._send()
        while not (session.failed or session.complete):
            self._wait(
                lambda: (
                    session.complete
                    or session.failed
                    or session.available(ERR)
                    or session.available(OUT)
                )
            )
            if session.available(OUT):
                break
            said += self._connection.take(ERR, until=self._limit())
            if len(said) > 4 * PATH_MAX:
                raise AgentError("the guest's agent complains at length")
        if session.available(OUT):
            raise AgentError(f"the guest's stream of {self._path} goes on after its end")
        failure = session.failure([self._path], "")
        if failure is not None:
            raise failure
        said += self._connection.take(ERR, until=self._limit())
        if session.returncode == 0:
            return
        if len(said) < 4:
            raise AgentError(f"{self._path}: the guest's agent failed ({session.returncode})")
        (number,) = struct.unpack("<I", said[:4])
        if not wire.is_errno(number):
            raise AgentError(f"{self._path}: the guest's agent sent error {number}")
        where = os.fsdecode(said[4:])
        raise OSError(number, f"{os.strerror(number)} (in the guest)", where or self._path)


class Done:
    """The bytes of file data that a transfer has carried, told to `progress`.

    Attributes:
        size: the bytes so far.
    """

    __slots__ = ("_progress", "_told", "size")

    def __init__(self, progress: Progress | None) -> None:
        self.size = 0
        self._progress = progress
        self._told = -1

    def add(self, size: int) -> None:
        """Count `size` bytes more."""
        self.size += size

    def tell(self) -> None:
        """Call `progress`, if there is something new to tell."""
        if self._progress is not None and self.size != self._told:
            self._told = self.size
            self._progress(self.size)

    def add_and_tell(self, size: int) -> None:
        """Count `size` bytes more, and call `progress`."""
        self.size += size
        self.tell()


def put(
    link: Dialer, source: Path | BinaryIO, target: Path, *, timeout: float | None = None,
    mode: int | None = None, progress: Progress | None = None,
) -> None:  # fmt: skip
    """See `Machine.put`."""
    done = Done(progress)
    target = _guest_path("target", target)
    if mode is not None and (not isinstance(mode, int) or not 0 <= mode <= 0o7777):
        raise ValueError(f"mode={mode!r} is not a file's mode, as in 0o644")
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if mode is not None and os.path.isdir(path):
            raise ValueError(f"mode={mode:#o}: {path} is a directory, whose files keep their modes")
        os.stat(path)
        target = _inside(target, path)
    else:
        _check_file("source", source, "read")
        if target.endswith("/"):
            raise ValueError(
                f"target={target!r} is a directory; an open file has no name: say what it is called"
            )
    _check(target)
    transfer = Transfer(link, wire.PUT, target, timeout)
    try:
        if isinstance(source, (str, os.PathLike)):
            stream = pack(os.fspath(source), done.add, wanted=transfer.wanted, mode=mode)
        else:
            stream = pack_file(source, 0o644 if mode is None else mode, done.add)
        with closing(stream):  # at once, with its files, also where `progress` raises
            for part in _joined(stream):
                if not transfer.write(part):
                    break
                done.tell()
        transfer.finish()
        done.tell()
    finally:
        transfer.close()


def get(
    link: Dialer, source: Path, target: Path | BinaryIO, *, timeout: float | None = None,
    max_bytes: int = MAX_BYTES, filter: str = "data", progress: Progress | None = None,
) -> None:  # fmt: skip
    """See `Machine.get`."""
    if filter not in FILTERS:
        raise ValueError(f"filter={filter!r} is not one of {', '.join(FILTERS)}")
    source = _guest_path("source", source)
    source = source.rstrip("/") or source
    _check(source)
    done = Done(progress)
    if not isinstance(target, (str, os.PathLike)):
        _check_file("target", target, "write")
    elif not os.fspath(target):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "")
    transfer = Transfer(link, wire.GET, source, timeout)
    try:
        if isinstance(target, (str, os.PathLike)):
            path = _inside(os.fspath(target), source)
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            everything = filter == "all"
            Unpacker(
                transfer.read,
                path,
                max_bytes,
                all_kinds=everything,
                count=done.add_and_tell,
                wanted=transfer.wanted,
            ).unpack()
        else:
            Unpacker(transfer.read, source, max_bytes, count=done.add_and_tell).unpack_into(target)
        transfer.finish()
        done.tell()
    finally:
        transfer.close()


def _inside(target: str, source: str) -> str:
    """`target`, or where it ends in a slash what `source` is called, in it."""
    if not target.endswith("/"):
        return target
    return os.path.join(target, os.path.basename(os.path.normpath(source)))


def _guest_path(name: str, path: object) -> str:
    if isinstance(path, (str, bytes, os.PathLike)):
        return os.fsdecode(path)
    raise TypeError(f"{name}={shown(path)} is not a path in the guest")


def _check_file(name: str, file: object, method: str) -> None:
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"{name}={shown(file)} is open as text; open it as binary")
    if not hasattr(file, method):
        hint = "; of data, give io.BytesIO(data)" if isinstance(file, (bytes, bytearray)) else ""
        raise TypeError(f"{name}={shown(file)} is not a path, or an open binary file{hint}")


def _check(path: str) -> None:
    if path.endswith("/"):
        raise ValueError(f"{path!r} is the guest's root; name a file or a directory in it")
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"{path!r} is no path of a file in the guest; it begins with /")
    if len(os.fsencode(path)) >= PATH_MAX:
        raise OSError(36, os.strerror(36), path)


def _joined(stream: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer parts: each is a message to the guest."""
    parts: list[bytes] = []
    size = 0
    for part in stream:
        parts.append(part)
        size += len(part)
        if size >= wire.CHUNK:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)
