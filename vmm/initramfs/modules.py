"""A kernel package's module tree, and what a module needs before it can be inserted.

A tree that was installed has `modules.dep`; one that `dpkg -x` unpacked has not. The modules
themselves say what they depend on (`depends=` in the ELF section .modinfo, written by modpost), so
that is read: it needs no depmod, and is right for both kinds of tree.
"""

from __future__ import annotations

import difflib
import lzma
import os
import struct
from typing import TYPE_CHECKING

from vmm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

_SUFFIXES = (".ko", ".ko.xz")
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
                data = file.read()
            if self.file.endswith(".xz"):
                try:
                    data = lzma.decompress(data)
                except lzma.LZMAError as error:
                    raise UsageError(f"kernel module {self.file}: not xz data: {error}") from error
            self._data = data
        return self._data

    def info(self, key: str) -> list[str]:
        """The values of `key` in .modinfo, in the order they are there."""
        start = key.encode() + b"="
        strings = _section(self.read(), b".modinfo", self.file).split(b"\0")
        return [entry[len(start) :].decode() for entry in strings if entry.startswith(start)]


class ModuleTree:
    """A directory `lib/modules/VERSION`, as installed or as `dpkg -x` leaves it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.version = os.path.basename(os.path.normpath(self.path))
        if not os.path.isdir(os.path.join(self.path, "kernel")):
            raise UsageError(
                f"kernel modules: {self.path} has no directory 'kernel';"
                " give an unpacked kernel package's lib/modules/VERSION"
            )
        self._modules = self._scan()
        self._builtin = self._read_builtin()

    def find(self, name: str) -> Module | None:
        """The module called `name` ("-" and "_" are the same), None if it is built in.

        Raises UsageError, with close names, if this kernel has no such module.
        """
        key = _key(name)
        module = self._modules.get(key)
        if module is not None or key in self._builtin:
            return module
        close = difflib.get_close_matches(key, [*self._modules, *self._builtin])
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UsageError(f"kernel {self.version} has no module {name!r}{hint}")

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
                self._visit(self.find(name), order, path)
        for line in module.info("softdep"):
            for name in _softdeps(line):
                # Soft dependencies are wishes: names that are aliases or not built are passed over.
                self._visit(self._modules.get(_key(name)), order, path)
        order[module.name] = module

    def _scan(self) -> dict[str, Module]:
        found: dict[str, Module] = {}
        for directory, below, files in os.walk(self.path):
            below.sort()
            for file in sorted(files):
                for suffix in _SUFFIXES:
                    if file.endswith(suffix):
                        key = _key(file[: -len(suffix)])
                        where = os.path.join(directory, file)
                        inside = os.path.relpath(where, self.path).removesuffix(".xz")
                        found.setdefault(key, Module(key, where, inside))
        return found

    def _read_builtin(self) -> frozenset[str]:
        try:
            with open(os.path.join(self.path, "modules.builtin")) as file:
                lines = file.read().split()
        except FileNotFoundError:
            return frozenset()
        return frozenset(_key(os.path.basename(line).removesuffix(".ko")) for line in lines)


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
    except (struct.error, IndexError) as error:
        raise UsageError(f"kernel module {file}: truncated or damaged ELF file") from error
    return b""
