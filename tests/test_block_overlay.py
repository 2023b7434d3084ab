"""vmm/block/overlay.py: what is written is read, and the image is as it was."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.block.overlay import CLUSTER, Overlay
from vmm.block.raw import RawImage
from vmm.errors import HostError
from vmm.virtio import blk
from vmm.virtio.blk import Block

SIZE = 20 * CLUSTER + 3 * 4096
"""The last cluster is not whole."""


@pytest.fixture(params=["writeback", "none"])
def overlay(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Overlay]:
    """Over an image nobody may write, in a directory nobody may change."""
    path = tmp_path / "images" / "disk.img"
    path.parent.mkdir()
    path.write_bytes(random.Random(1).randbytes(SIZE))
    before, status = path.read_bytes(), path.stat()
    path.chmod(0o444)
    image = RawImage(str(path), readonly=True, cache=request.param)
    overlay = Overlay(image, directory=str(tmp_path))
    yield overlay
    overlay.close()
    overlay.close()
    after = path.stat()
    assert path.read_bytes() == before
    assert (after.st_mtime_ns, after.st_blocks) == (status.st_mtime_ns, status.st_blocks)
    assert os.listdir(tmp_path) == ["images"]
    assert os.listdir(path.parent) == ["disk.img"]


def content(overlay: Overlay, offset: int, size: int, *, pieces: int = 1) -> bytes:
    data = bytearray(size)
    step = -(-size // pieces)
    overlay.read([memoryview(data)[at : at + step] for at in range(0, size, step)], offset)
    return bytes(data)


@pytest.mark.parametrize("seed", range(6))
def test_any_operations(overlay: Overlay, seed: int) -> None:
    chance = random.Random(seed)
    model = bytearray(content(overlay, 0, SIZE))
    for number in range(300):
        sector = chance.randrange(SIZE // 512)
        if chance.random() < 0.3:
            sector = chance.randrange(SIZE // CLUSTER + 1) * CLUSTER // 512
        count = chance.choice((1, 1, 3, 8, 64, 128, 128, 256, 700))
        at, size = sector * 512, min(count, SIZE // 512 - sector) * 512
        kind = chance.random()
        if kind < 0.35:
            data = chance.randbytes(size)
            cut = chance.randrange(size)
            overlay.write([memoryview(data)[:cut], memoryview(data)[cut:]], at)
            model[at : at + size] = data
        elif kind < 0.5:
            overlay.write_zeroes(at, size, unmap=chance.random() < 0.5)
            model[at : at + size] = bytes(size)
        elif kind < 0.6:
            overlay.discard(at, size)
            model[at : at + size] = content(overlay, at, size)  # anything
        else:
            want = model[at : at + size]
            assert content(overlay, at, size, pieces=chance.randint(1, 5)) == want, number
            cached = bytearray(size)
            if not overlay.direct and overlay.read_cached([memoryview(cached)], at, size):
                assert cached == want, number
    overlay.flush()
    assert content(overlay, 0, SIZE) == model


def test_what_is_not_written_takes_no_space(overlay: Overlay) -> None:
    def blocks() -> int:
        return os.fstat(overlay._fd).st_blocks * 512

    assert blocks() == 0
    overlay.write_zeroes(0, SIZE, unmap=True)
    assert blocks() == 0
    assert content(overlay, 0, SIZE) == bytes(SIZE)
    overlay.write([memoryview(b"x" * 512)], 5 * CLUSTER + 512)
    assert blocks() <= 2 * CLUSTER
    overlay.discard(5 * CLUSTER, CLUSTER)
    assert blocks() == 0


def test_a_cluster_is_copied_once(overlay: Overlay) -> None:
    """Sectors of one cluster, first written at the same time, all stay."""
    model = bytearray(content(overlay, 0, 8 * CLUSTER))
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        data = bytes([number]) * 512
        for cluster in range(8):
            barrier.wait()
            overlay.write([memoryview(data)], cluster * CLUSTER + number * 1024)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cluster in range(8):
        for number in range(8):
            at = cluster * CLUSTER + number * 1024
            model[at : at + 512] = bytes([number]) * 512
    assert content(overlay, 0, 8 * CLUSTER) == model


def test_a_guest_writes_to_it(overlay: Overlay) -> None:
    with Driver(Block(overlay)) as driver:
        assert not driver.features >> blk.F_RO & 1
        for kind, write in ((blk.T_OUT, False), (blk.T_IN, True)):
            driver.memory.write(BUFFERS, kind.to_bytes(8, "little") + bytes(8))
            driver.memory.fill(BUFFERS + 4096, 512, 0 if write else 7)
            driver.rings[0].add(
                [(BUFFERS, 16, False), (BUFFERS + 4096, 512, write), (BUFFERS + 64, 1, True)]
            )
            driver.kick()
            while not driver.rings[0].used():
                pass
            assert driver.memory.read_u8(BUFFERS + 64) == blk.S_OK
        assert driver.memory.read(BUFFERS + 4096, 512) == b"\7" * 512


def test_3_tib_at_once(tmp_path: Path) -> None:
    path = tmp_path / "big.img"
    path.touch()
    os.truncate(path, 3 << 40)
    overlay = Overlay(RawImage(str(path), readonly=True), directory=str(tmp_path))
    overlay.write([memoryview(b"end!" * 128)], (3 << 40) - 512)
    assert content(overlay, (3 << 40) - 1024, 1024) == bytes(512) + b"end!" * 128
    overlay.close()
    assert path.stat().st_blocks == 0


def test_nowhere_to_write(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    base = RawImage(str(path), readonly=True)
    with pytest.raises(HostError, match=r"snapshot: No such file .* set TMPDIR to another"):
        Overlay(base, directory=str(tmp_path / "nosuch"))
    base.close()


def test_what_was_written_can_be_forgotten(overlay: Overlay) -> None:
    before = content(overlay, 0, SIZE)
    for seed in range(3):
        chance = random.Random(seed)
        for _ in range(20):
            data = chance.randbytes(512 * chance.randint(1, 200))
            overlay.write([memoryview(data)], chance.randrange(SIZE // 512 - 200) * 512)
        overlay.write_zeroes(SIZE - 8192, 8192, unmap=True)
        assert content(overlay, 0, SIZE) != before
        assert not overlay.empty
        overlay.clear()
        assert overlay.empty
        assert content(overlay, 0, SIZE) == before
        overlay.clear()


def contents(overlay: Overlay) -> bytes:
    data = bytearray(overlay.size)
    overlay.read([memoryview(data)], 0)
    return bytes(data)


def test_folding(overlay: Overlay, tmp_path: Path) -> None:
    """What is read is the same after it; what a guest has zeroed takes no space, nor time."""
    image = tmp_path / "images" / "top.img"
    chance = random.Random(3)
    try:
        for turn in range(30):
            image.write_bytes(contents(overlay))
            top = Overlay(RawImage(str(image), readonly=True), directory=str(tmp_path))
            for _ in range(turn % 5):
                at, end = sorted(chance.randrange(SIZE // 4096 + 1) * 4096 for _ in range(2))
                if at == end:
                    continue
                if chance.random() < 0.5:
                    top.write([memoryview(chance.randbytes(end - at))], at)
                else:
                    top.write_zeroes(at, end - at, unmap=True)
            want = contents(top)
            top.fold(overlay)
            assert contents(overlay) == want
            assert top.empty
            top.close()
        top = Overlay(RawImage(str(image), readonly=True), directory=str(tmp_path))
        top.write_zeroes(0, SIZE, unmap=True)
        top.fold(overlay)
        assert os.fstat(overlay._fd).st_blocks == 0
        assert contents(overlay) == bytes(SIZE)
        top.close()
    finally:
        image.unlink(missing_ok=True)
