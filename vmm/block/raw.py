"""Raw disk images: a file or block device, byte for byte the disk.

Nothing here is atomic beyond what pread(2) and pwrite(2) are; a flush is fdatasync(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from vmm.block.host_file import BLKGETSIZE64, HostFile
from vmm.block.lock import in_use, lock, unlock, wait_free
from vmm.block.vector import whole
from vmm.errors import UsageError
from vmm.forked import drop_in_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.block.vector import Call

SECTOR = 512
FREE_WITHIN = 0.5
"""Seconds in which another process may let the image go."""
BLKSSZGET = 0x1268
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16
CACHES = ("writeback", "none", "unsafe")


class RawImage:
    """An open image.

    Args:
        path: a regular file or a block device; its size must be whole sectors.
        readonly: never written; several may have it open.
        cache: `writeback` (the host's page cache), `none` (O_DIRECT), or `unsafe` (flushes are
            not carried out).
        format: `raw`, whatever the file's first bytes are; empty: a file that has another
            format's mark is refused.
        discard: `unmap` gives the space of what the guest discards back to the host; with `off`
            the file keeps the space that it has.
        follow: `path` may be a symbolic link.

    Attributes:
        size: bytes.
        direct: O_DIRECT is used.
        align: what the host wants transfers to be multiples of (1 without O_DIRECT).
        block: bytes that discards and zeroes of a device must be multiples of; 1 of a file.

    Raises:
        UsageError: the file cannot be a disk; one line says why.
        HostError: it cannot be opened, or another process has it.
    """

    frozen = False
    """It is not shared as `vmm.block.frozen.Frozen` is."""

    def __init__(
        self,
        path: str,
        *,
        readonly: bool = False,
        cache: str = "writeback",
        format: str = "raw",
        discard: str = "unmap",
        follow: bool = True,
    ) -> None:
        if cache not in CACHES:
            raise UsageError(f"--drive {path}: cache={cache} is not one of {', '.join(CACHES)}")
        self.path = path
        self.readonly = readonly
        self.cache = cache
        self.direct = cache == "none"
        self.unmaps = discard != "off"
        self.align = self.block = 1
        file = HostFile(path, readonly=readonly, direct=self.direct, format=format, follow=follow)
        self.fd, self.is_device = file.fd, file.is_device
        try:
            self.size = self._checked(file.size)
            if self.is_device:
                self.block = int.from_bytes(fcntl.ioctl(self.fd, BLKSSZGET, bytes(4)), "little")
            if self.direct:
                self._prepare_direct()
            if not lock(self.fd, write=not readonly):
                self._lock_later()
            drop_in_child(self)
        except BaseException:
            os.close(self.fd)
            raise

    def _lock_later(self) -> None:
        """Another process has the image: give it a moment to end. Raises HostError.

        Where a monitor is killed while it starts a helper program, the process that becomes the
        program has its descriptors until it has loaded the program (vfork(2), execve(2)).
        """
        write = not self.readonly
        unlock(self.fd)
        wait_free(self.path, write=write, within=FREE_WITHIN)
        if not lock(self.fd, write=write):
            raise in_use(self.path, self.fd, write=write)

    def __repr__(self) -> str:
        return f"RawImage({self.path!r}, {self.size} bytes)"

    def _checked(self, size: int) -> int:
        if not size:
            raise UsageError(f"--drive {self.path} is empty; a disk has at least one sector")
        if size % SECTOR:
            from vmm.block.probe import compression

            program = compression(self.fd)
            hint = f"a {program} file? unpack it first" if program else "is it a disk's image?"
            raise UsageError(
                f"--drive {self.path}: {size} bytes is not whole sectors of {SECTOR}; {hint}"
            )
        return size

    def _prepare_direct(self) -> None:
        from vmm.block import direct

        self._bounce = direct.Bounce
        self._writers = direct.Writers()
        self.align = direct.alignment(self.fd)
        if not self.align:
            raise UsageError(
                f"--drive {self.path}: cache=none (O_DIRECT) is not possible there; leave it out"
            )
        if self.size % self.align:
            raise UsageError(
                f"--drive {self.path}: {self.size} bytes is not whole blocks of {self.align}, "
                "which cache=none needs there; leave it out"
            )

    def found(self) -> int:
        """Bytes that the file or device has now, in whole sectors: others may have enlarged it."""
        size = os.fstat(self.fd).st_size
        if self.is_device:
            size = int.from_bytes(fcntl.ioctl(self.fd, BLKGETSIZE64, bytes(8)), "little")
        return size - size % max(SECTOR, self.align)

    def grow(self, size: int) -> None:
        """Have `size` bytes, no fewer than now; the new ones are zero. Raises OSError, UsageError.

        An image that keeps its space (`discard=off`) is given that of the new bytes, too.
        """
        found = self.found()
        if size > found:
            if self.is_device or self.readonly:
                what = "device" if self.is_device else "image"
                raise UsageError(
                    f"{self.path}: this {what} has {found} bytes; only its owner can enlarge it, "
                    "then say no size"
                )
            if not self.unmaps:
                os.posix_fallocate(self.fd, found, size - found)
            os.ftruncate(self.fd, size)
        self.size = size

    def close(self) -> None:
        """Close and unlock. Harmless twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            unlock(fd)
            os.close(fd)

    # --- I/O: all raise OSError -------------------------------------------------------------------

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from byte `offset`."""
        if not self.direct:
            whole(os.preadv, self.fd, views, offset)
        elif not self._try_direct(os.preadv, views, offset):
            with self._bounce(offset, sum(map(len, views)), self.align) as bounce:
                whole(os.preadv, self.fd, [bounce.buffer], bounce.offset)
                bounce.scatter(views)

    def read_cached(self, views: Sequence[memoryview], offset: int, size: int) -> bool:
        """The same, if the page cache has all `size` bytes of it; else False, nothing is said
        about what `views` hold then."""
        try:
            return os.preadv(self.fd, views, offset, os.RWF_NOWAIT) == size
        except OSError as err:
            if err.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            raise

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views` at byte `offset`."""
        if not self.direct:
            whole(os.pwritev, self.fd, views, offset)
        elif (offset | sum(map(len, views))) % self.align:
            self._writers.alone(lambda: self._write_bounced(views, offset))
        elif self.align == SECTOR:  # nothing a guest writes is a part of a block
            self._write_direct(views, offset)
        else:
            self._writers.together(lambda: self._write_direct(views, offset))

    def _write_direct(self, views: Sequence[memoryview], offset: int) -> None:
        if not self._try_direct(os.pwritev, views, offset):
            self._write_bounced(views, offset)

    def _write_bounced(self, views: Sequence[memoryview], offset: int) -> None:
        with self._bounce(offset, sum(map(len, views)), self.align) as bounce:
            if bounce.partial:
                whole(os.preadv, self.fd, [bounce.buffer], bounce.offset)
            bounce.gather(views)
            whole(os.pwritev, self.fd, [bounce.buffer], bounce.offset)

    def _try_direct(self, call: Call, views: Sequence[memoryview], offset: int) -> bool:
        """False if the kernel does not take the guest's buffers, or offset, as they are."""
        try:
            whole(call, self.fd, views, offset)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            return False
        return True

    def flush(self) -> None:
        """Return when all that was written is on stable storage."""
        if self.cache != "unsafe" and not self.readonly:
            os.fdatasync(self.fd)

    def discard(self, offset: int, size: int) -> None:
        """The contents are no longer needed; what is read there later may be anything.

        Of a block device the whole blocks in it; the rest stays as it is.
        """
        if not self.unmaps:
            return
        if self.is_device:
            start, end = self._blocks(offset, size)
            if start < end:
                fcntl.ioctl(self.fd, BLKDISCARD, struct.pack("QQ", start, end - start))
        else:
            self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Zeroes from `offset` on, giving the space back if `unmap`."""
        if self.is_device:
            start, end = self._blocks(offset, size)
            if start >= end:
                self._write_zeroes_slowly(offset, size)
                return
            fcntl.ioctl(self.fd, BLKZEROOUT, struct.pack("QQ", start, end - start))
            self._write_zeroes_slowly(offset, start - offset)
            self._write_zeroes_slowly(end, offset + size - end)
            return
        mode = FALLOC_FL_PUNCH_HOLE if unmap and self.unmaps else FALLOC_FL_ZERO_RANGE
        try:
            self._fallocate(mode | FALLOC_FL_KEEP_SIZE, offset, size)
        except OSError as err:
            if err.errno != errno.EOPNOTSUPP:
                raise
            self._write_zeroes_slowly(offset, size)

    def _blocks(self, offset: int, size: int) -> tuple[int, int]:
        """Where the device's whole blocks in [offset, offset + size) begin and end."""
        return -(-offset // self.block) * self.block, (offset + size) // self.block * self.block

    def _write_zeroes_slowly(self, offset: int, size: int) -> None:
        import mmap

        step = 1 << 20
        with mmap.mmap(-1, step) as zeroes, memoryview(zeroes) as view:
            while size:
                part = min(step, size)
                self.write([view[:part]], offset)
                offset += part
                size -= part

    def _fallocate(self, mode: int, offset: int, size: int) -> None:
        """fallocate(2), which Python's os has only without a mode."""
        from vmm.block.libc import fallocate

        fallocate(self.fd, mode, offset, size)
