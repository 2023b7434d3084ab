"""vmm/block/frozen.py: images under overlays, for machines that go back and for clones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import host
from vmm.block.frozen import Frozen
from vmm.block.overlay import CLUSTER, Overlay
from vmm.block.raw import RawImage

SIZE = 10 * CLUSTER + 4096


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Overlay]:
    """An overlay over a file; nothing of them is open at the end."""
    before = host.open_descriptors()
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    yield Overlay(RawImage(str(path), readonly=True))
    assert host.open_descriptors() == before


def content(image: Overlay | Frozen) -> bytes:
    data = bytearray(SIZE)
    image.read([memoryview(data)], 0)
    if image.read_cached([memoryview(cached := bytearray(SIZE))], 0, SIZE):
        assert cached == data
    return bytes(data)


def scribble(image: Overlay, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(10):
        data = chance.randbytes(512 * chance.randint(1, 300))
        image.write([memoryview(data)], chance.randrange(SIZE // 512 - 300) * 512)


def test_each_overlay_has_its_own(image: Overlay) -> None:
    scribble(image, 1)
    was = content(image)
    frozen = Frozen(image)
    tops = [Overlay(frozen.share()) for _ in range(3)]
    frozen.close()
    for seed, top in enumerate(tops, 5):
        assert content(top) == was
        scribble(top, seed)
    assert len({content(top) for top in tops} | {was}) == 4
    assert content(frozen) == was
    for top in tops:
        top.close()


def test_the_one_overlay_can_become_part_of_it(image: Overlay) -> None:
    """Byte for byte, with clusters that are written in part, and the last, which is not whole."""
    scribble(image, 1)
    frozen = Frozen(image)
    top = Overlay(frozen.share())
    scribble(top, 2)
    top.write([memoryview(b"the end".ljust(512))], SIZE - 512)
    now = content(top)
    assert frozen.take(top)
    assert content(frozen) == content(top) == now
    scribble(top, 3)
    top.clear()
    assert content(top) == now
    other = Overlay(frozen.share())
    assert not frozen.take(top)  # another reads it
    other.close()
    top.close()
    frozen.close()


def test_a_file_is_not_written_to(image: Overlay) -> None:
    frozen = Frozen(image.base)  # type: ignore[arg-type]
    top = Overlay(frozen.share())
    assert not frozen.take(top)
    top.close()
    frozen.close()
    image._close_file()
