"""vmm/memory/base.py: memory over a base, compared with a plain copy, page for page."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import host
from vmm.errors import HostError, StateError
from vmm.layout import HOLE_START, MIB, PAGE_SIZE
from vmm.memory import GuestMemory
from vmm.memory import base as bases
from vmm.memory.base import Base
from vmm.memory.pagemap import Pagemap

SIZE = 4 * MIB


@pytest.fixture
def pagemap() -> Iterator[Pagemap]:
    made = Pagemap()
    yield made
    made.close()


def scribble(memory: GuestMemory, seed: int, pages: int = 50) -> None:
    """Overwrite parts of that many pages."""
    chance = random.Random(seed)
    for page in chance.sample(range(memory.size // PAGE_SIZE), pages):
        memory.write(page * PAGE_SIZE + chance.randrange(3000), chance.randbytes(1000))


def contents(memory: GuestMemory) -> bytes:
    return memory.read(0, memory.size)


@pytest.fixture(params=["anonymous", "memfd", "file-private"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GuestMemory]:
    """Memory of each kind that can be put over a base, with something in it."""
    path = tmp_path / "ram"
    path.write_bytes(b"\0" * MIB + b"of the file" * 50_000 + b"\0" * (SIZE - MIB - 550_000))
    with GuestMemory(SIZE, request.param, str(path)) as made:
        scribble(made, 1)
        yield made


def test_nothing_changes_when_it_is_put_over_a_base(memory: GuestMemory, pagemap: Pagemap) -> None:
    before = contents(memory)
    view = memory.view(0, SIZE)
    base = bases.settle(memory, pagemap)
    assert memory.base is base
    assert contents(memory) == before == view
    assert [os.pread(fd, SIZE, 0) for fd in base.fds] == [before]
    memory.write(10, b"by a view that was there before")
    assert view[10:13] == b"by "
    assert os.pread(base.fds[0], 3, 10) == before[10:13]


def test_a_new_base_in_the_old_ones_place(memory: GuestMemory, pagemap: Pagemap) -> None:
    """Only what was written since is copied, and nothing else may see that."""
    first = bases.settle(memory, pagemap)
    scribble(memory, 2)
    now = contents(memory)
    assert bases.settle(memory, pagemap) is first
    assert contents(memory) == now
    assert bases.private_runs(memory, pagemap) == [[]]
    assert os.pread(first.fds[0], SIZE, 0) == now


def test_a_shared_base_stays_as_it_is(memory: GuestMemory, pagemap: Pagemap) -> None:
    first = bases.settle(memory, pagemap)
    was = contents(memory)
    with GuestMemory(SIZE, base=first) as other:
        assert contents(other) == was
        scribble(memory, 2)
        scribble(other, 3)
        mine, its = contents(memory), contents(other)
        second = bases.settle(memory, pagemap)
        assert second is not first
        assert (contents(memory), contents(other)) == (mine, its)
        assert os.pread(first.fds[0], SIZE, 0) == was


def test_a_copy_leaves_memory_alone(memory: GuestMemory, pagemap: Pagemap) -> None:
    bases.settle(memory, pagemap)
    was = contents(memory)
    scribble(memory, 2)
    now = contents(memory)
    made = bases.copy(memory, pagemap)
    try:
        assert os.pread(made.fds[0], SIZE, 0) == now
        assert memory.base is not made
        assert os.pread(memory.base.fds[0], SIZE, 0) == was  # type: ignore[union-attr]
    finally:
        made.release()
    assert contents(memory) == now


def test_a_base_in_a_file_is_not_written_to(tmp_path: Path, pagemap: Pagemap) -> None:
    """As a snapshot's: RAM begins somewhere in it, and it is a person's."""
    path = tmp_path / "snapshot"
    data = random.Random(1).randbytes(SIZE)
    path.write_bytes(b"head".ljust(PAGE_SIZE) + data)
    base = Base([os.open(path, os.O_RDONLY)], [PAGE_SIZE], ours=False)
    with GuestMemory(SIZE, base=base) as memory:
        base.release()
        assert contents(memory) == data
        scribble(memory, 1)
        now = contents(memory)
        assert bases.settle(memory, pagemap) is not base
        scribble(memory, 2)
        assert contents(memory) != now
    assert path.read_bytes() == b"head".ljust(PAGE_SIZE) + data


def test_two_regions(pagemap: Pagemap) -> None:
    """Each has its part of the base."""
    with GuestMemory(HOLE_START + MIB) as memory:
        high = memory.regions[1]
        memory.write(0, b"low")
        memory.write(high.gpa, b"high")
        base = bases.settle(memory, pagemap)
        with GuestMemory(memory.size, base=base) as other:
            assert (other.read(0, 3), other.read(high.gpa, 4)) == (b"low", b"high")


def test_holes_stay_holes(pagemap: Pagemap) -> None:
    """A base takes the memory that is in use, and so does a copy of it."""
    with GuestMemory(1 << 30) as memory:
        memory.write(500 * MIB, b"x")
        first = bases.settle(memory, pagemap)
        assert os.fstat(first.fds[0]).st_blocks * 512 <= 4 * MIB  # a huge page, maybe
        memory.write(700 * MIB, b"y")
        second = bases.copy(memory, pagemap)
        assert os.fstat(second.fds[0]).st_blocks * 512 <= 4 * MIB
        assert os.pread(second.fds[0], 1, 700 * MIB) == b"y"
        second.release()


def test_nothing_is_left(memory: GuestMemory, pagemap: Pagemap) -> None:
    before = host.open_descriptors()
    base = bases.settle(memory, pagemap)
    others = [GuestMemory(SIZE, base=base) for _ in range(5)]
    for other in others:
        other.close()
    assert bases.settle(memory, pagemap) is base  # nobody else uses it any more
    memory.close()
    assert host.open_descriptors() <= before
    memory.close()


def test_huge_pages_are_refused(pagemap: Pagemap) -> None:
    try:
        memory = GuestMemory(SIZE, "hugetlbfs")
    except HostError:
        pytest.skip("no huge pages are reserved here")
    with memory, pytest.raises(StateError, match="huge pages"):
        bases.settle(memory, pagemap)
