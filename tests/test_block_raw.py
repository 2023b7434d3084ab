"""vmm/block/{raw,direct,libc}.py: opening, transfers, holes, O_DIRECT; locks are in
test_block_lock.py."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vmm.block import direct, libc
from vmm.block.raw import RawImage
from vmm.block.vector import whole
from vmm.errors import HostError, UsageError

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    disk = tmp_path / "disk.img"
    disk.write_bytes(random.Random(1).randbytes(MIB))
    return str(disk)


def content(image: RawImage, offset: int, size: int) -> bytes:
    data = bytearray(size)
    image.read([memoryview(data)], offset)
    return bytes(data)


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nosuch", "no such file; make one: truncate -s 1G {}/nosuch"),
        ("directory", "{}/directory is a directory, not a disk image"),
        ("fifo", "{}/fifo is neither a file nor a block device"),
        ("empty", "{}/empty is empty; a disk has at least one sector"),
        ("odd", "{}/odd: 1000 bytes is not whole sectors of 512; is it a disk's image?"),
        ("packed", "{}/packed: 1000 bytes is not whole sectors of 512; a gzip file? unpack it"),
        ("no/such", "{}/no/such: no such file, and no directory {}/no"),
        ("a b", "{}/a b: no such file; make one: truncate -s 1G '{}/a b'"),
        ("good/x", "{}/good/x: Not a directory"),
        ("loop", "{}/loop: Too many levels of symbolic links"),
    ],
)
def test_what_cannot_be_a_disk(tmp_path: Path, name: str, line: str, readonly: bool) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(bytes(1000))
    (tmp_path / "packed").write_bytes(b"\x1f\x8b" + bytes(998))
    (tmp_path / "good").write_bytes(bytes(512))
    (tmp_path / "loop").symlink_to("loop")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UsageError) as raised:
        RawImage(str(tmp_path / name), readonly=readonly)
    assert line.format(tmp_path, tmp_path) in str(raised.value)
    assert str(raised.value).startswith("--drive ") and "\n" not in str(raised.value)
    assert os.listdir("/proc/self/fd") == before


def test_a_character_device_is_no_disk() -> None:
    with pytest.raises(UsageError, match="--drive /dev/null is neither a file nor a block device"):
        RawImage("/dev/null")


def test_a_cache_that_is_none(path: str) -> None:
    with pytest.raises(UsageError, match="cache=magic is not one of writeback, none, unsafe"):
        RawImage(path, cache="magic")


@pytest.mark.parametrize("cache", ["writeback", "none", "unsafe"])
def test_it_holds_what_was_written(path: str, cache: str) -> None:
    chance, model = random.Random(2), bytearray(Path(path).read_bytes())
    image = RawImage(path, cache=cache)
    for _ in range(300):
        offset = chance.randrange(0, MIB // 512) * 512
        size = min(chance.choice((512, 1024, 4096, 20480)), MIB - offset)
        cut = chance.randrange(0, size + 1)
        if chance.random() < 0.5:
            data = chance.randbytes(size)
            image.write([memoryview(data)[:cut], memoryview(data)[cut:]], offset)
            model[offset : offset + size] = data
        else:
            assert content(image, offset, size) == model[offset : offset + size]
    image.flush()
    image.close()
    image.close()
    assert Path(path).read_bytes() == model


def test_what_the_cache_has_is_right(path: str) -> None:
    image = RawImage(path)
    os.fsync(image.fd)
    os.posix_fadvise(image.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    want, answers = Path(path).read_bytes(), []
    for offset in (0, 0, MIB - 512, MIB):
        data = bytearray(512)
        answers.append(image.read_cached([memoryview(data)], offset, 512))
        assert not answers[-1] or data == want[offset : offset + 512]
    assert not answers[-1]  # there is nothing beyond the end
    image.close()


def test_a_transfer_goes_on_where_it_stopped(path: str) -> None:
    """pwritev(2) may write less than it was given, anywhere in its buffers."""
    image, data, sizes = RawImage(path), random.Random(3).randbytes(3000), [7, 1, 500, 0, 2492]
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(data)[at : at + size])
        at += size

    def seven(fd: int, views: Sequence[memoryview], offset: int) -> int:
        return os.pwrite(fd, b"".join(views)[:7], offset)

    whole(seven, image.fd, views, 512)
    assert content(image, 512, 3000) == data
    image.close()


def test_beyond_the_end_is_an_error(path: str) -> None:
    image = RawImage(path)
    os.truncate(path, 512)
    with pytest.raises(OSError, match="short transfer"):
        content(image, 0, 1024)
    image.close()


def test_holes(path: str) -> None:
    image = RawImage(path)
    blocks = os.stat(path).st_blocks
    image.discard(0, MIB // 2)
    assert os.stat(path).st_blocks <= blocks - MIB // 2 // 512
    image.write_zeroes(MIB // 2, MIB // 4, unmap=True)
    assert os.stat(path).st_blocks <= blocks - 3 * MIB // 4 // 512
    image.write_zeroes(0, MIB // 4, unmap=False)
    assert content(image, 0, 3 * MIB // 4) == bytes(3 * MIB // 4)
    assert any(content(image, 3 * MIB // 4, 512))
    assert os.stat(path).st_size == MIB
    image.close()


def test_an_image_that_keeps_its_space(path: str) -> None:
    image = RawImage(path, discard="off")
    blocks, before = os.stat(path).st_blocks, content(image, 0, MIB // 2)
    image.discard(0, MIB // 2)
    assert content(image, 0, MIB // 2) == before
    image.write_zeroes(0, MIB // 2, unmap=True)
    assert content(image, 0, MIB) == bytes(MIB // 2) + Path(path).read_bytes()[MIB // 2 :]
    assert not any(content(image, 0, MIB // 2))
    assert os.stat(path).st_blocks >= blocks
    image.close()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs at /dev/shm")
def test_zeroes_where_the_file_system_knows_none() -> None:
    """tmpfs has no FALLOC_FL_ZERO_RANGE."""
    name = f"/dev/shm/vmm-test-{os.getpid()}.img"
    try:
        Path(name).write_bytes(b"x" * 3 * MIB)
        image = RawImage(name)
        image.write_zeroes(512, 2 * MIB + 512, unmap=False)
        image.close()
        data = Path(name).read_bytes()
        assert data == b"x" * 512 + bytes(2 * MIB + 512) + b"x" * (MIB - 1024)
    finally:
        os.unlink(name)


# --- O_DIRECT -------------------------------------------------------------------------------------


@pytest.fixture
def four_k(path: str) -> Iterator[RawImage]:
    """As on a disk with blocks of 4 KiB; every one of its transfers is of whole blocks."""
    image = RawImage(path, cache="none")
    image.align = 4096
    yield image
    image.close()


def test_the_kernel_says_what_it_wants(path: str) -> None:
    image = RawImage(path, cache="none")
    assert image.align in (512, 1024, 2048, 4096)
    assert libc.dio_offset_align(image.fd) in (image.align, None)
    image.close()
    with pytest.raises(OSError, match="Bad file"):
        direct.alignment(image.fd)


def test_parts_of_blocks_by_many_at_once(four_k: RawImage) -> None:
    """None of them undoes what another writes to the same block, nor do whole blocks get lost."""
    chance = random.Random(4)
    model = bytearray(content(four_k, 0, 65536))
    jobs: list[list[tuple[int, bytes]]] = [[] for _ in range(8)]
    for number in range(8):  # each has a sector of each of the first blocks, or a block, for itself
        for _ in range(60):
            if number < 6:
                at, size = chance.randrange(12) * 4096 + number * 512, 512
            else:
                at, size = (12 + 2 * (number - 6) + chance.randrange(2)) * 4096, 4096
            data = chance.randbytes(size)
            jobs[number].append((at, data))
            model[at : at + size] = data

    def work(mine: list[tuple[int, bytes]]) -> None:
        for at, data in mine:
            four_k.write([memoryview(data)], at)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(four_k, 0, 65536) == model


def test_who_changes_a_part_is_alone() -> None:
    writers, inside, seen = direct.Writers(), [], set()
    lock = threading.Lock()

    def work(kind: str) -> None:
        def write() -> None:
            with lock:
                inside.append(kind)
            for _ in range(100):
                seen.add("".join(sorted(inside)))
            with lock:
                inside.remove(kind)

        for _ in range(100):
            (writers.alone if kind == "A" else writers.together)(write)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in "AAtttt"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []
    assert "A" in seen and all(kinds == "A" or "A" not in kinds for kinds in seen)


def test_a_block_device(loop_device: str) -> None:
    image = RawImage(loop_device, cache="none")
    assert (image.size, image.align) == (8 * MIB, 4096)
    image.write([memoryview(b"x" * 512)], 1536)
    image.write([memoryview(b"y" * 4096)], 8192)
    image.flush()
    assert content(image, 0, 4096) == bytes(1536) + b"x" * 512 + bytes(2048)
    image.discard(8192, 4096)
    image.write([memoryview(b"z" * 8192)], MIB)
    image.write_zeroes(MIB, 4096, unmap=True)
    assert content(image, MIB, 8192) == bytes(4096) + b"z" * 4096
    with pytest.raises(HostError, match=r"this host uses the device; unmount it"):
        RawImage(loop_device)  # O_EXCL, as for a file system that is mounted
    image.close()
    RawImage(loop_device, readonly=True).close()
    RawImage(loop_device).close()


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_ranges_of_a_device_that_are_no_whole_blocks(loop_device: str, cache: str) -> None:
    """A guest whose sectors are 512 bytes, on blocks of 4 KiB: zeroes are zeroes, neighbours stay,
    and a discard touches whole blocks only."""
    image = RawImage(loop_device, cache=cache)
    assert image.block == 4096
    chance = random.Random(6)
    model = bytearray(chance.randbytes(64 * 1024))
    image.write([memoryview(model)], 0)
    ranges = [(8, 8), (3, 8), (17, 1), (7, 2), (1, 126), (0, 1), (9, 23), (16, 16)]
    for sector, count in ranges + [(s, c) for c, s in ranges if s + c <= 128]:
        image.write_zeroes(512 * sector, 512 * count, unmap=chance.random() < 0.5)
        model[512 * sector : 512 * (sector + count)] = bytes(512 * count)
        assert content(image, 0, len(model)) == model
        at, data = 512 * chance.randrange(120), chance.randbytes(4096)
        image.write([memoryview(data)], at)
        model[at : at + 4096] = data
    for sector, count in ranges:
        image.discard(512 * sector, 512 * count)
        start, end = -(-sector // 8) * 4096, (sector + count) // 8 * 4096
        now = content(image, 0, len(model))
        assert now[:start] + now[max(start, end) :] == model[:start] + model[max(start, end) :]
        image.write([memoryview(model)], 0)
    image.close()


@pytest.mark.parametrize("readonly", [False, True])
def test_direct_wants_whole_blocks(loop_device: str, tmp_path: Path, readonly: bool) -> None:
    """A file system on a disk with blocks of 4 KiB; an image of 4.5 KiB on it."""
    mount, made = tmp_path / "mount", shutil.which("mke2fs", path="/sbin:/usr/sbin:/usr/bin")
    if made is None:
        pytest.skip("no mke2fs")
    mount.mkdir()
    subprocess.run([made, "-q", "-b", "4096", loop_device], check=True)
    subprocess.run(["mount", loop_device, str(mount)], check=True)
    try:
        path = str(mount / "disk.img")
        Path(path).write_bytes(bytes(4096 + 512))
        line = f"{path}: 4608 bytes is not whole blocks of 4096, which cache=none needs"
        with pytest.raises(UsageError, match=line):
            RawImage(path, cache="none", readonly=readonly)
        RawImage(path, readonly=readonly).close()
        os.truncate(path, 8192)
        image = RawImage(path, cache="none")
        image.write([memoryview(b"x" * 512)], 512)
        assert content(image, 0, 2048) == bytes(512) + b"x" * 512 + bytes(1024)
        image.close()
    finally:
        subprocess.run(["umount", str(mount)], check=True)
