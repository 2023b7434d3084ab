"""What can be wrong with a disk's requests."""

from __future__ import annotations

import errno
import os

from vmm.block.vector import cut
from vmm.faults.disk_layer import DiskFault
from vmm.faults.volatile import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.faults.disk_layer import Request


SOME_MAX = 8192
"""Sectors of a write that are kept or lost each by itself."""


class InjectedError(OSError):
    """An error that a fault made: the guest is told, a person is not, see `Block._failed`."""

    injected = True


class Fail(DiskFault):
    """The request fails with `errno`."""

    errno = errno.EIO

    def strike(self, request: Request) -> None:
        work, number = request.work, self.errno
        struck = False

        def fail() -> None:
            nonlocal struck
            if struck:  # a write that waited for space (werror=stop) is tried again
                work()
                return
            struck = True
            raise InjectedError(number, os.strerror(number))

        request.work = fail


class Latency(DiskFault):
    """The request waits for `delay` seconds, and up to `jitter` more, before it is carried out."""

    delay = jitter = 0.0

    def strike(self, request: Request) -> None:
        request.delay += self.delay + self.random.uniform(0, self.jitter)


class Gone(DiskFault):
    """The disk is away: requests fail or, if it is `silent`, have no answer until it is back."""

    silent = False

    def strike(self, request: Request) -> None:
        work = request.work
        if self.silent:
            request.until = self

        def gone() -> None:
            if self.active:
                raise InjectedError(errno.ENXIO, os.strerror(errno.ENXIO))
            work()

        request.work = gone


class ShortRead(DiskFault):
    """Only the first `keep` bytes are read; without `keep`, chance says how many.

    The rest of the guest's buffers stays as it was. The request fails, unless it is `silent`.
    """

    keep: int | None = None
    silent = False

    def strike(self, request: Request) -> None:
        data = request.data()
        size = sum(map(len, data))
        keep = self.random.randrange(max(size, 1)) if self.keep is None else min(self.keep, size)

        def short() -> None:
            if keep:
                self.layer.image.read(cut(data, keep)[0], request.offset)
            if not self.silent:
                raise InjectedError(errno.EIO, "short read")

        request.work = short


class Drop(DiskFault):
    """The request is answered, and not carried out."""

    def strike(self, request: Request) -> None:
        request.work = _nothing


class Torn(DiskFault):
    """Only some sectors of a write reach the disk, and it is answered as if all had.

    `some`: any of them, where it is of SOME_MAX at most; else the first few.
    """

    some = False

    def strike(self, request: Request) -> None:
        data, offset = request.data(), request.offset
        count = sum(map(len, data)) // SECTOR
        kept = self.random.randrange(max(count, 1))
        write = self.layer.image.write
        if not self.some or count > SOME_MAX:

            def torn() -> None:
                if kept:
                    write(cut(data, kept * SECTOR)[0], offset)
        else:
            places = sorted(self.random.sample(range(count), kept))

            def torn() -> None:
                whole = b"".join(data)
                for place in places:
                    at = place * SECTOR
                    write([memoryview(whole[at : at + SECTOR])], offset + at)

        request.work = torn


class Corrupt(DiskFault):
    """One bit is flipped: of what a read gives the guest, or of what a write puts on the disk."""

    def strike(self, request: Request) -> None:
        data, work = request.data(), request.work
        size = sum(map(len, data))
        if not size:
            return
        at, bit = self.random.randrange(size), 1 << self.random.randrange(8)

        def corrupt_read() -> None:
            work()
            view = cut(data, at)[1][0]
            view[0] ^= bit

        def corrupt_write() -> None:
            before, (view, *rest) = cut(data, at)
            bad = memoryview(bytes((view[0] ^ bit,)))
            self.layer.image.write([*before, bad, view[1:], *rest], request.offset)

        request.work = corrupt_read if request.what == "read" else corrupt_write


def _nothing() -> None:
    pass
