"""Raw disk images: a file or block device, byte for byte the disk.

Nothing here is atomic beyond what pread(2) and pwrite(2) are; a flush is fdatasync(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from _thread import allocate_lock

from vmm.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SECTOR = 512
BLOCK = 4096
"""No disk and no file system wants O_DIRECT aligned to more."""
F_OFD_SETLK = 37
"""Linux, include/uapi/asm-generic/fcntl.h: a lock of the open file, not of the process."""
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid
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
        flags = os.O_CLOEXEC | (os.O_RDONLY if readonly else os.O_RDWR)
        try:
            self.fd = os.open(path, flags | (os.O_DIRECT if self.direct else 0))
        except OSError as err:
            raise self._cannot_open(err) from err
        try:
            self.size = self._size()
            self._lock()
        except BaseException:
            os.close(self.fd)
            raise
        self._bouncing = allocate_lock()

    def __repr__(self) -> str:
        return f"RawImage({self.path!r}, {self.size} bytes)"

    def _cannot_open(self, err: OSError) -> Exception:
        path = self.path
        if err.errno == errno.ENOENT:
            return UsageError(f"--drive {path}: no such file; make one: truncate -s 1G {path}")
        if err.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not self.readonly:
            return UsageError(f"--drive {path}: {os.strerror(err.errno)}; try {path},readonly")
        if err.errno == errno.EISDIR:
            return UsageError(f"--drive {path} is a directory, not a disk image")
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

    def _lock(self) -> None:
        """One writer, or any number of readers; QEMU's locks are within the same range."""
        kind = fcntl.F_RDLCK if self.readonly else fcntl.F_WRLCK
        try:
            fcntl.fcntl(self.fd, F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        except OSError as err:
            if err.errno in (errno.EAGAIN, errno.EACCES):
                raise HostError(
                    f"--drive {self.path}: another process uses this image; end it, or open it "
                    f"{'after it' if self.readonly else 'readonly in both'}"
                ) from None
            if err.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def close(self) -> None:
        """Close; the lock goes with the descriptor. Harmless twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    # --- I/O: all raise OSError -------------------------------------------------------------------

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from byte `offset`."""
        try:
            self._whole(os.preadv, views, offset)
        except OSError as err:
            if err.errno != errno.EINVAL or not self.direct:
                raise
            self._bounce(views, offset, write=False)

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
        try:
            self._whole(os.pwritev, views, offset)
        except OSError as err:
            if err.errno != errno.EINVAL or not self.direct:
                raise
            self._bounce(views, offset, write=True)

    def _bounce(self, views: Sequence[memoryview], offset: int, *, write: bool) -> None:
        """O_DIRECT where the guest's buffers (or its sectors) are not aligned as the host wants
        them: through a buffer that is. Parts of blocks are read first, one writer at a time."""
        import mmap

        size = sum(map(len, views))
        first = offset - offset % BLOCK
        end = min(-(-(offset + size) // BLOCK) * BLOCK, self.size)
        with mmap.mmap(-1, end - first) as area, memoryview(area) as buffer, self._bouncing:
            whole = offset == first and offset + size == end
            if not (write and whole):
                self._whole(os.preadv, [buffer], first)
            at = offset - first
            for view in views:
                part = buffer[at : at + len(view)]
                if write:
                    part[:] = view
                else:
                    view[:] = part
                part.release()
                at += len(view)
            if write:
                self._whole(os.pwritev, [buffer], first)

    def _whole(self, call: object, views: Sequence[memoryview], offset: int) -> None:
        want = sum(map(len, views))
        while True:
            done: int = call(self.fd, views, offset)  # type: ignore[operator]
            if done == want:
                return
            if done <= 0:
                raise OSError(errno.EIO, "short transfer")  # the file has been cut short
            want -= done
            offset += done
            rest = []
            for view in views:
                if done >= len(view):
                    done -= len(view)
                else:
                    rest.append(view[done:])
                    done = 0
            views = rest

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
