"""Compressed kernel payloads, as scripts/Makefile.lib in Linux makes them.

The reference C libraries do the work, a block of 8 MiB a call: large enough that Python's own
share does not show, small enough that the memory stays small. Bytes after the compressed data are
ignored: Linux appends the unpacked size (4 bytes) to all formats but gzip, which ends in it.

Libraries are imported when their format is met.
"""

from __future__ import annotations

from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

BLOCK = 8 << 20
"""Unpacked bytes a block; also the size of each block but the last of an lz4 legacy frame."""
MEMORY_MAX = 256 << 20
"""What xz and lzma may use at most, bytes; a broken header can ask for 4 GiB."""
INPUT = 1 << 20
"""Packed bytes given to a library at a time."""

UNPACKED_MAX = 512 << 20
"""Bytes of an unpacked kernel; Debian's has 60 MiB. Some formats make a GiB of 100 bytes."""
BLOCKS_MAX = 1 << 17
"""Blocks that are told of one by one in the data; 2 GiB at least, if they are as large as packers
make them. More are there to keep the reader busy."""

LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
LZOP_MAGIC = b"\x89LZO\x00\r\n\x1a\n"

MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bzip2"),
    (b"\x5d\x00\x00", "lzma"),
    (LZOP_MAGIC[:6], "lzo"),
    (LZ4_LEGACY_MAGIC, "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
"""The first bytes of each format (Linux, lib/decompress.c)."""

_MODULES = {
    "gzip": "zlib",
    "xz": "lzma",
    "lzma": "lzma",
    "bzip2": "bz2",
    "lz4": "lz4.block",
    "zstd": "zstandard",
    "lzo": "lzo",
}
_PACKAGES = {"lz4": "lz4", "zstd": "zstandard", "lzo": "python-lzo"}
"""Where a format needs more than the standard library: the package on PyPI."""


def detect(data: bytes | memoryview) -> str | None:
    """The name of the format `data` starts with, or None."""
    head = bytes(data[:6])
    for magic, name in MAGICS:
        if head.startswith(magic):
            return name
    return None


def available(name: str) -> bool:
    """Whether this Python has the library for format `name`."""
    try:
        __import__(_MODULES[name])
    except (KeyError, ImportError):
        return False
    return True


def blocks(data: bytes | memoryview, name: str) -> Iterator[bytes]:
    """Unpack `data` of format `name`, block by block (none is empty, none above 8 MiB).

    Raises:
        BootError: while iterating: the data are broken or end early, or the library for the format
            is not installed.
    """
    if name not in _FORMATS:
        raise BootError(f"compression {name!r} is not known")
    try:
        yield from _FORMATS[name](memoryview(data))
    except ImportError:
        package = _PACKAGES.get(name)
        mend = f"pip install {package}" if package else f"this Python was built without {name}"
        raise BootError(
            f"packed with {name}, whose library is not installed: {mend}, or --boot bzimage"
        ) from None
    except (BootError, MemoryError):
        raise
    except Exception as err:  # each library has its own errors for broken data
        raise BootError(f"its {name} data are broken: {err}") from None


def decompress(data: bytes | memoryview, name: str, limit: int = UNPACKED_MAX) -> bytes:
    """Unpack `data` of format `name` to at most `limit` bytes; raises as `blocks` does."""
    return joined(blocks(data, name), f"its {name} data unpack", limit)


def joined(parts: Iterable[bytes], what: str, limit: int) -> bytes:
    """`parts` as one. Raises BootError, in the name of `what`, where that is more than `limit`
    bytes; no more of them are taken then."""
    found: list[bytes] = []
    total = 0
    for part in parts:
        total += len(part)
        if total > limit:
            raise BootError(f"{what} to more than {limit} bytes")
        found.append(part)
    return b"".join(found)


def _gzip(data: memoryview) -> Iterator[bytes]:
    import zlib

    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    at = 0
    while not unpacker.eof:
        piece: Any = unpacker.unconsumed_tail
        if not piece:
            piece = data[at : at + INPUT]
            at += INPUT
        block = unpacker.decompress(piece, BLOCK)
        if block:
            yield block
        elif not piece:
            raise ValueError("they end early")


def _xz(data: memoryview) -> Iterator[bytes]:
    import lzma

    return _stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, MEMORY_MAX), data)


def _lzma(data: memoryview) -> Iterator[bytes]:
    import lzma

    return _stream(lzma.LZMADecompressor(lzma.FORMAT_ALONE, MEMORY_MAX), data)


def _bzip2(data: memoryview) -> Iterator[bytes]:
    import bz2

    return _stream(bz2.BZ2Decompressor(), data)


def _stream(unpacker: Any, data: memoryview) -> Iterator[bytes]:
    at = 0
    while not unpacker.eof:
        piece = data[:0]
        if unpacker.needs_input:
            piece = data[at : at + INPUT]
            at += INPUT
            if not piece:
                raise ValueError("they end early")
        block = unpacker.decompress(piece, BLOCK)
        if block:
            yield block


def _zstd(data: memoryview) -> Iterator[bytes]:
    import zstandard

    # The reader ends alike at the frame's end and at the data's, and stumbles over what follows.
    frame = data[: _zstd_frame_size(data)]
    # 128 MiB: the window of zstd -22 --ultra, which Linux packs with.
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    with unpacker.stream_reader(frame) as reader:
        while block := reader.read(BLOCK):
            yield block


def _zstd_frame_size(data: memoryview) -> int:
    """Bytes of the first frame, by its block headers (RFC 8878, section 3.1.1)."""
    import zstandard

    at: int = zstandard.frame_header_size(data)
    last = count = 0
    while not last:
        count = _counted(count)
        if at + 3 > len(data):
            raise ValueError("they end early")
        header = int.from_bytes(data[at : at + 3], "little")
        last = header & 1
        at += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)  # an RLE block is one byte
    at += 4 * zstandard.get_frame_parameters(data).has_checksum
    if at > len(data):
        raise ValueError("they end early")
    return at


def _lz4(data: memoryview) -> Iterator[bytes]:
    """An lz4 legacy frame (lz4's doc/lz4_Frame_format.md): a length before each block, no end mark.

    The last block is followed by the 4-byte unpacked size, which tells where the data end.
    """
    from lz4.block import decompress as unpack

    at = 0
    total = count = 0
    while at + 4 <= len(data):
        count = _counted(count)
        size = int.from_bytes(data[at : at + 4], "little")
        if data[at : at + 4] == LZ4_LEGACY_MAGIC:  # archives may follow each other
            at += 4
            continue
        if at + 4 == len(data) and size == total & 0xFFFFFFFF:
            return
        at += 4
        if not size or at + size > len(data):
            raise ValueError("they end early")
        block: bytes = unpack(data[at : at + size], uncompressed_size=BLOCK)
        at += size
        total += len(block)
        if block:
            yield block
    if at < len(data):
        raise ValueError("they end early")


def _counted(count: int) -> int:
    """The number of one block more. Raises ValueError where there are too many."""
    if count >= BLOCKS_MAX:
        raise ValueError(f"there are more than {BLOCKS_MAX} blocks")
    return count + 1


def _lzo(data: memoryview) -> Iterator[bytes]:
    """lzop's format (Linux, lib/decompress_unlzo.c; lzop 1.04, src/lzop.c): all big endian."""
    import lzo

    version = int.from_bytes(data[9:11], "big")
    at = len(LZOP_MAGIC) + 4 + (2 if version >= 0x940 else 0) + 1 + (1 if version >= 0x940 else 0)
    flags = int.from_bytes(data[at : at + 4], "big")
    at += 4 + (4 if flags & 0x800 else 0)  # F_H_FILTER
    at += 4 + 4 + (4 if version >= 0x940 else 0)  # mode, times
    at += 1 + data[at] + 4  # file name, header checksum
    unpacked_sums = 4 * bool(flags & 0x1) + 4 * bool(flags & 0x100)  # F_ADLER32_D, F_CRC32_D
    packed_sums = 4 * bool(flags & 0x2) + 4 * bool(flags & 0x200)  # F_ADLER32_C, F_CRC32_C
    count = 0
    while True:
        count = _counted(count)
        if at + 4 > len(data):
            raise ValueError("they end early")
        unpacked = int.from_bytes(data[at : at + 4], "big")
        if not unpacked:
            return
        size = int.from_bytes(data[at + 4 : at + 8], "big")
        if unpacked > BLOCK or size > unpacked:
            raise ValueError("a block's size is out of range")
        at += 8 + unpacked_sums + (packed_sums if size < unpacked else 0)
        block = bytes(data[at : at + size])
        if len(block) < size:
            raise ValueError("they end early")
        at += size
        yield block if size == unpacked else lzo.decompress(block, False, unpacked)


_FORMATS: dict[str, Callable[[memoryview], Iterator[bytes]]] = {
    "gzip": _gzip,
    "xz": _xz,
    "lzma": _lzma,
    "bzip2": _bzip2,
    "zstd": _zstd,
    "lzo": _lzo,
    "lz4": _lz4,
}
