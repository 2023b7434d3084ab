"""A throw-away overlay: writes go to a file without a name, the image stays as it is.

The file is sparse and laid out like the image; a bitmap says which clusters of it count. A cluster
is copied from the image when a part of it is first written.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from vmm.block.libc import fallocate
from vmm.block.raw import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, RawImage
from vmm.block.vector import cut, whole
from vmm.errors import HostError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmm.block.frozen import Frozen
    from vmm.block.nbd import NbdImage

CLUSTER = 64 << 10
"""Bytes. Large enough that the bitmap of 1 TiB is 2 MiB, small enough to be copied in no time."""


SIZE_MAX = 128 << 40
"""Bytes of the largest disk: its bitmap takes 256 MiB."""


class Overlay:
    """An image as `vmm.block.raw.RawImage` is one, over `base`, which is only read.

    Args:
        base: only read; closed with the overlay.
        directory: where the file is; without: $TMPDIR, or /var/tmp.

    Raises:
        HostError: no file can be made there.
    """

    readonly = False
    frozen = False

    def __init__(self, base: RawImage | NbdImage | Frozen, *, directory: str = "") -> None:
        self.base = base
        self.path: str = base.path
        self.size: int = base.size
        self.direct: bool = base.direct
        where = directory or os.environ.get("TMPDIR") or "/var/tmp"
        self._fd = -1
        if self.size > SIZE_MAX:  # an image's header can say anything
            raise HostError(
                f"--drive {base.path},snapshot: a disk of {self.size} bytes is too large for an "
                f"overlay, which takes {SIZE_MAX >> 40} TiB"
            )
        try:
            self._fd = _nameless(where)
            os.truncate(self._fd, self.size)
        except OSError as err:
            self._close_file()
            raise HostError(
                f"--drive {base.path},snapshot: {os.strerror(err.errno or errno.EIO)} for a file "
                f"of up to {self.size} bytes in {where}; set TMPDIR to another directory"
            ) from err
        # Bits are set after their cluster is whole, and never cleared.
        self._written = bytearray(-(-self.size // (8 * CLUSTER)))
        self._lock = allocate_lock()

    def __repr__(self) -> str:
        return f"Overlay({self.base!r})"

    def close(self) -> None:
        """Forget what was written, and close the image. Harmless twice."""
        self._close_file()
        self.base.close()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    # --- reading ----------------------------------------------------------------------------------

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from byte `offset`."""
        for part, at, _, ours in self._runs(views, offset):
            if ours:
                whole(os.preadv, self._fd, part, at)
            else:
                self.base.read(part, at)

    def read_cached(self, views: Sequence[memoryview], offset: int, size: int) -> bool:
        """See `RawImage.read_cached`."""
        for part, at, length, ours in self._runs(views, offset):
            if not ours:
                if not self.base.read_cached(part, at, length):
                    return False
                continue
            try:
                if os.preadv(self._fd, part, at, os.RWF_NOWAIT) != length:
                    return False
            except OSError as err:
                if err.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                    return False
                raise
        return True

    def _runs(
        self, views: Sequence[memoryview], offset: int
    ) -> Iterator[tuple[Sequence[memoryview], int, int, bool]]:
        """`views` in parts that lie wholly in the overlay, or wholly in the image: (views, byte
        offset, size, whether in the overlay)."""
        left = sum(map(len, views))
        while left:
            ours = self._has(offset // CLUSTER)
            end = offset - offset % CLUSTER + CLUSTER
            while end < offset + left and self._has(end // CLUSTER) == ours:
                end += CLUSTER
            length = min(end - offset, left)
            if length == left:
                yield views, offset, length, ours
                return
            part, views = cut(views, length)
            yield part, offset, length, ours
            offset += length
            left -= length

    def _has(self, cluster: int) -> bool:
        return bool(self._written[cluster >> 3] >> (cluster & 7) & 1)

    # --- writing ----------------------------------------------------------------------------------

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views` at byte `offset`."""
        size = sum(map(len, views))
        first, last = offset // CLUSTER, (offset + size - 1) // CLUSTER
        if all(self._has(cluster) for cluster in range(first, last + 1)):
            whole(os.pwritev, self._fd, views, offset)
            return
        with self._lock:  # one copies a cluster; who else writes to it waits until it is there
            self._copy_edges(first, last, offset, size)
            whole(os.pwritev, self._fd, views, offset)
            self._set(first, last)

    def _copy_edges(self, first: int, last: int, offset: int, size: int) -> None:
        """Of the first and last cluster, what [offset, offset + size) does not cover."""
        for cluster in {first, last}:
            start = cluster * CLUSTER
            end = min(start + CLUSTER, self.size)
            if not self._has(cluster) and (start < offset or end > offset + size):
                data = memoryview(bytearray(end - start))
                self.base.read([data], start)
                whole(os.pwritev, self._fd, [data], start)

    def _set(self, first: int, last: int) -> None:
        for cluster in range(first, last + 1):
            self._written[cluster >> 3] |= 1 << (cluster & 7)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Zeroes from `offset` on; they take no space but at the edges."""
        end = offset + size
        first, last = -(-offset // CLUSTER), end // CLUSTER
        if end == self.size:
            last = -(-end // CLUSTER)
        rest = [(offset, end)]
        if first < last:
            start, stop = first * CLUSTER, min(last * CLUSTER, end)
            try:
                with self._lock:
                    self._punch(start, stop - start)
                    self._set(first, last - 1)
                rest = [(offset, start), (stop, end)]
            except OSError as err:
                if err.errno != errno.EOPNOTSUPP:
                    raise
        zeroes = memoryview(bytes(CLUSTER))
        for start, stop in rest:
            for at in range(start, stop, CLUSTER):
                self.write([zeroes[: min(stop - at, CLUSTER)]], at)

    def discard(self, offset: int, size: int) -> None:
        """Give back what the overlay has of it; the image's part stays."""
        end = offset + size
        while offset < end:
            stop = min(offset - offset % CLUSTER + CLUSTER, end)
            if self._has(offset // CLUSTER):
                self._punch(offset, stop - offset)
            offset = stop

    def _punch(self, offset: int, size: int) -> None:
        fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)

    def flush(self) -> None:
        """Nothing of it outlives the machine."""

    @property
    def empty(self) -> bool:
        """Whether nothing was written."""
        return not any(self._written)

    def clear(self) -> None:
        """Forget what was written. While nobody reads or writes."""
        if not self.empty:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, self.size)
            self._written[:] = bytes(len(self._written))

    def found(self) -> int:
        """Bytes that the image below has now, or the overlay where it has more."""
        return max(self.base.found(), self.size)

    def grow(self, size: int) -> None:
        """Have `size` bytes, no fewer than now; what the image below lacks is zero. While nobody
        reads or writes. Raises OSError, StateError."""
        if size == self.size:
            return
        if self.base.frozen:
            raise StateError(
                f"{self.path}: a checkpoint, or clones, share this disk; have it grow before"
            )
        below = min(self.base.found(), size)
        if below > self.base.size:
            self.base.grow(below)
        os.ftruncate(self._fd, size)
        self._written += bytes(-(-size // (8 * CLUSTER)) - len(self._written))
        if size > below:  # of what lies beyond the image, all is here: the zeroes of a hole
            first, last = below // CLUSTER, (size - 1) // CLUSTER
            if below % CLUSTER and not self._has(first):
                data = memoryview(bytearray(below % CLUSTER))
                self.base.read([data], first * CLUSTER)
                whole(os.pwritev, self._fd, [data], first * CLUSTER)
            self._set(first, last)
        self.size = size

    def fold(self, below: Overlay) -> None:
        """Write to `below`, of the same size, what was written here, and forget it. Clusters that
        are zeroed here take no space there either. While nobody reads or writes."""
        data = memoryview(bytearray(CLUSTER))
        for start, end in self._written_ranges():
            at = start
            while at < end:
                found = min(self._seek(at, os.SEEK_DATA), end)
                stop = found if found == end else found - found % CLUSTER
                if at < stop:
                    below.write_zeroes(at, stop - at, unmap=True)
                    at = stop
                stop = min(self._seek(found, os.SEEK_HOLE), end)
                while at < stop:
                    part = data[: min(CLUSTER, end - at)]
                    whole(os.preadv, self._fd, [part], at)
                    below.write([part], at)
                    at += len(part)
        self.clear()

    def _written_ranges(self) -> Iterator[tuple[int, int]]:
        """Where clusters were written: (first byte, byte after the last)."""
        start = -1
        for cluster in range(-(-self.size // CLUSTER)):
            if self._has(cluster):
                start = cluster if start < 0 else start
            elif start >= 0:
                yield start * CLUSTER, cluster * CLUSTER
                start = -1
        if start >= 0:
            yield start * CLUSTER, self.size

    def _seek(self, offset: int, what: int) -> int:
        """Where the file's next data, or hole, begin (lseek(2)); its end where there are none."""
        try:
            return os.lseek(self._fd, offset, what)
        except OSError as err:
            if err.errno != errno.ENXIO:
                raise
            return self.size


def _nameless(directory: str) -> int:
    """A new file that goes with its descriptor."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE | os.O_EXCL, 0o600)
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # no such files there
            raise
    import tempfile

    fd, path = tempfile.mkstemp(dir=directory, prefix="vmm-snapshot-")
    os.unlink(path)
    return fd
