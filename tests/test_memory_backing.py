"""vmm/memory/backing.py: what each kind shares, keeps and refuses."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.tiny import descriptors
from vmm.errors import HostError, UsageError
from vmm.layout import GIB, MIB, PAGE_SIZE
from vmm.memory import map_backing


def written_by_a_child(mapping: mmap.mmap) -> bytes:
    """The first bytes after another process has written to its copy of the mapping."""
    pid = os.fork()
    if pid == 0:
        mapping[:5] = b"child"
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return mapping[:5]


@pytest.mark.parametrize(("kind", "seen"), [("anonymous", bytes(5)), ("memfd", b"child")])
def test_what_another_process_writes(kind: str, seen: bytes) -> None:
    with map_backing(kind, MIB) as mapping:
        assert len(mapping) == MIB
        assert mapping[:] == bytes(MIB)
        assert written_by_a_child(mapping) == seen


def test_a_file_is_copied_on_write_from_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    content = b"first".ljust(PAGE_SIZE, b"\0") + b"second".ljust(PAGE_SIZE, b"\0")
    path.write_bytes(content)
    with map_backing("file-private", PAGE_SIZE, path=str(path), offset=PAGE_SIZE) as mapping:
        assert mapping[:6] == b"second"
        mapping[:6] = b"mine!!"
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_memory_is_taken_only_when_used(kind: str) -> None:
    """More than any machine of ours has: a guest's size is an upper bound."""
    with map_backing(kind, 1024 * GIB) as mapping:
        mapping[512 * GIB] = 1
        assert mapping[512 * GIB] == 1


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "file-private"])
def test_no_descriptor_is_left(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGE_SIZE))
    before = descriptors()
    map_backing(kind, PAGE_SIZE, path=str(path)).close()
    with pytest.raises((UsageError, HostError)):
        map_backing(kind, 1 << 60, path=str(path))
    assert descriptors() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("anonymous", 0), "0 bytes is not a positive multiple of 4096"),
        (("anonymous", -4096), "-4096 bytes is not"),
        (("memfd", 4097), "4097 bytes is not"),
        (("hugetlbfs", 3 * MIB), "3145728 bytes is not a multiple of 2 MiB"),
        (("swap", 4096), "unknown backing 'swap'; one of anonymous, memfd, hugetlbfs, file-pr"),
        (("file-private", 4096), "'file-private' needs a path"),
    ],
)
def test_wrong_values_are_named(arguments: Sequence[str | int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        map_backing(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1 << 50, 1 << 62, 1 << 63, 1 << 70])
@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_what_cannot_be_had_is_a_host_error(kind: str, size: int) -> None:
    with pytest.raises(HostError, match=rf"cannot map {size >> 20} MiB \({kind}\): .*less memory"):
        map_backing(kind, size)


def test_files_that_are_not_there_or_too_short(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        map_backing("file-private", 4096, path=str(tmp_path / "absent"))
    short = tmp_path / "short"
    short.write_bytes(bytes(4096 + 4095))
    with pytest.raises(UsageError, match=rf"{short} is shorter than 8192 bytes"):
        map_backing("file-private", 4096, path=str(short), offset=4096)


def test_a_peer_cannot_cut_shared_memory_short() -> None:
    """A vhost-user back end has the descriptor; pages beyond the end would be SIGBUS."""
    mapping = map_backing("memfd", MIB)
    fd = os.dup(mapping.fd)  # type: ignore[attr-defined]
    try:
        for size in (0, MIB - PAGE_SIZE, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, 1033, 8)  # F_ADD_SEALS, F_SEAL_WRITE: not another seal either
        mapping[:4] = b"here"
        mapping.madvise(mmap.MADV_REMOVE, 0, PAGE_SIZE)  # what a balloon does
        assert mapping[:4] == bytes(4)
    finally:
        os.close(fd)
        mapping.close()
