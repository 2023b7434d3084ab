"""vmm/memory/pagemap.py: who wrote does not matter, and neither does how the kernel is asked."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from vmm.layout import PAGE_SIZE
from vmm.memory import GuestMemory
from vmm.memory.base import Base
from vmm.memory.pagemap import VECTOR, Pagemap

PAGES = 2 * VECTOR + 100


@pytest.fixture(params=[True, False], ids=["scan", "read"])
def pagemap(request: pytest.FixtureRequest) -> Iterator[Pagemap]:
    made = Pagemap(scan=request.param)
    yield made
    made.close()
    made.close()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Over a file with data in its first half."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, PAGES * PAGE_SIZE)
    os.pwrite(fd, b"x" * (PAGES // 2 * PAGE_SIZE), 0)
    base = Base([fd], ours=True)
    with GuestMemory(PAGES * PAGE_SIZE, base=base) as made:
        base.release()
        yield made


def pages(runs: list[tuple[int, int]]) -> list[int]:
    found: list[int] = []
    for offset, size in runs:
        assert offset % PAGE_SIZE == size % PAGE_SIZE == 0 < size
        found += range(offset // PAGE_SIZE, (offset + size) // PAGE_SIZE)
    return found


def test_what_was_only_read_is_not_private(pagemap: Pagemap, memory: GuestMemory) -> None:
    region = memory.regions[0]
    assert sum(region.data[::PAGE_SIZE]) == PAGES // 2 * ord("x")
    assert pagemap.private(region.hva, region.size) == []


def test_pages_written_are_found(pagemap: Pagemap, memory: GuestMemory) -> None:
    region = memory.regions[0]
    chosen = sorted(random.Random(1).sample(range(PAGES), 300))
    for page in chosen:
        region.data[page * PAGE_SIZE + page % PAGE_SIZE] = 1
    assert pages(pagemap.private(region.hva, region.size)) == chosen
    half = PAGES // 2 * PAGE_SIZE
    upper = pages(pagemap.private(region.hva + half, region.size - half))
    assert [page + PAGES // 2 for page in upper] == [c for c in chosen if c >= PAGES // 2]


def test_more_runs_than_one_call_tells_of(pagemap: Pagemap, memory: GuestMemory) -> None:
    region = memory.regions[0]
    for page in range(0, PAGES, 2):
        region.data[page * PAGE_SIZE] = 1
    assert pages(pagemap.private(region.hva, region.size)) == list(range(0, PAGES, 2))


def test_each_run_is_told_of_once(pagemap: Pagemap, memory: GuestMemory) -> None:
    """The kernel's own account of how far it came is wrong with some hundreds of runs."""
    region = memory.regions[0]
    chosen = sorted(random.Random(2).sample(range(PAGES), 2 * PAGES // 3))
    for page in chosen:
        region.data[page * PAGE_SIZE] = 1
    assert pages(pagemap.private(region.hva, region.size)) == chosen


def test_a_write_by_the_kernel_counts(pagemap: Pagemap, memory: GuestMemory) -> None:
    """As by a device's readv(2) into guest memory."""
    region = memory.regions[0]
    reader, writer = os.pipe()
    try:
        os.write(writer, b"by the kernel")
        os.readv(reader, [region.data[5 * PAGE_SIZE - 3 : 5 * PAGE_SIZE + 10]])
    finally:
        os.close(reader)
        os.close(writer)
    assert pages(pagemap.private(region.hva, region.size)) == [4, 5]
