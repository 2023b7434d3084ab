"""Copy-on-write guest memory: a base that stays as it is, and private mappings of it.

A base is what RAM held at a moment, in a memfd a region or in a snapshot's file. Memory over a base
maps it privately, so a page costs nothing until somebody writes to it; any number of machines share
one base, and going back to it is to undo the pages written since, which the page tables know
(`vmm.memory.pagemap`).
"""

from __future__ import annotations

import errno
import mmap
import os
from _thread import allocate_lock

from vmm.errors import HostError, StateError
from vmm.layout import PAGE_SIZE
from vmm.memory.backing import MAP_NORESERVE, PROT_RW

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory.guest import GuestMemory
    from vmm.memory.pagemap import Pagemap, Runs
    from vmm.memory.region import Region

CHUNK = 64 << 10
REFUSED = {
    "hugetlbfs": "memory of huge pages (hugetlbfs)",
    "uffd": "memory that another process hands over (pages='uffd')",
}
"""Kinds of regions that stay what they are."""
GAP = 8 * PAGE_SIZE
"""Where pages are given up, runs with less than that between them are one."""


class Base:
    """The contents of guest memory at one moment, for any number of memories; shared by counting.

    Args:
        fds: an open file for each region of RAM, in order; closed with the base.
        offsets: where in each the region begins, bytes, page-aligned; without: at 0.
        ours: nobody else knows the files: they may be written to while one memory uses them.

    Attributes:
        lost: somebody changes the files: no memory can go back to what they held.
    """

    __slots__ = ("_lock", "_ours", "_users", "_views", "fds", "lost", "offsets")

    def __init__(self, fds: list[int], offsets: list[int] | None = None, *, ours: bool) -> None:
        self.fds = fds
        self.offsets = offsets or [0] * len(fds)
        self.lost = False
        self._ours = ours
        self._views: dict[int, mmap.mmap] = {}
        self._users = 1
        self._lock = allocate_lock()

    @property
    def fixed(self) -> bool:
        """Whether it has to stay as it is: others use it, or the file is somebody's."""
        return self._users > 1 or not self._ours

    def map(self, number: int, size: int) -> mmap.mmap:
        """A private mapping of region `number`. Raises HostError."""
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        try:
            return mmap.mmap(
                self.fds[number], size, flags=flags, prot=PROT_RW, offset=self.offsets[number]
            )
        except (OSError, ValueError) as err:
            raise HostError(f"memory: cannot map {size} bytes of a base: {err}") from err

    def view(self, number: int, size: int) -> memoryview:
        """Region `number` as it is in the base, to be read and then released."""
        view = self._views.get(number)
        if view is None:
            view = self._views[number] = mmap.mmap(
                self.fds[number],
                size,
                flags=mmap.MAP_SHARED,
                prot=mmap.PROT_READ,
                offset=self.offsets[number],
            )
        return memoryview(view)

    def share(self) -> Base:
        """One user more."""
        with self._lock:
            self._users += 1
        return self

    def release(self) -> None:
        """One user less; the last one closes it."""
        with self._lock:
            self._users -= 1
            fds: list[int] = []
            if not self._users:
                fds, self.fds = self.fds, []
                for view in self._views.values():
                    view.close()
                self._views.clear()
        for fd in fds:
            os.close(fd)


def private_runs(memory: GuestMemory, pagemap: Pagemap) -> list[Runs]:
    """For each region of memory over a base, the pages that are no longer the base's: a run of
    them is (first byte, bytes)."""
    return [pagemap.private(region.hva, region.size) for region in memory.regions]


def copy(memory: GuestMemory, pagemap: Pagemap) -> Base:
    """The contents of `memory` as a base of their own; `memory` stays as it is, and must be still.

    Takes as long as copying what is in use.

    Raises:
        StateError: its kind of memory cannot be private page by page.
    """
    for region in memory.regions:
        if region.kind in REFUSED:
            raise StateError(f"{REFUSED[region.kind]} cannot be copied on write")
    fds: list[int] = []
    try:
        for number, region in enumerate(memory.regions):
            fd = os.memfd_create("vmm-base", os.MFD_CLOEXEC)
            fds.append(fd)
            os.ftruncate(fd, region.size)
            if memory.base is not None:
                _copy_data(memory.base, number, region, fd)
            elif region.kind != "anonymous":
                _copy_all(region, fd)
                continue
            for offset, size in pagemap.private(region.hva, region.size):
                _write(fd, region, offset, size)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return Base(fds, ours=True)


def settle(memory: GuestMemory, pagemap: Pagemap) -> Base:
    """Put `memory`, which must be still, over a base with its contents; that base, still its own.

    Where nobody else uses its former base, only pages written since are copied. Shared memory of a
    memfd is the base itself. Else what is in use is copied.

    Raises:
        StateError: its kind of memory cannot be private page by page.
    """
    if memory.base is not None and not memory.base.fixed:
        _commit(memory, memory.base, pagemap)
        return memory.base
    if all(region.kind == "memfd" for region in memory.regions):
        base = Base([os.dup(region.fd) for region in memory.regions], ours=True)
    else:
        base = copy(memory, pagemap)
    map_over_base(memory, base)
    return base


def map_over_base(memory: GuestMemory, base: Base) -> None:
    """Have `memory` be a private mapping of `base`, as it is; takes over the caller's share."""
    from vmm.memory.libc import map_over

    flags = mmap.MAP_PRIVATE | MAP_NORESERVE
    for number, region in enumerate(memory.regions):
        offset = base.offsets[number]
        map_over(region.hva, region.size, PROT_RW, flags, base.fds[number], offset)
        region.kind, region.fd = "base", -1
    former, memory.base = memory.base, base
    if former is not None:
        former.release()


def _commit(memory: GuestMemory, base: Base, pagemap: Pagemap) -> None:
    for region, fd in zip(memory.regions, base.fds, strict=True):
        runs = pagemap.private(region.hva, region.size)
        for offset, size in runs:
            _write(fd, region, offset, size)
        give_up(region, runs)


def _copy_data(base: Base, number: int, region: Region, fd: int) -> None:
    """What the base has of `region`, without its holes."""
    source, begin = base.fds[number], base.offsets[number]
    at, end = begin, begin + region.size
    while at < end:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as err:
            if err.errno != errno.ENXIO:  # no data after it
                raise
            return
        stop = min(os.lseek(source, at, os.SEEK_HOLE), end)
        while at < stop:
            os.lseek(fd, at - begin, os.SEEK_SET)
            at += os.sendfile(fd, source, at, stop - at)


def _copy_all(region: Region, fd: int) -> None:
    """Memory that may hold something anywhere, without what is zero."""
    zeroes = bytes(CHUNK)
    for offset in range(0, region.size, CHUNK):
        size = min(CHUNK, region.size - offset)
        if region.map[offset : offset + size] != zeroes[:size]:
            _write(fd, region, offset, size)


def _write(fd: int, region: Region, offset: int, size: int) -> None:
    end = offset + size
    while offset < end:
        offset += os.pwrite(fd, region.data[offset:end], offset)


def give_up(region: Region, runs: Runs) -> None:
    """Drop the private pages of `runs`: they read as the base again."""
    from vmm.memory.libc import IOV_MAX, IOVEC, advise_many

    joined = _joined(runs)
    for at in range(0, len(joined), IOV_MAX):
        part = joined[at : at + IOV_MAX]
        try:
            advise_many(
                b"".join(IOVEC.pack(region.hva + offset, size) for offset, size in part),
                mmap.MADV_DONTNEED,
            )
        except OSError:  # before Linux 6.13: not for oneself
            for offset, size in part:
                region.map.madvise(mmap.MADV_DONTNEED, offset, size)


def _joined(runs: Runs) -> Runs:
    joined: Runs = []
    for offset, size in runs:
        if joined and offset - sum(joined[-1]) < GAP:
            joined[-1] = (joined[-1][0], offset + size - joined[-1][0])
        else:
            joined.append((offset, size))
    return joined
