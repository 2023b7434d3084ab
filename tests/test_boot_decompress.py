"""vmm.boot.decompress, on what the real packers make."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.boot_files import PACKERS, pack
from vmm.boot import decompress
from vmm.boot.decompress import BLOCK, BLOCKS_MAX
from vmm.errors import BootError

LIBRARIES = {"lz4": "lz4.block", "zstd": "zstandard", "lzo": "lzo"}


def need(kind: str) -> None:
    if kind in LIBRARIES:
        pytest.importorskip(LIBRARIES[kind])


@pytest.fixture(scope="module")
def data() -> bytes:
    """9 MiB and a bit, so more than a block, that packs well and not perfectly."""
    rng = random.Random(1)
    return b"".join(rng.randbytes(64) * rng.randrange(1, 300) for _ in range(1000)) + b"end"


@pytest.fixture(scope="module")
def packed(data: bytes) -> dict[str, bytes]:
    return {}


def get(packed: dict[str, bytes], data: bytes, kind: str) -> bytes:
    need(kind)
    if kind not in packed:
        packed[kind] = pack(data, kind)
    return packed[kind]


@pytest.mark.parametrize("kind", PACKERS)
def test_unpacks_what_linux_packs(packed: dict[str, bytes], data: bytes, kind: str) -> None:
    image = get(packed, data, kind)
    assert len(data) > BLOCK
    assert decompress.detect(image) == kind
    assert decompress.available(kind)
    assert decompress.decompress(image, kind) == data


@pytest.mark.parametrize("kind", PACKERS)
def test_blocks_are_small_and_never_empty(packed: dict[str, bytes], data: bytes, kind: str) -> None:
    sizes = [len(block) for block in decompress.blocks(get(packed, data, kind), kind)]
    assert sum(sizes) == len(data)
    assert min(sizes) > 0 and max(sizes) <= BLOCK


@pytest.mark.parametrize("kind", PACKERS)
def test_refuses_what_is_cut_short(packed: dict[str, bytes], data: bytes, kind: str) -> None:
    image = get(packed, data, kind)
    for cut in (8, 100, len(image) // 2, len(image) - 5):
        with pytest.raises(BootError, match=kind):
            decompress.decompress(image[:cut], kind)


@pytest.mark.parametrize("kind", PACKERS)
def test_keeps_to_the_limit(packed: dict[str, bytes], data: bytes, kind: str) -> None:
    with pytest.raises(BootError, match="more than 1000000 bytes"):
        decompress.decompress(get(packed, data, kind), kind, 1_000_000)


@pytest.mark.parametrize("kind", PACKERS)
def test_broken_data_raise_boot_errors_only(kind: str) -> None:
    need(kind)
    rng = random.Random(2)
    whole = pack(rng.randbytes(50) * 40 + rng.randbytes(500), kind)
    refused = 0
    for _ in range(300):
        image = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            image[rng.randrange(len(image))] = rng.randrange(256)
        try:
            decompress.decompress(image, kind, 16 << 20)
        except BootError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused


def test_the_whole_is_not_held_in_memory() -> None:
    # A bomb: 256 MiB of zeroes. Only its first block is ever made.
    image = subprocess.run(
        ["sh", "-c", "head -c 256M /dev/zero | gzip -1"], stdout=subprocess.PIPE, check=True
    ).stdout
    assert len(next(decompress.blocks(image, "gzip"))) == BLOCK


def test_lz4_archives_may_follow_each_other(data: bytes) -> None:
    need("lz4")
    half = len(data) // 2
    first, second = pack(data[:half], "lz4")[:-4], pack(data[half:], "lz4")[:-4]
    size = len(data).to_bytes(4, "little")
    assert decompress.decompress(first + second + size, "lz4") == data


def test_lz4_size_at_the_end_is_checked() -> None:
    need("lz4")
    image = pack(b"kernel" * 1000, "lz4")
    assert decompress.decompress(image, "lz4") == b"kernel" * 1000
    with pytest.raises(BootError, match="end early"):
        decompress.decompress(image[:-4] + b"\x01\0\0\0", "lz4")


def test_unknown_formats() -> None:
    assert decompress.detect(b"") is None
    assert decompress.detect(b"\x7fELF") is None
    assert not decompress.available("rar")
    with pytest.raises(BootError, match="'rar' is not known"):
        decompress.decompress(b"", "rar")


def test_a_missing_library_is_named_with_what_to_install() -> None:
    # -S: without site-packages, so without lz4.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from vmm.boot import decompress\n"
        "assert not decompress.available('lz4')\n"
        "try: decompress.decompress(b'\\x02\\x21\\x4c\\x18', 'lz4')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, "."], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("BootError packed with lz4")
    assert "pip install lz4" in done.stdout
    assert "--boot bzimage" in done.stdout


def test_libraries_are_imported_only_when_needed() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); import vmm.boot\n"
        "print(*{'lzma', 'bz2', 'lz4', 'zstandard', 'zlib', 're', 'typing', 'mmap'} "
        "& set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, "."], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


# --- what is made to take long, or all memory ----------------------------------------------------


@pytest.mark.parametrize("kind", [*PACKERS])
def test_no_more_is_unpacked_than_is_wanted(kind: str) -> None:
    """100 MiB of zeroes, of a few bytes: the unpacker is left alone after the first blocks."""
    need(kind)
    image = pack(bytes(100 << 20), kind)
    taken = 0

    def counted() -> Iterator[bytes]:
        nonlocal taken
        for block in decompress.blocks(image, kind):
            taken += len(block)
            yield block

    with pytest.raises(BootError, match="unpack to more than 16777216 bytes"):
        decompress.joined(counted(), f"its {kind} data unpack", 16 << 20)
    assert taken <= (16 << 20) + BLOCK
    with pytest.raises(BootError, match=f"its {kind} data unpack to more than 1000 bytes"):
        decompress.decompress(image, kind, 1000)


EMPTY_BLOCKS = {
    # A frame header with a window of 1 KiB, then raw blocks of no bytes, none of them the last.
    "zstd": b"\x28\xb5\x2f\xfd\x00\x00" + bytes(3 << 20),
    "lz4": decompress.LZ4_LEGACY_MAGIC * (1 << 20),
    "lz4 blocks": decompress.LZ4_LEGACY_MAGIC + b"\x01\0\0\0\0" * (1 << 20),
}


@pytest.mark.parametrize("name", EMPTY_BLOCKS)
def test_blocks_without_end_that_hold_nothing(name: str) -> None:
    kind = name.split()[0]
    need(kind)
    with pytest.raises(BootError, match=rf"its {kind} data are broken: .* {BLOCKS_MAX} blocks"):
        for block in decompress.blocks(EMPTY_BLOCKS[name], kind):
            assert block
