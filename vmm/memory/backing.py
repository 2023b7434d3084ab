"""What guest RAM is made of on the host: anonymous, memfd, hugetlbfs or a private file mapping.

Each function returns an `mmap.mmap` of exactly `size` bytes. The mapping owns its descriptor;
closing it gives the memory back. MAP_NORESERVE: a guest's size is an upper bound, not a demand,
so that 5 GiB guests run on 2 GiB hosts as long as they do not use it all (mmap(2)).
"""

from __future__ import annotations

import errno
import mmap
import os

from vmm.errors import HostError, UsageError
from vmm.layout import MIB, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

MAP_NORESERVE = 0x4000
SEALS = 1 | 2 | 4
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW: a vhost-user peer, which is given the file, cannot cut
it short: an access beyond its end would be SIGBUS, the end of every machine of this process."""
PROT_RW = mmap.PROT_READ | mmap.PROT_WRITE


class FileMap(mmap.mmap):
    """A shared mapping that keeps the descriptor of its file, `fd`, for other processes."""

    fd = -1

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        super().close()


KINDS = ("anonymous", "memfd", "hugetlbfs", "file-private")


def map_backing(kind: str, size: int, *, path: str | None = None, offset: int = 0) -> mmap.mmap:
    """Map `size` bytes (a multiple of 4096; of 2 MiB for hugetlbfs) of the named kind.

    Args:
        kind: `anonymous` (private), `memfd` (shared, for vhost-user and other processes),
            `hugetlbfs` (a memfd of 2 MiB pages) or `file-private` (copy-on-write view of `path`).
        path: the file, for `file-private` only.
        offset: where in the file the mapping starts, bytes, page-aligned.

    Raises:
        UsageError: the kind is unknown, or the size does not fit it.
        HostError: the host has not the memory (or not the huge pages).
    """
    if size <= 0 or size % PAGE_SIZE:
        raise UsageError(f"memory: {size} bytes is not a positive multiple of {PAGE_SIZE}")
    try:
        if kind == "anonymous":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            return mmap.mmap(-1, size, flags=flags, prot=PROT_RW)
        if kind == "memfd":
            return _map_memfd(size, 0)
        if kind == "hugetlbfs":
            if size % (2 * MIB):
                raise UsageError(f"memory: {size} bytes is not a multiple of 2 MiB (hugetlbfs)")
            return _map_memfd(size, os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        if kind == "file-private":
            if path is None:
                raise UsageError("memory: backing 'file-private' needs a path")
            return _map_file(path, size, offset)
    except (OSError, OverflowError, MemoryError) as err:
        _refuse(kind, size, err)
    raise UsageError(f"memory: unknown backing {kind!r}; one of {', '.join(KINDS)}")


def _map_memfd(size: int, flags: int) -> mmap.mmap:
    import fcntl

    fd = os.memfd_create("vmm-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        # Shared: what a vhost-user back end writes must be what the guest reads. Huge pages are
        # reserved at once: without a reservation, one that is missing later is SIGBUS.
        sharing = mmap.MAP_SHARED if flags else mmap.MAP_SHARED | MAP_NORESERVE
        mapping = FileMap(fd, size, flags=sharing, prot=PROT_RW)
    except BaseException:
        os.close(fd)
        raise
    mapping.fd = fd
    return mapping


def _map_file(path: str, size: int, offset: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size < offset + size:
            # Pages past the end of a file are SIGBUS, for the guest and for us.
            raise UsageError(f"memory: {path} is shorter than {offset + size} bytes")
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        return mmap.mmap(fd, size, flags=flags, prot=PROT_RW, offset=offset)
    finally:
        os.close(fd)


def _refuse(kind: str, size: int, err: Exception) -> NoReturn:
    hint = "give the guest less memory"
    if kind == "hugetlbfs":
        hint = "reserve huge pages: sysctl vm.nr_hugepages=" + str(size // (2 * MIB))
    number = err.errno if isinstance(err, OSError) and err.errno else errno.ENOMEM
    if number in (errno.EMFILE, errno.ENFILE):
        hint = "see `ulimit -n`"
    raise HostError(
        f"memory: cannot map {size // MIB} MiB ({kind}): {os.strerror(number)}; {hint}"
    ) from err
