"""vmm.boot.initrd: concatenation, placement, what does not fit."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from vmm.boot.initrd import Initrds
from vmm.errors import BootError
from vmm.layout import GIB, MIB
from vmm.memory import GuestMemory

NO_LIMIT = 0xFFFFFFFF


def files(directory: Path, *contents: bytes) -> list[str]:
    paths = []
    for number, content in enumerate(contents):
        path = directory / f"initrd-{number}"
        path.write_bytes(content)
        paths.append(str(path))
    return paths


def test_each_starts_on_four_bytes(tmp_path: Path) -> None:
    with (
        GuestMemory(16 * MIB) as memory,
        Initrds(files(tmp_path, b"abcde", b"f", b"ghij")) as initrds,
    ):
        gpa, size = initrds.place(memory, 2 * MIB, NO_LIMIT)
        initrds.load(memory, gpa)
        assert size == 16
        assert memory.read(gpa, size) == b"abcde\0\0\0f\0\0\0ghij"


def test_none_at_all() -> None:
    with GuestMemory(16 * MIB) as memory, Initrds([]) as initrds:
        assert initrds.place(memory, 2 * MIB, 0) == (0, 0)


@pytest.mark.parametrize(
    ("memory_size", "highest", "end"),
    [
        (64 * MIB, NO_LIMIT, 64 * MIB),
        (64 * MIB, 0x2FFFFFF, 48 * MIB),
        (5 * GIB, NO_LIMIT, 3 * GIB),
        (5 * GIB, 0x7FFFFFFF, 2 * GIB),
    ],
)
def test_as_high_as_possible(tmp_path: Path, memory_size: int, highest: int, end: int) -> None:
    with GuestMemory(memory_size) as memory, Initrds(files(tmp_path, bytes(5000))) as initrds:
        gpa, size = initrds.place(memory, 2 * MIB, highest)
        assert (gpa, size) == (end - 8192, 5000)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3 * MIB + 1])
@pytest.mark.parametrize("lowest", [16 * MIB, 16 * MIB + 1, 17 * MIB - 1])
def test_the_least_memory_it_names_is_the_least(tmp_path: Path, size: int, lowest: int) -> None:
    with Initrds(files(tmp_path, bytes(size))) as initrds:
        with GuestMemory(4 * MIB) as memory, pytest.raises(BootError) as caught:
            initrds.place(memory, lowest, NO_LIMIT)
        named = re.fullmatch(
            "--memory 4M is too little for the kernel and the initrd: at least --memory ([0-9]+)M",
            str(caught.value),
        )
        assert named is not None
        least = int(named[1])
        with GuestMemory(least * MIB) as memory:
            gpa, placed = initrds.place(memory, lowest, NO_LIMIT)
            assert gpa >= lowest and gpa % 4096 == 0 and gpa + placed <= memory.size
        with GuestMemory((least - 1) * MIB) as memory, pytest.raises(BootError):
            initrds.place(memory, lowest, NO_LIMIT)


def test_too_large_for_where_the_kernel_looks(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 3 * GIB)  # sparse
    with (
        Initrds([str(path)]) as initrds,
        GuestMemory(5 * GIB) as memory,
        pytest.raises(BootError, match="make it smaller"),
    ):
        initrds.place(memory, 2 * MIB, NO_LIMIT)
    os.truncate(path, 20 * MIB)
    with (
        Initrds([str(path)]) as initrds,
        GuestMemory(64 * MIB) as memory,
        pytest.raises(BootError, match="0x1000000, up to where it can use them"),
    ):
        initrds.place(memory, 2 * MIB, 0xFFFFFF)


def test_a_kernel_past_all_ram_is_told() -> None:
    with (
        Initrds([]) as initrds,
        GuestMemory(64 * MIB) as memory,
        pytest.raises(BootError, match="where there is never any"),
    ):
        initrds.place(memory, 4 * GIB, NO_LIMIT)


def test_one_wrong_file_closes_the_others(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BootError, match=r"^--initrd .*missing: no such file$"):
        Initrds([*files(tmp_path, b"x"), str(tmp_path / "missing")])
    with pytest.raises(BootError, match=r"^--initrd .* is empty$"):
        Initrds(files(tmp_path, b"x", b""))
    assert os.listdir("/proc/self/fd") == before
