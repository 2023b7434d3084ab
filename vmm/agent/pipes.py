"""The pipes of a command in the guest, as Python's files: `GuestProcess.stdin`, `stdout`, `stderr`.

What the guest writes is hostile: a line, all lines and all of the output are as long as it likes,
so a read without a size of its own ends in AgentError beyond a maximum.
"""

from __future__ import annotations

import io

from vmm.agent import wire
from vmm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeVar

    from vmm.agent.connection import Connection

    T = TypeVar("T", str, bytes)


def too_much(maximum: int) -> AgentError:
    """What is raised where a command writes without an end."""
    return AgentError(
        f"the command's output is over {maximum} bytes; max_output= is the limit, or read it in "
        "parts (popen)"
    )


class Reader(io.RawIOBase):
    """The command's output.

    Attributes:
        maximum: bytes that a read of all there is, or of a line, gives at most.
    """

    def __init__(self, connection: Connection, stream: int, maximum: int) -> None:
        self.maximum = maximum
        self._connection = connection
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readall(self) -> bytes:
        data = bytearray()
        while part := self.read(wire.WINDOW):
            data += part
            if len(data) > self.maximum:
                raise too_much(self.maximum)
        return bytes(data)

    def readline(self, size: int | None = -1) -> bytes:
        return a_line(super().readline, size, self.maximum)

    def readlines(self, hint: int | None = -1) -> list[bytes]:
        return all_lines(self, hint, self.maximum)

    def readinto(self, buffer: Any) -> int:
        session, stream = self._connection.session, self._stream
        view = memoryview(buffer).cast("B")
        self._connection.wait_for(
            lambda: bool(session.available(stream)) or session.ended[stream], None
        )
        data = self._connection.take(stream, len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            session, stream = self._connection.session, self._stream
            if not session.ended[stream] and self._connection.error is None:
                self._connection.do(lambda: session.drop(stream))
        super().close()


class BoundedReader(io.BufferedReader):
    """A `Reader` with a buffer."""

    raw: Reader

    def readline(self, size: int | None = -1) -> bytes:
        return a_line(super().readline, size, self.raw.maximum)

    def readlines(self, hint: int | None = -1) -> list[bytes]:
        return all_lines(self, hint, self.raw.maximum)


class BoundedText(io.TextIOWrapper):
    """The command's output or input as text; `maximum` counts characters."""

    def __init__(self, buffer: Any, maximum: int, **options: Any) -> None:
        super().__init__(buffer, **options)
        self._maximum = maximum

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        return a_line(super().readline, size, self._maximum)

    def readlines(self, hint: int | None = -1) -> list[str]:  # type: ignore[override]
        return all_lines(self, hint, self._maximum)


class Writer(io.RawIOBase):
    """The command's input.

    Attributes:
        until: when a write that waits for the command is given up (time.monotonic); None: never.
    """

    def __init__(self, connection: Connection) -> None:
        self.until: float | None = None
        self._connection = connection

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int | None:
        """How many bytes were taken; None: none in time."""
        session, done = self._connection.session, 0
        view = memoryview(data).cast("B")

        def write() -> None:
            nonlocal done
            done = session.write(view)

        until = self.until
        if not self._connection.wait_for(lambda: session.room > 0 or session.refused, until):
            return None
        self._connection.do(write, until)
        return done

    def close(self) -> None:
        if not self.closed and self._connection.error is None:
            self._connection.do(self._connection.session.end_input)
        super().close()


def a_line(readline: Callable[[int], T], size: int | None, maximum: int) -> T:
    """A line of at most `size`, or where no size is given of `maximum`; AgentError beyond."""
    if size is not None and size >= 0:
        return readline(size)
    line = readline(maximum + 1)
    if len(line) > maximum:
        raise too_much(maximum)
    return line


def all_lines(lines: Iterable[T], hint: int | None, maximum: int) -> list[T]:
    """The lines up to `hint` bytes, or all of them where that is not above 0, but no more than
    `maximum`; AgentError beyond."""
    found: list[T] = []
    size = 0
    for line in lines:
        found.append(line)
        size += len(line)
        if hint is not None and 0 < hint <= size:
            break
        if size > maximum:
            raise too_much(maximum)
    return found
