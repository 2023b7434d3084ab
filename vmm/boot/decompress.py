"""Compressed kernel payloads, as scripts/Makefile.lib in Linux makes them.

The reference C libraries do the work, each in as few calls as the format allows. Bytes after the
compressed data (the size Linux appends for some formats) are ignored.
"""

from __future__ import annotations

from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
LZ4_BLOCK_MAX = 8 << 20
"""Uncompressed size of each block but the last (lz4 Frame Format, "Legacy frame")."""

MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bzip2"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\x89LZO", "lzo"),
    (LZ4_LEGACY_MAGIC, "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
"""The first bytes of each format (Linux, lib/decompress.c)."""


def detect(data: bytes | memoryview) -> str | None:
    """The name of the format `data` starts with, or None."""
    head = bytes(data[:6])
    for magic, name in MAGICS:
        if head.startswith(magic):
            return name
    return None


def decompress(data: bytes | memoryview, name: str, limit: int = 1 << 30) -> bytes:
    """Unpack `data` of format `name` to at most `limit` bytes.

    Raises:
        BootError: the data are broken, or the library for the format is not installed.
    """
    try:
        unpack = _FORMATS[name]
    except KeyError:
        raise BootError(f"compression {name!r} is not known") from None
    try:
        result = unpack(data, limit)
    except ImportError:
        raise BootError(
            f"the kernel is packed with {name} and its library is not installed: "
            "pip install 'vmm[full]', or start it with --boot bzimage"
        ) from None
    except BootError:
        raise
    except Exception as err:  # each library has its own errors for broken data
        raise BootError(f"the {name} data are broken: {err}") from None
    if len(result) > limit:
        raise BootError(f"the {name} data unpack to more than {limit} bytes")
    return result


def _gzip(data: bytes | memoryview, limit: int) -> bytes:
    import zlib

    return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data, limit + 1)


def _xz(data: bytes | memoryview, limit: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data, limit + 1)


def _lzma(data: bytes | memoryview, limit: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data, limit + 1)


def _bzip2(data: bytes | memoryview, limit: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(data, limit + 1)


def _zstd(data: bytes | memoryview, limit: int) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdDecompressor().decompressobj().decompress(bytes(data)))


def _lzo(data: bytes | memoryview, limit: int) -> bytes:
    import lzo

    return bytes(lzo.decompress(bytes(data)))


def _lz4(data: bytes | memoryview, limit: int) -> bytes:
    from lz4.block import decompress as block

    view = memoryview(data)
    position = len(LZ4_LEGACY_MAGIC)
    parts: list[bytes] = []
    total = 0
    while position + 4 < len(view):
        size = int.from_bytes(view[position : position + 4], "little")
        position += 4
        if not size or position + size > len(view):
            break  # what follows the last block: the size of the whole, appended by Linux
        part = block(view[position : position + size], uncompressed_size=LZ4_BLOCK_MAX)
        position += size
        parts.append(part)
        total += len(part)
        if total > limit or len(part) < LZ4_BLOCK_MAX:
            break
    if not parts:
        raise ValueError("no block")
    return b"".join(parts)


_FORMATS: dict[str, Callable[[bytes | memoryview, int], bytes]] = {
    "gzip": _gzip,
    "xz": _xz,
    "lzma": _lzma,
    "bzip2": _bzip2,
    "zstd": _zstd,
    "lzo": _lzo,
    "lz4": _lz4,
}
