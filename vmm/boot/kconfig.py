"""What a kernel file says of itself: its release, the .config it was built with, its built-in
drivers.

The release is in a bzImage's setup header, or in an ELF file's banner. The configuration is in the
image where CONFIG_IKCONFIG put it (kernel/configs.c in Linux), or in a file beside the kernel, as
packages and build trees have it. Where there is neither, the names a built-in driver goes by are
looked for in the unpacked image.
"""

from __future__ import annotations

import os

from vmm.errors import BootError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.boot.file import InputFile

CONFIG_MAX = 8 << 20
"""Bytes of a configuration; a distribution's is 0.3 MB."""
IMAGE_MAX = 512 << 20
MARKS_MAX = 16
"""Places that look like a configuration's, and are looked at."""
STEP = 4 << 20
"""Bytes looked through at a time."""
BEGIN, END = b"IKCFG_ST", b"IKCFG_ED"
BANNER = b"Linux version "
PREFIXES = ("vmlinuz-", "vmlinux-", "bzImage-", "kernel-")
"""Of kernels' names, before the release."""


class KernelFile:
    """A kernel on this host, looked at as far as is asked for.

    Args:
        path: a bzImage or an ELF vmlinux.

    Attributes:
        path: as given.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._image: bytes | None = None

    @property
    def release(self) -> str:
        """What `uname -r` says in it; empty where the file does not tell."""
        from vmm.boot.file import InputFile

        with InputFile(self.path, "kernel") as file:
            head = file.read(0, 0x268)
            if head[0x202:0x206] == b"HdrS":
                offset = int.from_bytes(head[0x20E:0x210], "little")
                text = file.read(offset + 0x200, 128) if offset else b""
                return _word(text)
            return _banner(file)

    def image(self) -> bytes:
        """The unpacked kernel; empty where it cannot be unpacked here."""
        if self._image is None:
            self._image = self._read()
        return self._image

    def _read(self) -> bytes:
        from vmm.boot.bzimage import BzImage
        from vmm.boot.file import InputFile

        with InputFile(self.path, "kernel") as file:
            if file.read(0x202, 4) != b"HdrS":
                return file.read(0, min(file.size, IMAGE_MAX))
            try:
                return BzImage(file).vmlinux(IMAGE_MAX)
            except BootError:  # the loader says what is wrong with it, or boots it packed
                return b""

    def config(self) -> tuple[dict[str, str], str]:
        """Its symbols (`CONFIG_X`) with their values, and where they are from; ({}, "") without.

        A file beside the kernel goes first: unpacking the image takes longer.
        """
        for path in beside(self.path):
            if os.path.isfile(path):
                return read(path), path
        text = embedded(self.image())
        return (parse(text), f"{self.path} (IKCONFIG)") if text is not None else ({}, "")

    def names(self, name: str) -> bool | None:
        """Whether a driver of this name is built in, by the text the image has of it; None where
        the image is no Linux that could be looked into."""
        image = self.image()
        if BANNER not in image:
            return None
        return name.encode() + b"\0" in image


def beside(kernel: str) -> list[str]:
    """Where the configuration of a kernel file may be: as packages, Debian's and Fedora's, and a
    build tree have it."""
    path = os.path.realpath(kernel)
    directory, name = os.path.split(path)
    release = next((name[len(p) :] for p in PREFIXES if name.startswith(p)), "")
    found = []
    if release:
        found.append(os.path.join(directory, f"config-{release}"))
    top = build_tree(path)
    if top is not None:
        found.append(os.path.join(top, ".config"))
    found.append(os.path.join(directory, "config"))
    return found


def build_tree(kernel: str) -> str | None:
    """The tree that a kernel file lies in as it was built, or None."""
    path = os.path.realpath(kernel)
    directory, name = os.path.split(path)
    above = directory
    if name == "bzImage":
        for part in ("boot", "x86", "arch"):
            if os.path.basename(above) != part:
                return None
            above = os.path.dirname(above)
    elif name != "vmlinux":
        return None
    from vmm.initramfs.modules import is_build_tree

    return above if is_build_tree(above) else None


def read(path: str) -> dict[str, str]:
    """The symbols of a .config. Raises UsageError."""
    from vmm.fifo import open_stored

    try:
        with open_stored(path) as file:
            data = file.read(CONFIG_MAX + 1)
    except OSError as err:
        raise UsageError(f"--config {path}: {err.strerror}; give a kernel's .config") from None
    symbols = parse(data)
    if len(data) > CONFIG_MAX or not symbols:
        raise UsageError(f"--config {path} is no kernel's .config: it has no CONFIG_NAME=value")
    return symbols


def parse(text: bytes) -> dict[str, str]:
    """The symbols of a configuration's text; what is not set is not there."""
    found = {}
    for line in text.decode("utf-8", "replace").splitlines():
        name, equals, value = line.partition("=")
        if equals and name.startswith("CONFIG_") and " " not in name:
            found[name] = value.strip('"')
    return found


def embedded(image: bytes) -> bytes | None:
    """The configuration that CONFIG_IKCONFIG put into an unpacked image, if it did."""
    import zlib

    at = image.find(BEGIN)
    for _ in range(MARKS_MAX):
        if at < 0:
            break
        end = image.find(END, at, at + CONFIG_MAX)
        if end > 0:
            unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
            try:
                text = unpacker.decompress(image[at + len(BEGIN) : end], CONFIG_MAX)
            except zlib.error:  # the letters alone, as a program that looks for them has them
                text = b""
            if unpacker.eof:
                return text
        at = image.find(BEGIN, at + 1)
    return None


def _banner(file: InputFile) -> str:
    """The release in an ELF file's banner, which is far from the end of one with symbols."""
    before = b""
    for offset in range(0, min(file.size, IMAGE_MAX), STEP):
        data = before + file.read(offset, STEP)
        at = data.find(BANNER)
        if 0 <= at < len(data) - 128 or (at >= 0 and offset + STEP >= file.size):
            return _word(data[at + len(BANNER) : at + len(BANNER) + 128])
        before = data[-256:]
    return ""


def _word(text: bytes) -> str:
    words = text.split(b"\0")[0].split()
    return words[0].decode("ascii", "replace") if words else ""
