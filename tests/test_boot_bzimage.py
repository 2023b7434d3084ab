"""vmm.boot.bzimage: the setup header of Debian's kernels, and of made and broken ones."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.boot_files import MIB, PACKERS, bzimage, elf, pack
from vmm.boot.bzimage import BzImage
from vmm.boot.file import InputFile
from vmm.boot.loader import load
from vmm.errors import BootError
from vmm.memory import GuestMemory
from vmm.testing.kernels import Kernel

Parse = Callable[[bytes], BzImage]


@pytest.fixture
def parse(tmp_path: Path) -> Iterator[Parse]:
    files: list[InputFile] = []

    def parse(data: bytes) -> BzImage:
        path = tmp_path / "k"
        path.write_bytes(data)
        files.append(InputFile(str(path), "kernel"))
        return BzImage(files[-1])

    yield parse
    for file in files:
        file.close()


def test_debians_cloud_kernel(cloud_kernel: Kernel) -> None:
    with InputFile(str(cloud_kernel.vmlinuz), "kernel") as file:
        image = BzImage(file)
        assert image.protocol == "2.15"
        assert image.has_entry_64 and image.relocatable_kernel
        assert (image.cmdline_size, image.initrd_addr_max) == (2047, 0x7FFFFFFF)
        assert image.load_address == image.pref_address == 0x1000000
        assert image.init_size > image.kernel_size
        assert image.compression == "lz4"
        assert image.header[0x11:0x15] == b"HdrS"


def test_debians_full_kernel(full_kernel: Kernel) -> None:
    with InputFile(str(full_kernel.vmlinuz), "kernel") as file:
        image = BzImage(file)
        assert (image.compression, image.can_unpack()) == ("xz", True)
        vmlinux = image.vmlinux()
        assert vmlinux[:5] == b"\x7fELF\x02"
        assert b"Linux version " + full_kernel.release.encode() in vmlinux


@pytest.mark.parametrize("kind", [*PACKERS, "none"])
def test_payloads(parse: Parse, kind: str) -> None:
    if kind in ("lz4", "zstd", "lzo"):
        pytest.importorskip({"lz4": "lz4.block", "zstd": "zstandard"}.get(kind, kind))
    kernel = elf([(MIB, bytes(range(256)) * 40, 20000)])
    image = parse(bzimage(kernel if kind == "none" else pack(kernel, kind)))
    assert (image.compression, image.can_unpack()) == (kind, True)
    assert image.vmlinux() == kernel


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bzimage(version=0x0205), r"has boot protocol 2\.05, as Linux before 2\.6\.22"),
        (bzimage(version=0x0000), r"has boot protocol 0\.00"),
        (bzimage(loadflags=0), "is a zImage"),
        (bzimage()[:0x250], "is truncated: its setup header is not whole"),
        (bzimage()[:2560], "is truncated: 2560 bytes of 3584"),
        (bzimage(bytes(5000))[:-16], "is truncated: 8576 bytes of 8592"),
        (bzimage()[:0x202] + b"XXXX" + bzimage()[0x206:], "setup header's magic is missing"),
    ],
)
def test_refuses(parse: Parse, data: bytes, message: str) -> None:
    with pytest.raises(BootError, match=message) as caught:
        parse(data)
    assert "\n" not in str(caught.value)


def test_fields_of_later_protocols_are_not_read_from_older_ones(parse: Parse) -> None:
    image = parse(bzimage(version=0x0206))
    assert (image.payload_offset, image.pref_address, image.xloadflags) == (0, 0, 0)
    assert image.load_address == MIB
    image = parse(bzimage(version=0x020B))
    assert image.pref_address and image.payload_offset and not image.has_entry_64


def test_setup_sects_of_zero_means_four(parse: Parse) -> None:
    image = bytearray(bzimage(b"p" * 32))
    image[0x1F1] = 0
    assert parse(bytes(image)).kernel_offset == 5 * 512


def test_a_signature_after_the_kernel_is_not_loaded(parse: Parse) -> None:
    whole = bzimage(bytes(4096))
    assert parse(whole + b"signature" * 100).kernel_size == len(whole) - 5 * 512


def test_the_header_copied_ends_where_it_says(parse: Parse) -> None:
    image = bytearray(bzimage())
    for jump, size in ((0x6A, 0x7B), (0x66, 0x77), (0xFF, 0x290 - 0x1F1)):
        image[0x201] = jump
        assert len(parse(bytes(image)).header) == size


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bzimage(b"", payload_offset=0), "does not tell where its vmlinux is"),
        (bzimage(bytes(64), payload_offset=0xFFFFFFFF), "does not tell where its vmlinux is"),
        (bzimage(bytes(64), payload_length=0xFFFFFFFF), "does not tell where its vmlinux is"),
        (bzimage(b"what is this"), "unknown compression"),
        (bzimage(pack(b"not an ELF file", "gzip")), "its payload is not an ELF kernel"),
        (bzimage(pack(elf(), "gzip")[:-20]), "its gzip data are broken: they end early"),
    ],
)
def test_payloads_that_cannot_be(parse: Parse, data: bytes, message: str) -> None:
    image = parse(data)
    with pytest.raises(BootError, match=message) as caught:
        image.vmlinux()
    assert image.name in str(caught.value)


def test_the_size_in_the_header_is_used(parse: Parse) -> None:
    whole = bzimage(bytes(4096))
    (paragraphs,) = struct.unpack_from("<I", whole, 0x1F4)
    assert parse(whole).kernel_size == paragraphs * 16


@pytest.mark.parametrize("payload", [b"", b"\x01\x02\x03\x04" * 100])
def test_what_has_no_known_payload_is_not_taken_for_linux(tmp_path: Path, payload: bytes) -> None:
    """memtest86+ has a bzImage's header, and starts at its 64-bit entry."""
    path = tmp_path / "k"
    fields = {} if payload else {"payload_offset": 0, "payload_length": 0}
    path.write_bytes(bzimage(payload, **fields))
    with GuestMemory(64 << 20) as memory:
        assert not load(memory, str(path), [], "", mode="bzimage").is_linux
        path.write_bytes(bzimage(pack(elf(), "gzip")))
        assert load(memory, str(path), [], "", mode="bzimage").is_linux
