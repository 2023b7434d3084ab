"""Guest memory: bounds, regions around the hole, views, backings."""

from __future__ import annotations

import os
import random

import pytest

from vmm.errors import GuestMemoryError, HostError, UsageError
from vmm.layout import GIB, HOLE_END, HOLE_START, MIB
from vmm.memory import GuestMemory


@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (4096, [(0, 4096)]),
        (HOLE_START, [(0, HOLE_START)]),
        (HOLE_START + 4096, [(0, HOLE_START), (HOLE_END, 4096)]),
        (5 * GIB, [(0, HOLE_START), (HOLE_END, 2 * GIB)]),
    ],
)
def test_regions_leave_the_hole_free(size: int, regions: list[tuple[int, int]]) -> None:
    with GuestMemory(size) as memory:
        assert [(r.gpa, r.size) for r in memory.regions] == regions


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_integers_are_little_endian_and_round_trip(backing: str) -> None:
    with GuestMemory(MIB, backing) as memory:
        memory.write_u64(0x101, 0x1122334455667788)
        assert memory.read(0x101, 8) == bytes.fromhex("8877665544332211")
        assert memory.read_u8(0x101) == 0x88
        assert memory.read_u16(0x102) == 0x6677
        assert memory.read_u32(0x105) == 0x11223344
        memory.write_u8(0, 0xFF)
        memory.write_u16(1, 0xABCD)
        memory.write_u32(3, 0xDEADBEEF)
        assert memory.read(0, 7) == b"\xff\xcd\xab\xef\xbe\xad\xde"


def test_every_access_outside_is_refused() -> None:
    with GuestMemory(5 * GIB) as memory:
        edges = [
            (-1, 1), (-1, 2), (0, -1), (HOLE_START, 1), (HOLE_START - 1, 2), (HOLE_END - 1, 1),
            (HOLE_END - 1, 2), (6 * GIB, 1), (6 * GIB - 1, 2), (1 << 63, 8), (1 << 64, 8),
            ((1 << 64) - 4, 8), (0, 6 * GIB),
        ]  # fmt: skip
        for gpa, size in edges:
            assert not memory.contains(gpa, size)
            with pytest.raises(GuestMemoryError):
                memory.read(gpa, size)
            with pytest.raises(GuestMemoryError):
                memory.view(gpa, size)
        with pytest.raises(GuestMemoryError):
            memory.write(HOLE_START - 1, b"ab")
        for reader in (memory.read_u16, memory.read_u32, memory.read_u64):
            with pytest.raises(GuestMemoryError):
                reader(HOLE_START - 1)


def test_random_ranges_agree_with_a_model() -> None:
    rng = random.Random(2)
    regions = [(0, HOLE_START), (HOLE_END, HOLE_END + GIB)]
    with GuestMemory(HOLE_START + GIB) as memory:
        for _ in range(20000):
            gpa = rng.choice([0, HOLE_START, HOLE_END, HOLE_END + GIB]) + rng.randint(-9, 9)
            size = rng.choice([0, 1, 2, 4, 8, rng.randint(0, GIB)])
            expected = any(lo <= gpa and gpa + size <= hi for lo, hi in regions)
            assert memory.contains(gpa, size) == expected


def test_view_is_no_copy_and_survives_close() -> None:
    memory = GuestMemory(MIB)
    view = memory.view(0x2000, 4)
    view[:] = b"abcd"
    assert memory.read(0x2000, 4) == b"abcd"
    memory.write(0x2001, b"X")
    assert bytes(view) == b"aXcd"
    memory.close()
    assert len(bytes(view)) == 4  # readable still, though its pages are given back


def test_iov_lists_views_and_is_all_or_nothing() -> None:
    with GuestMemory(MIB) as memory:
        memory.write(0, b"0123456789")
        views = memory.iov([(0, 2), (5, 0), (8, 2)])
        assert [bytes(v) for v in views] == [b"01", b"89"]
        for bad in ([(0, 1), (MIB - 1, 2)], [(0, -1)], [(1 << 64, 1)]):
            with pytest.raises(GuestMemoryError):
                memory.iov(bad)


def test_resident_counts_pages_touched() -> None:
    with GuestMemory(5 * GIB) as memory:
        low, high = memory.regions
        assert high.resident() < MIB
        memory.fill(HOLE_END + GIB, 8 * MIB, 1)
        assert 8 * MIB <= high.resident() < 16 * MIB
        assert low.resident() < 8 * MIB


def test_file_private_does_not_touch_the_file(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "ram")
    with open(path, "wb") as file:
        file.write(b"snapshot".ljust(8192, b"\0"))
    with GuestMemory(8192, "file-private", path) as memory:
        assert memory.read(0, 8) == b"snapshot"
        memory.write(0, b"changed!")
        assert memory.read(0, 8) == b"changed!"
    with open(path, "rb") as file:
        assert file.read(8) == b"snapshot"
    with pytest.raises(UsageError, match="shorter"):
        GuestMemory(16384, "file-private", path)


def test_hugetlbfs_works_or_says_how_to() -> None:
    try:
        with GuestMemory(4 * MIB, "hugetlbfs") as memory:
            memory.write_u32(0, 1)
    except HostError as err:
        assert "vm.nr_hugepages=2" in str(err)
    with pytest.raises(UsageError, match="2 MiB"):
        GuestMemory(3 * MIB, "hugetlbfs")


@pytest.mark.parametrize(("size", "backing"), [(0, "anonymous"), (-4096, "memfd"), (100, "memfd")])
def test_bad_sizes(size: int, backing: str) -> None:
    with pytest.raises(UsageError):
        GuestMemory(size, backing)


def test_bad_backings() -> None:
    with pytest.raises(UsageError, match="anonymous, memfd"):
        GuestMemory(4096, "swap")
    with pytest.raises(UsageError, match="path"):
        GuestMemory(4096, "file-private")


def test_more_than_the_address_space_is_a_clear_error() -> None:
    with pytest.raises(HostError, match="less memory"):
        GuestMemory(1 << 50)
