"""vmm.faults.volatile: what a power cut takes, against a model of what a disk may do."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disk_guest import DiskGuest
from vmm.block.overlay import Overlay
from vmm.block.raw import RawImage
from vmm.errors import HostError, StateError, UsageError
from vmm.faults.volatile import SECTOR, WriteLog, copy
from vmm.virtio import blk

SECTORS = 256


@pytest.fixture
def path(tmp_path: Path) -> Path:
    disk = tmp_path / "disk.img"
    disk.write_bytes(random.Random(1).randbytes(SECTORS // 2 * SECTOR))
    os.truncate(disk, SECTORS * SECTOR)
    return disk


@pytest.fixture
def guest(path: Path) -> Iterator[DiskGuest]:
    with DiskGuest(path) as guest:
        guest.faults.volatile()
        yield guest


def zeroes(sector: int, count: int) -> bytes:
    return sector.to_bytes(8, "little") + count.to_bytes(8, "little")


class Model:
    """What each sector may hold after a power cut: the safe content, and what was written since."""

    def __init__(self, content: bytes) -> None:
        self.sectors = [[content[at : at + SECTOR]] for at in range(0, len(content), SECTOR)]

    def write(self, sector: int, data: bytes) -> None:
        for number in range(len(data) // SECTOR):
            self.sectors[sector + number].append(data[number * SECTOR :][:SECTOR])

    def flush(self) -> None:
        for values in self.sectors:
            del values[:-1]

    def content(self, which: int) -> bytes:
        return b"".join(values[which] for values in self.sectors)

    def allows(self, content: bytes) -> bool:
        return all(
            content[number * SECTOR :][:SECTOR] in values
            for number, values in enumerate(self.sectors)
        )


@pytest.mark.parametrize("seed", range(6))
def test_any_writes_and_any_cut(guest: DiskGuest, path: Path, tmp_path: Path, seed: int) -> None:
    """Random requests; now and then a cut, in each way there is."""
    chance = random.Random(seed)
    model = Model(path.read_bytes())
    image = tmp_path / "cut.img"
    kept = torn = 0
    for _ in range(150):
        sector, count = chance.randrange(SECTORS - 16), chance.randint(1, 16)
        action = chance.random()
        if action < 0.6:
            data = chance.randbytes(count * SECTOR)
            assert guest.put(sector, data) == blk.S_OK
            model.write(sector, data)
        elif action < 0.7:
            assert guest.request(blk.T_WRITE_ZEROES, out=zeroes(sector, count)) == blk.S_OK
            model.write(sector, bytes(count * SECTOR))
        elif action < 0.8:
            assert guest.flush() == blk.S_OK
            model.flush()
            assert guest.faults.unflushed == 0
        else:
            guest.faults.power_cut_image(str(image), keep="none")
            assert image.read_bytes() == model.content(0)
            guest.faults.power_cut_image(str(image), keep="all", torn=0)
            assert image.read_bytes() == model.content(-1)
            cut = guest.faults.power_cut_image(image, keep=0.7, torn=0.7)  # type: ignore[arg-type]
            assert model.allows(image.read_bytes())
            kept, torn = kept + cut.kept, torn + cut.torn
    assert path.read_bytes() == model.content(-1)  # the guest has seen nothing of it
    assert kept > torn > 0
    assert not list(tmp_path.glob("*.part"))


def test_what_is_kept_follows_from_the_seed(guest: DiskGuest, tmp_path: Path) -> None:
    chance = random.Random(3)
    for sector in range(0, 200, 10):
        assert guest.put(sector, chance.randbytes(8 * SECTOR)) == blk.S_OK
    found = []
    for seed in (1, 1, 2):
        guest.control.reseed(seed)
        cuts = []
        for name in ("a", "b"):  # the next is another one
            cut = guest.faults.power_cut_image(str(tmp_path / name))
            assert cut.lost + cut.kept == 20
            cuts.append((tmp_path / name).read_bytes())
        assert cuts[0] != cuts[1]
        found.append(cuts)
    assert found[0] == found[1] != found[2]
    assert repr(cut) == (
        f"<power cut: {cut.lost} writes lost, {cut.kept} kept, {cut.torn} of them torn>"
    )


def test_the_cut_of_the_image_itself(guest: DiskGuest, path: Path) -> None:
    before = path.read_bytes()
    assert guest.put(3, b"a" * SECTOR) == blk.S_OK
    assert guest.flush() == blk.S_OK
    assert guest.put(3, b"b" * SECTOR) == blk.S_OK
    assert guest.put(9, b"c" * SECTOR) == blk.S_OK
    guest.disk.halt()
    cut = guest.faults.cut(0.0, 0.0)
    assert (cut.lost, cut.kept) == (2, 0)
    assert path.read_bytes() == before[: 3 * SECTOR] + b"a" * SECTOR + before[4 * SECTOR :]
    assert guest.faults.unflushed == 0


def test_a_flush_that_lies(guest: DiskGuest, path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    with guest.faults.drop(on="flush"):
        assert guest.put(3, b"a" * SECTOR) == blk.S_OK
        assert guest.flush() == blk.S_OK
    guest.faults.power_cut_image(str(tmp_path / "cut"), keep="none")
    assert (tmp_path / "cut").read_bytes() == before


def test_a_flush_that_fails_makes_nothing_safe(guest: DiskGuest) -> None:
    assert guest.put(3, b"a" * SECTOR) == blk.S_OK
    with guest.faults.fail(on="flush"):
        assert guest.flush() == blk.S_IOERR
    assert guest.faults.unflushed == 1


def test_write_through_is_safe_at_once(guest: DiskGuest) -> None:
    guest.disk.config_written(blk.WRITEBACK, b"\0")
    assert guest.put(3, b"a" * SECTOR) == blk.S_OK
    assert guest.faults.unflushed == 0


def test_a_cache_that_is_full_is_written_out(path: Path, tmp_path: Path) -> None:
    with DiskGuest(path) as guest:
        guest.faults.volatile(cache=10 * SECTOR)
        for sector in range(200, 220):  # zeroes before: a write takes one sector's memory
            assert guest.put(sector, b"x" * SECTOR) == blk.S_OK
        assert guest.faults.unflushed == 10
        guest.faults.power_cut_image(str(tmp_path / "cut"), keep="none")
    left = (tmp_path / "cut").read_bytes()[200 * SECTOR : 220 * SECTOR]
    assert left == b"x" * (10 * SECTOR) + bytes(10 * SECTOR)


def test_writes_without_data_of_their_own_are_bounded_too(tmp_path: Path) -> None:
    """Zeroes in place of zeroes, by a guest that never flushes."""
    disk = tmp_path / "hole.img"
    disk.touch()
    os.truncate(disk, SECTORS * SECTOR)
    image = RawImage(str(disk))
    log = WriteLog(image, limit=100_000)
    with memoryview(bytes(SECTOR)) as nothing:
        for number in range(2000):
            log.write([nothing], number % SECTORS * SECTOR)
    assert 0 < log.unflushed < 1000
    image.close()


def test_a_write_that_no_cache_holds_is_written_out(path: Path) -> None:
    with DiskGuest(path) as guest:
        guest.faults.volatile(cache=10 * SECTOR)
        assert guest.put(1, b"a" * SECTOR) == blk.S_OK
        assert guest.put(8, b"b" * 11 * SECTOR) == blk.S_OK
        assert guest.faults.unflushed == 0
        assert guest.put(2, b"c" * SECTOR) == blk.S_OK
        assert guest.faults.unflushed == 1


def test_a_volatile_cache_can_be_taken_away(guest: DiskGuest, path: Path) -> None:
    assert guest.put(3, b"a" * SECTOR) == blk.S_OK
    guest.faults.durable()
    guest.faults.durable()
    assert guest.disk.faults is None
    guest.faults.volatile()
    assert guest.put(4, b"b" * SECTOR) == blk.S_OK
    guest.faults.cut(0.0, 0.0)
    assert path.read_bytes()[3 * SECTOR : 4 * SECTOR] == b"a" * SECTOR
    assert path.read_bytes()[4 * SECTOR : 5 * SECTOR] != b"b" * SECTOR


def test_a_disk_with_an_overlay(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    with DiskGuest(path, overlay=True) as guest:
        guest.faults.volatile()
        assert guest.put(3, b"a" * SECTOR) == blk.S_OK
        assert guest.flush() == blk.S_OK
        assert guest.put(4, b"b" * SECTOR) == blk.S_OK
        guest.faults.power_cut_image(str(tmp_path / "cut"), keep="none")
    assert path.read_bytes() == before
    after = before[: 3 * SECTOR] + b"a" * SECTOR + before[4 * SECTOR :]
    assert (tmp_path / "cut").read_bytes() == after


def test_images_while_the_guest_writes(guest: DiskGuest, tmp_path: Path) -> None:
    """Each image holds all that was flushed before it was asked for, and is of one moment."""
    over = threading.Event()
    done: list[int] = [0]

    def write() -> None:
        number = 0
        while not over.is_set() or number < 20:
            number += 1
            value = number.to_bytes(8, "little") * (SECTOR // 8)
            assert guest.put(0, value) == blk.S_OK
            assert guest.flush() == blk.S_OK
            assert guest.put(128, value) == blk.S_OK  # never without the one before it
            done[0] = number

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(10):
            safe = done[0]
            target = tmp_path / f"cut{number}"
            guest.faults.power_cut_image(str(target))
            content = target.read_bytes()
            first, second = (int.from_bytes(content[at : at + 8], "little") for at in (0, 65536))
            assert first >= safe
            assert second <= first or second > 1 << 32  # it was random before
    finally:
        over.set()
        writer.join(60)


def test_a_copy_is_sparse(path: Path, tmp_path: Path) -> None:
    os.truncate(path, 64 << 20)
    image = RawImage(str(path), readonly=True)
    for source in (image, Overlay(image)):
        with open(tmp_path / "copy", "wb") as target:
            copy(source, target.fileno())
        assert (tmp_path / "copy").stat().st_blocks * 512 < 4 << 20
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    image.close()


def test_the_log_undoes_what_it_did_in_any_order(path: Path) -> None:
    image = RawImage(str(path))
    log = WriteLog(image)
    before = path.read_bytes()
    for at, byte in ((0, b"a"), (SECTOR, b"b"), (0, b"c"), (2 * SECTOR, b"d")):
        log.write([memoryview(byte * 2 * SECTOR)], at)
    assert log.unflushed == 4
    log.cut(lambda at, data: image.write([memoryview(data)], at), 0.0, 0.0, random.Random(1))
    assert path.read_bytes() == before
    image.close()


def test_wrong_uses(path: Path, tmp_path: Path) -> None:
    with DiskGuest(path) as guest:
        with pytest.raises(StateError, match=r"call faults.disk\(0\).volatile\(\) before"):
            guest.faults.power_cut_image(str(tmp_path / "cut"))
        with pytest.raises(StateError, match=r"disk\(0\).unflushed: nobody knows"):
            _ = guest.faults.unflushed
        guest.faults.volatile()
        for keep in ("most", -0.1, 2, None):
            with pytest.raises(UsageError, match=r"keep=.* is not none, some, all or from 0 to 1"):
                guest.faults.power_cut_image(str(tmp_path / "cut"), keep)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="torn='x' is not from 0 to 1"):
            guest.faults.power_cut_image(str(tmp_path / "cut"), torn="x")  # type: ignore[arg-type]
        with pytest.raises(HostError, match="power_cut_image: /nowhere/cut: No such file"):
            guest.faults.power_cut_image("/nowhere/cut")
        with pytest.raises(UsageError, match=r"disk.img is the disk itself"):
            guest.faults.power_cut_image(str(path))
        (tmp_path / "directory").mkdir()
        with pytest.raises(HostError, match="Is a directory"):
            guest.faults.power_cut_image(str(tmp_path / "directory"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["directory", "disk.img"]
