"""The index of a sparse file of pages: which of them it has, and a checksum a chunk.

    8 bytes   "VMMINDEX"
    4         chunk size, bytes
    4         checksums (n)
    8         runs (m)
    8 n       chunk number, CRC-32 of the chunk's bytes (IEEE 802.3), 4 bytes each; ascending
    16 m      first byte, length, 8 bytes each; ascending, whole pages

Little-endian. A chunk without a checksum is all zeroes. The runs are the pages the file has: of a
full snapshot those that are not zero, of a differential those that differ from its base's (they
may be zero, and holes in the file).
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array

from vmm.errors import SnapshotError
from vmm.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Runs = list[tuple[int, int]]

MAGIC = b"VMMINDEX"
CHUNK = 256 << 10
_HEADER = struct.Struct("<8sIIQ")
_RUN = struct.Struct("<QQ")


class Index:
    """One file's.

    Attributes:
        chunk: bytes a chunk has.
        sums: CRC-32 by chunk number; chunks of zeroes have none.
        runs: (first byte, length) of the pages the file has, ascending.
    """

    __slots__ = ("chunk", "runs", "sums")

    def __init__(self, sums: dict[int, int], runs: Runs, chunk: int = CHUNK) -> None:
        self.sums = sums
        self.runs = runs
        self.chunk = chunk

    def pack(self) -> bytes:
        """As a file."""
        parts = [_HEADER.pack(MAGIC, self.chunk, len(self.sums), len(self.runs))]
        flat = array("I", [number for pair in sorted(self.sums.items()) for number in pair])
        parts.append(flat.tobytes())
        parts += [_RUN.pack(*run) for run in self.runs]
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes, name: str, size: int) -> Index:
        """From a file called `name`, the index of one of `size` bytes. Raises SnapshotError."""
        try:
            magic, chunk, sums, runs = _HEADER.unpack_from(data)
            if magic != MAGIC or chunk != CHUNK:
                raise ValueError
            if len(data) != _HEADER.size + 8 * sums + _RUN.size * runs:
                raise ValueError
            flat = array("I", data[_HEADER.size : _HEADER.size + 8 * sums])
            bounds = array("Q", data[_HEADER.size + 8 * sums :])
        except (struct.error, ValueError):
            raise SnapshotError(f"{name} is not an index of pages") from None
        numbers, starts, lengths = flat[::2], bounds[::2], bounds[1::2]
        if not _ascending(numbers, -(-size // CHUNK)) or not _apart(starts, lengths, size):
            raise SnapshotError(f"{name} is not an index of a file of {size} bytes") from None
        found = list(zip(starts, lengths, strict=True))
        return cls(dict(zip(numbers, flat[1::2], strict=True)), found, chunk)

    def check(self, fd: int, size: int, name: str) -> None:
        """Compare the whole file with the checksums; SnapshotError names the place."""
        last = 0
        for start, end in data_runs(fd, size):
            for number in range(start // self.chunk, -(-end // self.chunk)):
                for missing in range(last, number):
                    self._compare(missing, 0, name)
                if number >= last:
                    self._compare(number, self.crc(fd, number), name)
                    last = number + 1
        for missing in range(last, -(-size // self.chunk)):
            self._compare(missing, 0, name)

    def _compare(self, number: int, found: int, name: str) -> None:
        if self.sums.get(number, 0) != found:
            raise SnapshotError(
                f"{name} is corrupt: the {self.chunk >> 10} KiB at byte {number * self.chunk:#x} "
                "do not have their checksum"
            )

    def crc(self, fd: int, number: int) -> int:
        """Of a chunk as it is now; 0 if it is all zeroes."""
        return crc(os.pread(fd, self.chunk, number * self.chunk))


def _ascending(numbers: array[int], end: int) -> bool:
    """Whether each number is above the one before, and all are below `end`."""
    before = -1
    for number in numbers:
        if number <= before:
            return False
        before = number
    return before < end


def _apart(starts: array[int], lengths: array[int], size: int) -> bool:
    """Whether the runs are whole pages below `size`, each after the one before."""
    end = 0
    for start, length in zip(starts, lengths, strict=True):
        if start < end or not length or (start | length) % PAGE_SIZE or length > size - start:
            return False
        end = start + length
    return True


def crc(data: bytes | memoryview) -> int:
    """CRC-32; 0 of zeroes, as of nothing. (Of no other chunk: then it counts as 1.)"""
    if not data or bytes(data) == _ZEROES[: len(data)]:
        return 0
    return zlib.crc32(data) or 1


_ZEROES = bytes(CHUNK)


def data_runs(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of a file that may hold something else than zeroes."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no data after it
            return
        end = min(os.lseek(fd, at, os.SEEK_HOLE), size)
        if at < end:
            yield at, end
        at = end
