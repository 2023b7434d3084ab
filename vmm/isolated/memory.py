"""Guest memory of a machine in a process of its own: read and written by copies."""

from __future__ import annotations

from vmm.errors import GuestMemoryError, StateError
from vmm.isolated.wire import DATA_MAX, WireError
from vmm.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, NoReturn

    from typing_extensions import Buffer

CHUNK = DATA_MAX
"""Bytes of one read or write."""


class IsolatedMemory(GuestMemory):
    """What `GuestMemory` gives, but views: `read` and `write` copy, 1 MiB in a call.

    Args:
        regions: (first address, bytes) of each region of RAM.
        call: a call to the machine's process.
    """

    __slots__ = ("_call", "_ranges")

    def __init__(self, regions: list[tuple[int, int]], call: Callable[..., Any]) -> None:
        self.size = sum(size for _, size in regions)
        self.base = None
        self.at_close = self.leave = None
        self._ranges = tuple(regions)
        self._call = call

    def close(self) -> None:
        """Nothing is found there any more."""
        self._ranges = ()

    @property
    def regions(self) -> NoReturn:  # type: ignore[override]
        """StateError: the mappings are another process's."""
        raise StateError("memory.regions: the machine has a process of its own; use read and write")

    def find(self, gpa: int, size: int) -> NoReturn:
        """StateError: the mapping is another process's."""
        self._check(gpa, size)
        raise StateError("memory.find: the machine has a process of its own; use read and write")

    def hva(self, gpa: int, size: int = 1) -> NoReturn:
        """StateError, as of `find`."""
        raise StateError("memory.hva: the machine has a process of its own; use read and write")

    def view(self, gpa: int, size: int) -> NoReturn:
        """StateError, as of `find`."""
        raise StateError("memory.view: the machine has a process of its own; use read and write")

    def iov(self, ranges: Iterable[tuple[int, int]]) -> NoReturn:
        """StateError, as of `find`."""
        raise StateError("memory.iov: the machine has a process of its own; use read and write")

    def _check(self, gpa: int, size: int) -> None:
        for start, length in self._ranges:
            if size >= 0 and start <= gpa and gpa + size <= start + length:
                return
        if not self._ranges:
            raise GuestMemoryError(gpa, size, "is gone: the memory is closed")
        raise GuestMemoryError(gpa, size)

    def contains(self, gpa: int, size: int = 1) -> bool:
        """See `GuestMemory.contains`."""
        try:
            self._check(gpa, size)
        except GuestMemoryError:
            return False
        return True

    def read(self, gpa: int, size: int) -> bytes:
        """See `GuestMemory.read`."""
        self._check(gpa, size)
        parts = []
        for at in range(0, size, CHUNK):
            part = self._call("memory.read", gpa + at, min(CHUNK, size - at))
            if not isinstance(part, bytes) or len(part) != min(CHUNK, size - at):
                raise WireError("memory.read: other bytes than were asked for")
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, gpa: int, data: Buffer) -> None:
        """See `GuestMemory.write`."""
        source = memoryview(data).cast("B")
        self._check(gpa, len(source))
        for at in range(0, len(source), CHUNK):
            self._call("memory.write", gpa + at, data=source[at : at + CHUNK])

    def fill(self, gpa: int, size: int, byte: int = 0) -> None:
        """See `GuestMemory.fill`."""
        self._check(gpa, size)
        self._call("memory.fill", gpa, size, byte)

    def read_u8(self, gpa: int) -> int:
        """See `GuestMemory.read_u8`."""
        return self.read(gpa, 1)[0]

    def read_u16(self, gpa: int) -> int:
        """See `GuestMemory.read_u16`."""
        return int.from_bytes(self.read(gpa, 2), "little")

    def read_u32(self, gpa: int) -> int:
        """See `GuestMemory.read_u32`."""
        return int.from_bytes(self.read(gpa, 4), "little")

    def read_u64(self, gpa: int) -> int:
        """See `GuestMemory.read_u64`."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def write_u8(self, gpa: int, value: int) -> None:
        """See `GuestMemory.write_u8`."""
        self.write(gpa, bytes((value,)))

    def write_u16(self, gpa: int, value: int) -> None:
        """See `GuestMemory.write_u16`."""
        self.write(gpa, value.to_bytes(2, "little"))

    def write_u32(self, gpa: int, value: int) -> None:
        """See `GuestMemory.write_u32`."""
        self.write(gpa, value.to_bytes(4, "little"))

    def write_u64(self, gpa: int, value: int) -> None:
        """See `GuestMemory.write_u64`."""
        self.write(gpa, value.to_bytes(8, "little"))
