"""Unpacked kernels, kept so that no payload is unpacked twice.

Unpacking Debian's XZ kernel costs 0.5 to 0.9 s of CPU, reading what came of it 0.05 s. The name of
an entry is a hash of the packed payload, so a changed kernel has another entry. An entry holds the
unpacked bytes, in blocks, up to where the loader needed no more, then a table with a checksum of
each block; a last row of zeroes tells that the payload ends there. An entry is only ever a shorter
way: where it is missing, broken or too short, the payload is unpacked.

Entries are in $VMM_CACHE/unpacked (VMM_CACHE being ~/.cache/vmm unless set; XDG_CACHE_HOME is
followed), in a directory that must be this user's own and writable by nobody else. Several
processes may use it at once: an entry appears when it is whole. The longest unused entries go when
all take more than LIMIT; $VMM_KERNEL_CACHE sets another limit (`1G`), 0 turns the cache off.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
import zlib

from vmm import own_directory
from vmm.errors import UsageError
from vmm.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

LIMIT = 512 << 20
"""Bytes all entries may take."""
ENTRIES_MAX = 32
UNFINISHED_AGE = 3600.0
"""Seconds after which an unfinished entry is taken for that of a process that was killed."""
BLOCKS_MAX = 1 << 12

_MAGIC = b"vmm unpacked 1\0\0"
_TRAILER = struct.Struct("<16sII")  # magic, number of blocks, checksum of the table
_BLOCK = struct.Struct("<II")  # bytes, checksum
_SUFFIX = ".new"


def blocks(payload: bytes, kind: str, unpack: Callable[[], Iterable[bytes]]) -> Generator[bytes]:
    """What `unpack()` gives for `payload` of format `kind`: from the cache as far as that goes.

    Keeps what it unpacks when its reader stops. Nothing that is wrong with the cache is raised.
    """
    cache = _open()
    if cache is None:
        yield from unpack()
        return
    try:
        yield from cache.blocks(payload, kind, unpack)
    finally:
        cache.close()


def _open() -> _Cache | None:
    """The cache, if it is wanted, there or can be made, and nobody else's."""
    limit = _limit()
    if limit <= 0:
        return None
    try:
        return _Cache(own_directory.find("unpacked"), limit)
    except OSError:
        return None


def _limit() -> int:
    text = os.environ.get("VMM_KERNEL_CACHE", "")
    if text in ("0", "off", "no"):
        return 0
    try:
        return parse_size(text, "VMM_KERNEL_CACHE") if text else LIMIT
    except UsageError:
        return 0  # not understood: what a person wanted was less than the default


def _touch(fd: int) -> None:
    """Have an entry count as used now, where its file system can be written to."""
    with contextlib.suppress(OSError):
        os.utime(fd)


class _Cache:
    """An open cache directory.

    Raises:
        OSError: there is none, or it is not this user's own.
    """

    def __init__(self, path: str, limit: int) -> None:
        self._limit = limit
        self._whole = False
        self._fd = own_directory.open_own(path)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def blocks(
        self, payload: bytes, kind: str, unpack: Callable[[], Iterable[bytes]]
    ) -> Generator[bytes]:
        """See the function `blocks`."""
        import hashlib

        name = f"{hashlib.blake2b(payload, digest_size=20).hexdigest()}.{kind}"
        done = 0
        for block in self._read(name):
            done += len(block)
            yield block
        if self._whole:
            return
        if not done:
            yield from self._keep(name, unpack())
            return
        # The entry ended, and the reader wants more: the rest is unpacked, and a longer entry kept.
        skip = done
        whole = self._keep(name, unpack())
        try:
            for block in whole:
                if skip < len(block):
                    yield block[skip:]
                skip = max(0, skip - len(block))
        finally:
            whole.close()

    def _read(self, name: str) -> Iterator[bytes]:
        """The blocks of entry `name`, up to the first that is not as it was written."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=self._fd)
        except OSError:
            return
        try:
            table = self._table(fd)
            if table:
                _touch(fd)
            offset = 0
            for size, checksum in table:
                if not size:
                    self._whole = True
                    return
                block = os.pread(fd, size, offset)
                if len(block) != size or zlib.crc32(block) != checksum:
                    return
                offset += size
                yield block
        except OSError:
            return
        finally:
            os.close(fd)

    @staticmethod
    def _table(fd: int) -> list[tuple[int, int]]:
        """Size and checksum of each block; empty where the file is no entry."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not own_directory.is_own(status):
            return []
        end = status.st_size - _TRAILER.size
        if end < 0:
            return []
        magic, count, checksum = _TRAILER.unpack(os.pread(fd, _TRAILER.size, end))
        start = end - count * _BLOCK.size
        if magic != _MAGIC or not 0 < count <= BLOCKS_MAX or start < 0:
            return []
        raw = os.pread(fd, count * _BLOCK.size, start)
        if len(raw) != count * _BLOCK.size or zlib.crc32(raw) != checksum:
            return []
        table = list(_BLOCK.iter_unpack(raw))
        return table if sum(size for size, _ in table) == start else []

    def _keep(self, name: str, unpacked: Iterable[bytes]) -> Generator[bytes]:
        """Give the blocks on, and write an entry of them when they end or the reader stops.

        Nothing is kept of a payload that turns out to be broken."""
        entry = _Entry(self._fd, name, self._limit)
        try:
            for block in unpacked:
                entry.add(block)
                yield block
        except GeneratorExit:
            entry.finish()
            raise
        except BaseException:
            entry.abandon()
            raise
        else:
            entry.finish(whole=True)


class _Entry:
    """An entry being written; it gives up silently at the first error."""

    def __init__(self, directory: int, name: str, limit: int) -> None:
        self._directory = directory
        self._name = name
        self._limit = limit
        self._table: list[tuple[int, int]] = []
        self._size = 0
        self._fd = -1
        self._unfinished = f"{name}.{os.getpid()}.{time.monotonic_ns()}{_SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            self._fd = os.open(self._unfinished, flags, 0o600, dir_fd=directory)

    def add(self, block: bytes) -> None:
        """Append `block`."""
        if self._fd < 0:
            return
        self._size += len(block)
        if self._size > self._limit or len(self._table) >= BLOCKS_MAX - 1:
            self.abandon()
            return
        self._table.append((len(block), zlib.crc32(block)))
        self._write(block)

    def finish(self, *, whole: bool = False) -> None:
        """Have it appear, and the oldest go. `whole`: there is no more in the payload."""
        if not self._table:
            self.abandon()
            return
        rows = [*self._table, (0, 0)] if whole else self._table
        raw = b"".join(_BLOCK.pack(*row) for row in rows)
        self._write(raw + _TRAILER.pack(_MAGIC, len(rows), zlib.crc32(raw)))
        if self._fd < 0:
            return
        self._close()
        try:
            os.rename(
                self._unfinished, self._name,
                src_dir_fd=self._directory, dst_dir_fd=self._directory,
            )  # fmt: skip
        except OSError:
            self._unlink(self._unfinished)
            return
        self._make_room()

    def abandon(self) -> None:
        """Leave nothing of it; harmless twice."""
        if self._fd >= 0:
            self._close()
            self._unlink(self._unfinished)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view and self._fd >= 0:
                view = view[os.write(self._fd, view) :]
        except OSError:  # no room, most likely
            self.abandon()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._directory)

    def _make_room(self) -> None:
        """Remove entries, the longest unused first, until the rest is within the limits; and what
        killed processes left."""
        found: list[tuple[float, int, str]] = []
        try:
            for name in os.listdir(self._directory):
                try:
                    status = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
                except OSError:
                    continue  # another process was quicker
                if not name.endswith(_SUFFIX):
                    found.append((status.st_mtime, status.st_size, name))
                elif time.time() - status.st_mtime > UNFINISHED_AGE:
                    self._unlink(name)
        except OSError:
            return
        found.sort()
        total = sum(size for _, size, _ in found)
        count = len(found)
        for _, size, name in found:
            if total <= self._limit and count <= ENTRIES_MAX:
                return
            if name != self._name:
                self._unlink(name)
                total, count = total - size, count - 1
