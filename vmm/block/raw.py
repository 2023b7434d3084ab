"""Raw disk images: a file or block device, byte for byte the disk.

Nothing here is atomic beyond what pread(2) and pwrite(2) are; a flush is fdatasync(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from vmm.block.lock import lock
from vmm.block.vector import whole
from vmm.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.block.vector import Call

SECTOR = 512
BLKGETSIZE64 = 0x80081272
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16
CACHES = ("writeback", "none", "unsafe")

_MAGICS = (
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
    (b"LUKS\xba\xbe", "luks"),
)


def probe(path: str) -> str:
    """The format a file's first bytes say: `qcow2`, `vmdk`, `vhdx`, `vpc`, `luks`, or `raw`."""
    with open(path, "rb", buffering=0) as file:
        start = file.read(8)
    return next((name for magic, name in _MAGICS if start.startswith(magic)), "raw")


class RawImage:
    """An open image.

    Args:
        path: a regular file or a block device; its size must be whole sectors.
        readonly: never written; several may have it open.
        cache: `writeback` (the host's page cache), `none` (O_DIRECT), or `unsafe` (flushes are
            not carried out).

    Attributes:
        size: bytes.
        direct: O_DIRECT is used.
        align: what the host wants transfers to be multiples of (1 without O_DIRECT).

    Raises:
        UsageError: the file cannot be a disk; one line says why.
        HostError: it cannot be opened, or another process has it.
    """

    def __init__(self, path: str, *, readonly: bool = False, cache: str = "writeback") -> None:
        if cache not in CACHES:
            raise UsageError(f"--drive {path}: cache={cache} is not one of {', '.join(CACHES)}")
        self.path = path
        self.readonly = readonly
        self.cache = cache
        self.direct = cache == "none"
        self.align = 1
        try:
            self.fd = os.open(path, self._flags())
        except OSError as err:
            raise self._cannot_open(err) from err
        try:
            self.size = self._size()
            if self.direct:
                self._prepare_direct()
            if not lock(self.fd, write=not readonly):
                raise HostError(
                    f"--drive {path}: another process uses this image; end it, or open it "
                    f"{'after it' if readonly else 'readonly in both'}"
                )
        except BaseException:
            os.close(self.fd)
            raise

    def __repr__(self) -> str:
        return f"RawImage({self.path!r}, {self.size} bytes)"

    def _flags(self) -> int:
        flags = os.O_CLOEXEC | os.O_NONBLOCK  # so that a FIFO does not hold us up
        flags |= os.O_RDONLY if self.readonly else os.O_RDWR
        if self.direct:
            flags |= os.O_DIRECT
        if not self.readonly and stat.S_ISBLK(os.stat(self.path).st_mode):
            flags |= os.O_EXCL  # Linux: not while it is mounted
        return flags

    def _cannot_open(self, err: OSError) -> Exception:
        path = self.path
        if err.errno == errno.ENOENT:
            return UsageError(f"--drive {path}: no such file; make one: truncate -s 1G {path}")
        if err.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not self.readonly:
            return UsageError(f"--drive {path}: {os.strerror(err.errno)}; try {path},readonly")
        if err.errno == errno.EISDIR:
            return UsageError(f"--drive {path} is a directory, not a disk image")
        if err.errno == errno.EBUSY:
            return HostError(
                f"--drive {path}: this host uses the device; unmount it, or say {path},readonly"
            )
        if err.errno == errno.EINVAL and self.direct:
            return UsageError(f"--drive {path}: cache=none (O_DIRECT) is not possible there")
        return UsageError(f"--drive {path}: {os.strerror(err.errno or errno.EIO)}")

    def _size(self) -> int:
        info = os.fstat(self.fd)
        self.is_device = stat.S_ISBLK(info.st_mode)
        if stat.S_ISDIR(info.st_mode):
            raise UsageError(f"--drive {self.path} is a directory, not a disk image")
        if not self.is_device and not stat.S_ISREG(info.st_mode):
            raise UsageError(f"--drive {self.path} is neither a file nor a block device")
        size = info.st_size
        if self.is_device:
            size = int.from_bytes(fcntl.ioctl(self.fd, BLKGETSIZE64, bytes(8)), "little")
        if not size:
            raise UsageError(f"--drive {self.path} is empty; a disk has at least one sector")
        if size % SECTOR:
            raise UsageError(
                f"--drive {self.path}: {size} bytes is not whole sectors of {SECTOR}; "
                f"truncate -s {size + SECTOR - size % SECTOR} {self.path}"
            )
        return size

    def _prepare_direct(self) -> None:
        from vmm.block import direct

        self._bounce = direct.Bounce
        self._writers = direct.Writers()
        self.align = direct.alignment(self.fd)
        if not self.align:
            raise UsageError(f"--drive {self.path}: cache=none (O_DIRECT) is not possible there")
        if self.size % self.align:
            raise UsageError(
                f"--drive {self.path}: {self.size} bytes is not whole blocks of {self.align}, "
                f"which cache=none needs there; truncate -s %{self.align} {self.path}"
            )

    def close(self) -> None:
        """Close; the lock goes with the descriptor. Harmless twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
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
        """The contents are no longer needed; what is read there later may be anything."""
        if self.is_device:
            fcntl.ioctl(self.fd, BLKDISCARD, struct.pack("QQ", offset, size))
        else:
            self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Zeroes from `offset` on, giving the space back if `unmap`."""
        if self.is_device:
            fcntl.ioctl(self.fd, BLKZEROOUT, struct.pack("QQ", offset, size))
            return
        mode = FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE
        try:
            self._fallocate(mode | FALLOC_FL_KEEP_SIZE, offset, size)
        except OSError as err:
            if err.errno != errno.EOPNOTSUPP:
                raise
            self._write_zeroes_slowly(offset, size)

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
