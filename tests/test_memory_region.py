"""vmm/memory/region.py: where a region is, what it takes, and what closing gives back."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from vmm.layout import GIB, MIB, PAGE_SIZE
from vmm.memory import Region, map_backing


def test_it_knows_its_addresses() -> None:
    mapping = map_backing("memfd", MIB)
    region = Region(4 * GIB, mapping, "memfd")
    try:
        assert (region.gpa, region.size, region.end) == (4 * GIB, MIB, 4 * GIB + MIB)
        assert repr(region) == "Region(0x100000000..0x1000fffff, memfd)"
        mapping[0x123:0x127] = b"here"
        assert ctypes.string_at(region.hva + 0x123, 4) == b"here"
        region.data[0x123] = ord("H")
        assert mapping[0x123:0x127] == b"Here"
    finally:
        assert region.close()
    assert mapping.closed


@pytest.mark.parametrize(("kind", "kept"), [("anonymous", 0), ("memfd", 7)])
def test_a_view_outlives_it(kind: str, kept: int) -> None:
    """The pages of a private mapping go at once; those of a shared one may be another's too."""
    region = Region(0, map_backing(kind, MIB), kind)
    region.data[5] = 7
    view = memoryview(region.map)[4:8]
    assert region.close() is False
    assert view[1] == kept
    view[1] = 9
    assert view[1] == 9


def test_resident_counts_pages_written() -> None:
    region = Region(0, map_backing("anonymous", GIB), "anonymous")
    region.map.madvise(15)  # MADV_NOHUGEPAGE: one page a write
    try:
        assert region.resident() == 0
        for page in (0, 1, 7, 1000, GIB // PAGE_SIZE - 1):
            region.data[page * PAGE_SIZE] = 1
        assert region.resident() == 5 * PAGE_SIZE
    finally:
        region.close()


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
@pytest.mark.parametrize(("offset", "size", "pages"), [
    (0, 8 * PAGE_SIZE, range(8)), (PAGE_SIZE, 1, range(0)), (1, 2 * PAGE_SIZE, range(1, 2)),
    (PAGE_SIZE, PAGE_SIZE, range(1, 2)), (6 * PAGE_SIZE, 1 << 40, range(6, 8)),
    (-5 * PAGE_SIZE, 6 * PAGE_SIZE, range(1)), (1 << 40, PAGE_SIZE, range(0)),
])  # fmt: skip
def test_discard_gives_whole_pages_back(kind: str, offset: int, size: int, pages: range) -> None:
    region = Region(0, map_backing(kind, 8 * PAGE_SIZE), kind)
    try:
        region.data[:] = b"\1" * region.size
        assert region.discard(offset, size) == len(pages) * PAGE_SIZE
        assert region.resident() == (8 - len(pages)) * PAGE_SIZE
        kept = [region.data[page * PAGE_SIZE] for page in range(8)]
        assert kept == [int(page not in pages) for page in range(8)]
    finally:
        region.close()


@pytest.mark.parametrize(("kind", "asked"), [("anonymous", True), ("memfd", False)])
def test_huge_pages_are_asked_for_private_memory_only(kind: str, asked: bool) -> None:
    region = Region(0, map_backing(kind, 4 * MIB), kind)
    try:
        region.prefer_huge_pages()
        smaps = Path("/proc/self/smaps").read_text()
        mine = False
        for line in smaps.splitlines():
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                mine = int(match[1], 16) <= region.hva < int(match[2], 16)
            elif mine and line.startswith("VmFlags:"):
                assert ("hg" in line.split()) == asked
                return
        pytest.fail("not in smaps")
    finally:
        region.close()
