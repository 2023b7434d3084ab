"""vmm/memory/point.py: memory goes back to a point, compared with a plain copy, page for page."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import host
from tests.test_memory_base import contents, memory, pagemap, scribble
from vmm.layout import HOLE_START, MIB, PAGE_SIZE
from vmm.memory import GuestMemory, point
from vmm.memory import base as bases
from vmm.memory.base import Base
from vmm.memory.pagemap import Pagemap
from vmm.memory.point import COPY_PAGES

__all__ = ["memory", "pagemap"]  # fixtures


def test_every_write_is_undone(memory: GuestMemory, pagemap: Pagemap) -> None:
    start = point.take(memory, pagemap)
    before = contents(memory)
    assert start.restore(memory, pagemap) == 0
    for seed in range(2, 12):
        scribble(memory, seed, pages=seed * 10)
        assert contents(memory) != before
        assert start.restore(memory, pagemap) >= seed * 10
        assert contents(memory) == before
    start.close()


def test_many_pages_are_given_up(pagemap: Pagemap) -> None:
    """Beyond COPY_PAGES; nothing is this memory's own then."""
    pages = 3 * COPY_PAGES
    with GuestMemory(pages * PAGE_SIZE) as memory:
        scribble(memory, 1, pages=COPY_PAGES)
        start = point.take(memory, pagemap)
        before = contents(memory)
        scribble(memory, 2, pages=2 * COPY_PAGES)
        assert start.restore(memory, pagemap) == 2 * COPY_PAGES
        assert bases.private_runs(memory, pagemap) == [[]]
        assert contents(memory) == before
        scribble(memory, 3, pages=COPY_PAGES)
        assert start.restore(memory, pagemap) == COPY_PAGES
        assert contents(memory) == before
        assert bases.private_runs(memory, pagemap) != [[]]
        start.close()


def test_without_help_of_a_new_kernel(pagemap: Pagemap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.13 a process cannot madvise many ranges of its own at once."""
    from vmm.memory import libc

    def refuse(vector: bytes, advice: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(libc, "advise_many", refuse)
    test_many_pages_are_given_up(pagemap)


@pytest.fixture
def over_file(tmp_path: Path) -> Iterator[GuestMemory]:
    """As a restored machine's: over a file that is nobody's to write to."""
    path = tmp_path / "snapshot"
    data = random.Random(1).randbytes(16 * MIB)
    path.write_bytes(data)
    base = Base([os.open(path, os.O_RDONLY)], ours=False)
    with GuestMemory(16 * MIB, base=base) as made:
        base.release()
        yield made
    assert path.read_bytes() == data


@pytest.mark.parametrize("more", [10, COPY_PAGES], ids=["few", "many"])
def test_pages_beside_a_base_that_must_stay(
    over_file: GuestMemory, pagemap: Pagemap, more: int
) -> None:
    """No new base is made for them, and they come back too, whichever way the rest is undone."""
    memory = over_file
    scribble(memory, 2, pages=100)
    start = point.take(memory, pagemap)
    assert start.base is memory.base
    assert sum(len(content) for _, content in start.kept[0]) == 100 * PAGE_SIZE
    now = contents(memory)
    for seed in range(3):
        scribble(memory, seed, pages=more)
        start.restore(memory, pagemap)
        assert contents(memory) == now
    start.close()


def test_many_pages_beside_it_make_a_new_one(over_file: GuestMemory, pagemap: Pagemap) -> None:
    file = over_file.base
    scribble(over_file, 2, pages=100)
    start = point.take(over_file, pagemap, keep=99)
    assert over_file.base is start.base is not file
    now = contents(over_file)
    scribble(over_file, 3)
    start.restore(over_file, pagemap)
    assert contents(over_file) == now
    start.close()


def test_a_point_to_share(over_file: GuestMemory, pagemap: Pagemap) -> None:
    """Others become what this one is, which stays where it is."""
    scribble(over_file, 2, pages=100)
    now = contents(over_file)
    for keep in (100, 99):
        shared = point.take(over_file, pagemap, keep=keep, remap=False)
        assert (shared.base is over_file.base) == (keep == 100)
        with GuestMemory(over_file.size, base=shared.base) as other:
            shared.write_kept(other)
            assert contents(other) == now
            scribble(other, 3)
        assert contents(over_file) == now
        shared.close()


def test_back_although_it_was_put_over_something_else(
    memory: GuestMemory, pagemap: Pagemap
) -> None:
    """As by a snapshot that is to be the base of the next."""
    start = point.take(memory, pagemap)
    before = contents(memory)
    scribble(memory, 2)
    other = bases.copy(memory, pagemap)
    bases.map_over_base(memory, other)
    scribble(memory, 3)
    start.restore(memory, pagemap)
    assert contents(memory) == before
    assert memory.base is start.base
    assert other.fds == []
    start.close()


def test_two_regions(pagemap: Pagemap) -> None:
    """Each has its part of the base."""
    with GuestMemory(HOLE_START + MIB) as memory:
        low, high = memory.regions
        memory.write(0, b"low")
        memory.write(high.gpa, b"high")
        start = point.take(memory, pagemap)
        for where in (0, low.end - 1, high.gpa, high.end - 1):
            memory.write_u8(where, 0xFF)
        assert start.restore(memory, pagemap) == 4
        assert memory.read(high.gpa, 4) == b"high"
        assert (memory.read(0, 3), memory.read_u8(high.end - 1)) == (b"low", 0)
        start.close()


def test_nothing_is_left(memory: GuestMemory, pagemap: Pagemap) -> None:
    before = host.open_descriptors()
    start = point.take(memory, pagemap)
    scribble(memory, 2)
    start.restore(memory, pagemap)
    start.close()
    memory.close()
    assert host.open_descriptors() <= before
