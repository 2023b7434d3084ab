"""A kernel package's module tree, and what a module needs before it can be inserted.

A tree that was installed has `modules.dep`; one that `dpkg -x` unpacked has not. The modules
themselves say what they depend on (`depends=` in the ELF section .modinfo, written by modpost), so
that is read: it needs no depmod, and is right for both kinds of tree.

A tree in which a kernel was built is one too: modules.order says where in it the modules lie.
"""

from __future__ import annotations

import difflib
import os
import struct
from typing import TYPE_CHECKING

from vmm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")
_PACKERS = {".xz": "xz", ".gz": "gzip", ".zst": "zstd"}
_SIZE_MAX = 256 << 20
"""Bytes of a module, unpacked; the largest of a distribution's has 8 MB with its symbols."""
_ELF64 = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")


class Module:
    """One module file. `inside` is its path relative to the tree, without compression's suffix."""

    __slots__ = ("_data", "file", "inside", "name")

    def __init__(self, name: str, file: str, inside: str) -> None:
        self.name = name
        self.file = file
        self.inside = inside
        self._data: bytes | None = None

    def read(self) -> bytes:
        """The module's ELF image, decompressed."""
        if self._data is None:
            with open(self.file, "rb") as file:
                data = _bounded(_read_some(file), self.file)
            kind = _PACKERS.get(os.path.splitext(self.file)[1])
            self._data = _unpacked(data, kind, self.file) if kind else data
        return self._data

    @property
    def release(self) -> str:
        """The kernel's that it was built for (`vermagic`); empty where it does not say."""
        words = " ".join(self.info("vermagic")).split()
        return words[0] if words else ""

    def info(self, key: str) -> list[str]:
        """The values of `key` in .modinfo, in the order they are there."""
        start = key.encode() + b"="
        strings = _section(self.read(), b".modinfo", self.file).split(b"\0")
        return [
            entry[len(start) :].decode("utf-8", "replace")
            for entry in strings
            if entry.startswith(start)
        ]


def _unpacked(data: bytes, kind: str, path: str) -> bytes:
    if kind == "zstd":
        return _by_zstd(data, path)
    import lzma
    import zlib

    try:
        unpacker = lzma.LZMADecompressor() if kind == "xz" else zlib.decompressobj(31)
        made: bytes = unpacker.decompress(data, _SIZE_MAX)
        if not unpacker.eof:
            raise ValueError("they end early, or unpack to too much")
    except (lzma.LZMAError, zlib.error, ValueError) as error:
        raise UsageError(f"kernel module {path}: its {kind} data are broken: {error}") from error
    return made


def _by_zstd(data: bytes, path: str) -> bytes:
    """By the reference library, or else the program."""
    import shutil
    import subprocess
    import tempfile

    try:
        import zstandard
    except ImportError:
        pass
    else:
        try:
            with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                made = _read_some(reader)
        except zstandard.ZstdError as error:
            raise UsageError(f"kernel module {path}: its zstd data are broken: {error}") from error
        return _bounded(made, path)

    program = shutil.which("zstd")
    if program is None:
        raise UsageError(
            f"kernel module {path} is packed with zstd: apt-get install zstd, or pip install "
            "zstandard"
        )
    with tempfile.TemporaryFile() as packed:
        packed.write(data)
        packed.seek(0)
        with subprocess.Popen(
            [program, "-dc"], stdin=packed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            made = _read_some(process.stdout)
            process.stdout.close()  # which ends it, if there is more
    if process.returncode and len(made) <= _SIZE_MAX:
        raise UsageError(f"kernel module {path}: its zstd data are broken: {program} refuses them")
    return _bounded(made, path)


def _read_some(file: Any) -> bytes:
    """All of a file, or a little more than `_SIZE_MAX` bytes of it."""
    parts: list[bytes] = []
    size = 0
    while size <= _SIZE_MAX and (part := file.read(1 << 20)):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _bounded(made: bytes, path: str) -> bytes:
    if len(made) > _SIZE_MAX:
        raise UsageError(f"kernel module {path}: its data unpack to over {_SIZE_MAX >> 20} MiB")
    return made


class ModuleTree:
    """A directory `lib/modules/VERSION`, as installed or as `dpkg -x` leaves it, or a tree in which
    a kernel was built."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.version = os.path.basename(os.path.normpath(self.path))
        self.built_here = is_build_tree(self.path)
        if self.built_here:
            self.version = _first_line(self.path, "include/config/kernel.release") or self.version
        elif not os.path.isdir(os.path.join(self.path, "kernel")):
            raise UsageError(
                f"kernel modules: {self.path} has no directory 'kernel';"
                " give an unpacked kernel package's lib/modules/VERSION"
            )
        self._modules = self._read_order() if self.built_here else self._scan()
        self._builtin = self._read_builtin()

    def find(self, name: str) -> Module | None:
        """The module called `name` ("-" and "_" are the same), None if it is built in.

        Raises UsageError, with close names, if this kernel has no such module.
        """
        key = _key(name)
        module = self._modules.get(key)
        if module is not None or key in self._builtin:
            return module
        if self.built_here and key in self._ordered:
            raise UsageError(
                f"kernel {self.version} has the module {name!r}, which is not built yet; run "
                f"make modules in {self.path}"
            )
        close = difflib.get_close_matches(key, [*self._modules, *self._builtin])
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UsageError(f"kernel {self.version} has no module {name!r}{hint}")

    def has(self, name: str) -> bool:
        """Whether `name` is a module that is there, or built in."""
        key = _key(name)
        return key in self._modules or key in self._builtin

    def is_known(self, name: str) -> bool:
        """Whether this kernel was configured to have the module, there or not."""
        return self.has(name) or _key(name) in self._ordered

    def closure(self, names: Iterable[str]) -> list[Module]:
        """The modules called `names` and all they depend on, each once, dependencies first."""
        order: dict[str, Module] = {}
        for name in names:
            self._visit(self.find(name), order, ())
        return list(order.values())

    def _visit(
        self, module: Module | None, order: dict[str, Module], above: tuple[str, ...]
    ) -> None:
        # `above` stops a circle, which a broken tree could have and would never end otherwise.
        if module is None or module.name in order or module.name in above:
            return
        path = (*above, module.name)
        for name in ",".join(module.info("depends")).split(","):
            if name:
                try:
                    needed = self.find(name)
                except UsageError:
                    raise UsageError(
                        f"the kernel's module {module.name} needs {name}, which is not in "
                        f"{self.path}: is the tree whole?"
                    ) from None
                self._visit(needed, order, path)
        for line in module.info("softdep"):
            for name in _softdeps(line):
                # Soft dependencies are wishes: names that are aliases or not built are passed over.
                self._visit(self._modules.get(_key(name)), order, path)
        order[module.name] = module

    _ordered: frozenset[str] = frozenset()

    def _read_order(self) -> dict[str, Module]:
        """A build tree's modules, of which there may be a hundred among its 100,000 files."""
        found: dict[str, Module] = {}
        names = []
        for line in _lines(self.path, "modules.order"):
            # Before Linux 5.3 they begin with kernel/; since 6.3 they end in .o.
            inside = os.path.splitext(line.removeprefix("kernel/"))[0] + ".ko"
            names.append(_key(os.path.basename(inside)[:-3]))
            where = os.path.join(self.path, inside)
            if os.path.isfile(where):
                found.setdefault(names[-1], Module(names[-1], where, f"kernel/{inside}"))
        self._ordered = frozenset(names)
        return found

    def _scan(self) -> dict[str, Module]:
        found: dict[str, Module] = {}
        for directory, below, files in os.walk(self.path):
            below.sort()
            for file in sorted(files):
                for suffix in _SUFFIXES:
                    if file.endswith(suffix):
                        key = _key(file[: -len(suffix)])
                        where = os.path.join(directory, file)
                        inside = os.path.relpath(where, self.path)
                        inside = inside[: len(inside) - len(suffix)] + ".ko"
                        found.setdefault(key, Module(key, where, inside))
        return found

    def _read_builtin(self) -> frozenset[str]:
        lines = _lines(self.path, "modules.builtin")
        return frozenset(_key(os.path.basename(line).removesuffix(".ko")) for line in lines)


def is_build_tree(path: str) -> bool:
    """Whether a kernel was built in this directory: its sources, or what `make O=` names."""
    return any(
        os.path.isfile(os.path.join(path, "include", "config", name))
        for name in ("kernel.release", "auto.conf")
    )


def _lines(tree: str, name: str) -> list[str]:
    try:
        with open(os.path.join(tree, name), errors="surrogateescape") as file:
            return file.read().split()
    except OSError:
        return []


def _first_line(tree: str, name: str) -> str:
    return next(iter(_lines(tree, name)), "")


def _key(name: str) -> str:
    return name.replace("-", "_")


def _softdeps(line: str) -> list[str]:
    """The names after "pre:" in a softdep line such as "pre: crc32c post: foo"."""
    names = []
    taking = False
    for word in line.split():
        if word.endswith(":"):
            taking = word == "pre:"
        elif taking:
            names.append(word)
    return names


def _section(elf: bytes, wanted: bytes, file: str) -> bytes:
    """The bytes of section `wanted` of a 64-bit little-endian ELF image; b"" if there is none."""
    try:
        head = _ELF64.unpack_from(elf)
        if head[0][:6] != b"\x7fELF\x02\x01":
            raise UsageError(f"kernel module {file}: not a 64-bit little-endian ELF file")
        offset, size, count, names_index = head[6], head[11], head[12], head[13]
        sections = [_SECTION.unpack_from(elf, offset + size * n) for n in range(count)]
        names = sections[names_index][4]
        for section in sections:
            at = names + section[0]
            if elf[at : at + len(wanted) + 1] == wanted + b"\0":
                return elf[section[4] : section[4] + section[5]]
    except (struct.error, IndexError, OverflowError) as error:  # an offset above 2**63, too
        raise UsageError(f"kernel module {file}: truncated or damaged ELF file") from error
    return b""
