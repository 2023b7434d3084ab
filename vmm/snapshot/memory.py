"""Guest memory into a sparse file, all of it or what differs from a base, and from files back.

A file is as large as RAM, which is laid in it contiguously (what is above the 32-bit hole follows
what is below). Pages of zeroes are holes.
"""

from __future__ import annotations

import mmap
import os

from vmm.errors import HostError, StateError
from vmm.layout import HOLE_START, PAGE_SIZE
from vmm.memory import GuestMemory
from vmm.memory.backing import MAP_NORESERVE, PROT_RW
from vmm.memory.base import Base
from vmm.memory.pagemap import Pagemap
from vmm.snapshot.index import CHUNK, Index, crc, data_runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.memory import Region
    from vmm.snapshot.index import Runs

MAPPINGS_MAX = 1024
"""So many runs of differentials are mapped, the longest ones; what is left is read. A process may
have 65,530 mappings (vm.max_map_count)."""
LAYERS = "layers"
"""The kind of a region that is mapped from several files."""
_OVER = ("base", LAYERS)
_PAGE = bytes(PAGE_SIZE)
_CHUNK = bytes(CHUNK)


class Layer:
    """An open memory file and its index; closed with `close`."""

    __slots__ = ("fd", "index")

    def __init__(self, fd: int, index: Index) -> None:
        self.fd = fd
        self.index = index

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


# --- writing --------------------------------------------------------------------------------------


def write(
    fd: int, memory: GuestMemory, below: list[Layer] | None = None, *, since: bool = False
) -> Index:
    """Write `memory`, which is still, into an empty file.

    Args:
        below: write what differs from these: a full snapshot's layer, then differentials in order.
        since: `memory` is a private mapping of them, so that its own pages tell.
    """
    os.ftruncate(fd, memory.size)
    sums: dict[int, int] = {}
    runs: Runs = []
    for number, chunk in _candidates(memory, below, since):
        first = number * CHUNK
        size = len(chunk)
        if below is None:
            old = _CHUNK[:size]
        else:
            old = read_layers(below, first, size)
        if chunk == old:
            continue
        kept = bytearray(size)
        for at in range(0, size, PAGE_SIZE):
            page = chunk[at : at + PAGE_SIZE]
            if page == old[at : at + PAGE_SIZE]:
                continue
            kept[at : at + PAGE_SIZE] = page
            begin = first + at
            if runs and sum(runs[-1]) == begin:
                runs[-1] = (runs[-1][0], runs[-1][1] + PAGE_SIZE)
            else:
                runs.append((begin, PAGE_SIZE))
        found = crc(bytes(kept))
        if found:
            sums[number] = found
            _write_data(fd, kept, first)
    return Index(sums, runs)


def _write_data(fd: int, chunk: bytearray, offset: int) -> None:
    """The pages of `chunk` that are not zero."""
    at = 0
    while at < len(chunk):
        if chunk[at : at + PAGE_SIZE] == _PAGE:
            at += PAGE_SIZE
            continue
        end = at
        while end < len(chunk) and chunk[end : end + PAGE_SIZE] != _PAGE:
            end += PAGE_SIZE
        part = memoryview(chunk)[at:end]
        while part:
            done = os.pwrite(fd, part, offset + at)
            part, at = part[done:], at + done
        at = end


def _candidates(
    memory: GuestMemory, below: list[Layer] | None, since: bool
) -> Iterator[tuple[int, bytes]]:
    """(number, contents) of every chunk of RAM that may have to be written."""
    pagemap = Pagemap()
    try:
        offset = 0
        wanted: set[int] = set()
        for region in memory.regions:
            own = since or region.kind == "anonymous"
            for start, size in (
                pagemap.private(region.hva, region.size) if own else _touched(region)
            ):
                first, last = offset + start, offset + start + size - 1
                wanted.update(range(first // CHUNK, last // CHUNK + 1))
            offset += region.size
    finally:
        pagemap.close()
    for layer in () if since or below is None else below:
        for start, size in layer.index.runs:
            wanted.update(range(start // CHUNK, (start + size - 1) // CHUNK + 1))
    for number in sorted(wanted):
        yield number, _chunk(memory, number)


def _touched(region: Region) -> Runs:
    """Runs of pages of `region`, which is not anonymous, that may be anything but zero."""
    if region.fd >= 0:
        return [(start, end - start) for start, end in data_runs(region.fd, region.size)]
    return [(0, region.size)]


def _chunk(memory: GuestMemory, number: int) -> bytes:
    """Chunk `number` of RAM; it may run from one region into the next."""
    start, end = number * CHUNK, min((number + 1) * CHUNK, memory.size)
    parts = []
    offset = 0
    for region in memory.regions:
        low, high = max(start, offset), min(end, offset + region.size)
        if low < high:
            parts.append(region.map[low - offset : high - offset])
        offset += region.size
    return parts[0] if len(parts) == 1 else b"".join(parts)


# --- reading --------------------------------------------------------------------------------------


def read_layers(layers: list[Layer], offset: int, size: int) -> bytes:
    """What RAM held at [offset, offset + size) of the file, of the last layer that has it."""
    found = bytearray(os.pread(layers[0].fd, size, offset))
    found += bytes(size - len(found))
    view = memoryview(found)
    for layer in layers[1:]:
        for start, length in within(layer.index.runs, offset, size):
            at = start - offset
            os.preadv(layer.fd, [view[at : at + length]], start)
    view.release()
    return bytes(found)


def within(runs: Runs, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of `runs` in [offset, offset + size)."""
    from bisect import bisect_right

    at = max(bisect_right(runs, (offset, 1 << 63)) - 1, 0)
    end = offset + size
    for start, length in runs[at:]:
        if start >= end:
            return
        low, high = max(start, offset), min(start + length, end)
        if low < high:
            yield low, high - low


def owned(layers: list[Layer]) -> list[Runs]:
    """Of each layer but the first, the runs no later layer has."""
    result: list[Runs] = []
    later: Runs = []
    for layer in reversed(layers[1:]):
        result.append(_subtract(layer.index.runs, later))
        later = _union(layer.index.runs, later)
    return result[::-1]


def _subtract(runs: Runs, others: Runs) -> Runs:
    left: Runs = []
    for start, length in runs:
        end = start + length
        for low, size in within(others, start, length):
            if start < low:
                left.append((start, low - start))
            start = low + size
        if start < end:
            left.append((start, end - start))
    return left


def _union(runs: Runs, others: Runs) -> Runs:
    joined: Runs = []
    for start, length in sorted(runs + others):
        if joined and start <= sum(joined[-1]):
            end = max(sum(joined[-1]), start + length)
            joined[-1] = (joined[-1][0], end - joined[-1][0])
        else:
            joined.append((start, length))
    return joined


def map_layers(layers: list[Layer], size: int) -> GuestMemory:
    """Guest memory of `size` bytes as private mappings of the files; raises HostError.

    What it costs depends on how many runs of pages the differentials have, not on `size`.
    """
    from vmm.snapshot.lease import hold

    memory = map_base(layers[0].fd, size)
    try:
        if len(layers) > 1:
            _map_runs(memory, layers)
        hold(memory, [layer.fd for layer in layers])
    except BaseException:
        memory.close()
        raise
    return memory


def map_base(fd: int, size: int) -> GuestMemory:
    """Guest memory over one file, which stays open with it."""
    base = _base(fd, size)
    try:
        return GuestMemory(size, base=base)
    finally:
        base.release()


def _base(fd: int, size: int) -> Base:
    low = min(size, HOLE_START)
    offsets = [0] if size == low else [0, low]
    return Base([os.dup(fd) for _ in offsets], offsets, ours=False)


def need_private(memory: GuestMemory) -> None:
    """StateError, if another process shares it (or it is of huge pages)."""
    kinds = {region.kind for region in memory.regions} - {"anonymous", "file-private", *_OVER}
    if kinds:
        raise StateError(
            f"snapshot: memory of {' and '.join(sorted(kinds))} cannot become a private mapping; "
            "leave track out"
        )


def is_layered(memory: GuestMemory) -> bool:
    """Whether it is mapped from several files."""
    return all(region.kind == LAYERS for region in memory.regions)


def go_on_over(memory: GuestMemory, layers: list[Layer]) -> None:
    """Map `layers`, whose contents it has, over memory that is still. Raises HostError."""
    need_private(memory)
    former, memory.base = memory.base, None
    if len(layers) == 1:
        memory.base = _base(layers[0].fd, memory.size)
    offset = 0
    for region in memory.regions:
        _map(region.hva, region.size, layers[0].fd, offset)
        region.kind = "base" if memory.base is not None else LAYERS
        offset += region.size
    if former is not None:
        former.release()
    if len(layers) > 1:
        _map_runs(memory, layers)
    from vmm.snapshot.lease import hold

    hold(memory, [layer.fd for layer in layers])


def _map(address: int, size: int, fd: int, offset: int) -> None:
    from vmm.memory.libc import map_over

    try:
        map_over(address, size, PROT_RW, mmap.MAP_PRIVATE | MAP_NORESERVE, fd, offset)
    except OSError as err:
        raise HostError(f"memory: cannot map a snapshot's pages: {err}") from err


def _map_runs(memory: GuestMemory, layers: list[Layer]) -> None:
    # What it maps is not one file, so that it cannot be rolled back to one.
    base, memory.base = memory.base, None
    if base is not None:
        base.release()
    for region in memory.regions:
        region.kind = LAYERS
    pieces = [
        (length, start, layer.fd)
        for layer, runs in zip(layers[1:], owned(layers), strict=True)
        for start, length in runs
    ]
    pieces.sort(reverse=True)
    for number, (length, start, fd) in enumerate(pieces):
        for region, at, part, offset in _places(memory, start, length):
            if number < MAPPINGS_MAX:
                _map(region.hva + at, part, fd, offset)
            else:
                os.preadv(fd, [region.data[at : at + part]], offset)


def _places(memory: GuestMemory, start: int, length: int) -> Iterator[tuple[Region, int, int, int]]:
    """(region, offset within, bytes, offset in the file) of a run of the file."""
    offset = 0
    for region in memory.regions:
        low, high = max(start, offset), min(start + length, offset + region.size)
        if low < high:
            yield region, low - offset, high - low, low
        offset += region.size
