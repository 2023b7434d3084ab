"""vmm/virtio/kernel: built where there is a compiler, used, and doing as the Python does.

What a broken driver may do to it is in test_virtio_hostile.py; the device's tests run over both.
"""

from __future__ import annotations

import random
import runpy
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.block.raw import RawImage
from vmm.virtio import kernel, spec
from vmm.virtio.blk import T_GET_ID, T_IN, T_OUT, Block

SIZE = 256 << 10
ROUNDS = 60


@pytest.fixture
def disk(tmp_path: Path) -> Callable[[str, bool], Driver]:
    def make(name: str, event_idx: bool) -> Driver:
        path = tmp_path / name
        path.write_bytes(random.Random(7).randbytes(SIZE))
        return Driver(Block(RawImage(str(path)), serial="SN"), packed=False, event_idx=event_idx)

    return make


def test_it_is_there_and_used(
    disk: Callable[[str, bool], Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel.library() is not None  # these tests need gcc
    monkeypatch.setattr(Block, "request", None)  # nothing is left for Python
    with disk("image", True) as driver:
        driver.memory.write(BUFFERS, struct.pack("<IIQ", T_IN, 0, 2))
        head = driver.rings[0].add([(BUFFERS, 16, False), (BUFFERS + 4096, 4096, True),
                                    (BUFFERS + 64, 1, True)])  # fmt: skip
        driver.kick()
        assert driver.rings[0].used() == [(head, 4097)]
        assert (
            driver.memory.read(BUFFERS + 4096, 4096) == random.Random(7).randbytes(SIZE)[1024:5120]
        )


@pytest.mark.parametrize("event_idx", [False, True])
def test_it_does_as_the_python_does(
    event_idx: bool,
    disk: Callable[[str, bool], Driver],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same batches, in buffers cut up by chance, leave the same memory, answers and image."""
    seen = []
    for name in ("kernel", "python"):
        chance = random.Random(event_idx)
        if name == "python":
            monkeypatch.setattr(kernel, "_loaded", [None])
        with disk(name, event_idx) as driver:
            answers = []
            for _ in range(ROUNDS):
                count = chance.randint(1, 3)
                for number in range(count):
                    add(driver, chance, BUFFERS + 0x20000 * number)
                driver.kick()
                done: list[tuple[int, int]] = []
                while len(done) < count:  # those of the Python's workers come later
                    done += driver.rings[0].used()
                answers.append(sorted(done))
            memory = driver.memory.read(BUFFERS, 0x20000 * 3)
        seen.append((answers, memory, (tmp_path / name).read_bytes()))
    assert seen[0] == seen[1]


def add(driver: Driver, chance: random.Random, at: int) -> None:
    """A request of any kind, good or nearly, at GPA `at`."""
    kind = chance.choice((T_IN, T_IN, T_OUT, T_OUT, T_GET_ID, 99))
    size = 20 if kind == T_GET_ID else 512 * chance.randint(1, 24) + chance.choice((0, 0, 0, 3))
    # No two of a batch write the same sectors: workers keep no order.
    sector = (at - BUFFERS) // 0x20000 * 32 + chance.choice((0, 0, 1, 1 << 20))
    header = struct.pack("<IIQ", kind, 0, sector)
    driver.memory.write(at, header)
    driver.memory.write(at + 0x1000, chance.randbytes(size))
    driver.memory.write_u8(at + 64, 0xAA)
    cut = chance.choice((0, chance.randint(1, size - 1)))
    into = kind != T_OUT
    data = [(at + 0x1000, cut, into)] * bool(cut) + [(at + 0x1000 + cut, size - cut, into)]
    head = [(at, 16, False)]
    if chance.random() < 0.1:  # a header in two pieces
        head = [(at, 7, False), (at + 7, 9, False)]
    status = [(at + 64, 1, True)]
    if into and chance.random() < 0.2:  # or the status behind the data
        data, status = [*data[:-1], (data[-1][0], data[-1][1] + 1, True)], []
    indirect = at + 128 if chance.random() < 0.5 else 0
    driver.rings[0].add([*head, *data, *status], indirect=indirect)


def test_without_a_compiler_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(kernel.__file__).parent
    copy = tmp_path / "kernel"
    shutil.copytree(source, copy)
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert runpy.run_path(str(copy / "build.py"))["build"]() is False
    assert not (copy / "_kernel.so").exists()
    assert (copy / "_abi.py").exists()
    assert "without its C kernel" in capsys.readouterr().out
    monkeypatch.delenv("CC")
    assert runpy.run_path(str(copy / "build.py"))["build"]() is True
    assert (copy / "_kernel.so").exists()


def test_one_that_does_not_fit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SHARED", kernel.SHARED[:-1])
    assert kernel._load() is None


def test_a_disk_shows_packed_rings_only_without_it(
    disk: Callable[[str, bool], Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = 1 << spec.F_RING_PACKED
    with disk("image", True) as driver:
        assert not driver.device.offered() & packed
        assert driver.device.features & packed  # a saved driver's, or a stubborn one's
        monkeypatch.setattr(kernel, "_loaded", [None])
        assert driver.device.offered() & packed
