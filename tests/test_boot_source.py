"""vmm.boot.source: an ELF kernel's bytes, from a file or as they are unpacked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.boot.file import InputFile
from vmm.boot.source import FileSource, PayloadSource
from vmm.errors import BootError

DATA = random.Random(5).randbytes(10_000)
RANGES = [(0, 10), (9_990, 10), (4_000, 200), (4_100, 3_000), (0, 10_000), (500, 0)]


def blocks(size: int, made: list[int] | None = None) -> Iterator[bytes]:
    for start in range(0, len(DATA), size):
        if made is not None:
            made.append(start)
        yield DATA[start : start + size]


def filled(source: FileSource | PayloadSource) -> list[bytes]:
    targets = [(offset, memoryview(bytearray(size))) for offset, size in RANGES]
    source.fill(targets)
    return [bytes(view) for _, view in targets]


WANTED = [DATA[offset : offset + size] for offset, size in RANGES]


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "elf"
    path.write_bytes(DATA)
    with InputFile(str(path), "kernel") as file:
        source = FileSource(file)
        assert source.size == len(DATA)
        assert source.read(100, 50) == DATA[100:150]
        assert source.read(1 << 63, 50) == b""
        assert filled(source) == WANTED


@pytest.mark.parametrize("size", [1, 7, 4_096, 9_999, 10_000])
def test_payload(size: int) -> None:
    source = PayloadSource(blocks(size), "payload")
    assert source.read(0, size) == DATA[:size]
    assert filled(source) == WANTED


def test_nothing_is_unpacked_past_the_last_range() -> None:
    made: list[int] = []
    source = PayloadSource(blocks(1_000, made), "payload")
    source.fill([(1_500, memoryview(bytearray(700)))])
    assert made == [0, 1_000, 2_000]


def test_payload_too_short() -> None:
    source = PayloadSource(blocks(3_000), "payload")
    with pytest.raises(BootError, match="payload is truncated: it has 10000 bytes of 10001"):
        source.fill([(10_000, memoryview(bytearray(1)))])
