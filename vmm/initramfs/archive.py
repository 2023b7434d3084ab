"""The `newc` cpio archive Linux unpacks into its root file system.

Format: Documentation/driver-api/early-userspace/buffer-format.rst. A member is a header of 110
bytes ("070701" and 13 fields of 8 hex digits), the name with its NUL, and the data; name and data
are each padded to 4 bytes. A member named "TRAILER!!!" ends the archive.

The same calls give the same bytes: times are 0, owners are root, inode numbers count up.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
from typing import TYPE_CHECKING

from vmm.errors import UsageError
from vmm.initramfs.modules import ModuleTree

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import BinaryIO, Self

FILE_MAX = 0xFFFFFFFF
"""Bytes in one member: c_filesize has 8 hex digits."""
PATH_MAX = 4096
"""Bytes in a name with its NUL; init/initramfs.c skips a member with a longer one, silently."""
BLOCK = 512
"""cpio(1) pads archives to this; the kernel does not care, `cpio -t` then does not warn."""
_COPY = 1 << 20


class _Member:
    """One member: where its data comes from is looked at when the archive is written."""

    __slots__ = ("data", "mode", "rdev", "source")

    def __init__(
        self,
        mode: int,
        data: bytes = b"",
        source: str | None = None,
        rdev: tuple[int, int] = (0, 0),
    ) -> None:
        self.mode = mode
        self.data = data
        self.source = source
        self.rdev = rdev


class Initramfs:
    """An archive being put together. Parent directories come by themselves (mode 0755).

    Every method takes the path in the guest, with or without a leading "/"; adding a path a
    second time is an error, except a directory. Calls return the archive, so they can be chained.
    """

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}

    def file(
        self,
        path: str,
        data: bytes | str | None = None,
        *,
        source: str | os.PathLike[str] | None = None,
        mode: int | None = None,
    ) -> Self:
        """Add a regular file with `data` (text is UTF-8), or with what the host's `source` holds.

        Without a mode it is 0755 if the source can be executed by its owner, else 0644. The source
        is read when the archive is written.
        """
        if (data is None) == (source is None):
            raise UsageError(f"initramfs file {path!r}: give either data or a source")
        if source is None:
            content = data.encode() if isinstance(data, str) else bytes(data or b"")
            self._add(path, _Member(stat.S_IFREG | (0o644 if mode is None else mode), content))
            return self
        name = os.fspath(source)
        try:
            found = os.stat(name)
        except OSError as error:
            raise UsageError(f"initramfs file {path!r}: {name}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"initramfs file {path!r}: {name} is not a regular file")
        if mode is None:
            mode = 0o755 if found.st_mode & stat.S_IXUSR else 0o644
        self._add(path, _Member(stat.S_IFREG | mode, source=name))
        return self

    def dir(self, path: str, mode: int = 0o755) -> Self:
        """Add a directory; for one that is there already, set its mode."""
        name = _clean(path)
        there = self._members.get(name)
        if there is not None and stat.S_ISDIR(there.mode):
            there.mode = stat.S_IFDIR | mode
        else:
            self._add(path, _Member(stat.S_IFDIR | mode))
        return self

    def node(self, path: str, kind: str, major: int, minor: int, mode: int = 0o600) -> Self:
        """Add a device node; `kind` is "c" (character) or "b" (block)."""
        if kind not in ("b", "c"):
            raise UsageError(f"initramfs node {path!r}: kind {kind!r} is neither 'b' nor 'c'")
        form = stat.S_IFCHR if kind == "c" else stat.S_IFBLK
        self._add(path, _Member(form | mode, rdev=(major, minor)))
        return self

    def symlink(self, path: str, target: str) -> Self:
        """Add a symbolic link that says `target`, which need not be in the archive."""
        self._add(path, _Member(stat.S_IFLNK | 0o777, os.fsencode(target)))
        return self

    def modules(self, tree: str | os.PathLike[str] | ModuleTree, names: Iterable[str]) -> list[str]:
        """Add kernel modules and all they depend on from `tree`, a `lib/modules/VERSION` directory.

        Returns the paths in the guest ("/lib/modules/VERSION/kernel/....ko") in the order to
        insert them in; modules built into the kernel are left out. A module added by an earlier
        call is in the list again but only once in the archive. Compressed modules are stored
        unpacked: insmod hands the kernel plain ELF. Raises UsageError for a name the kernel
        does not have.
        """
        if not isinstance(tree, ModuleTree):
            tree = ModuleTree(tree)
        order = []
        for module in tree.closure(names):
            path = f"lib/modules/{tree.version}/{module.inside}"
            if path not in self._members:
                self.file(path, data=module.read(), mode=0o644)
            order.append("/" + path)
        return order

    def write(self, path: str | os.PathLike[str], *, compress: bool = False) -> None:
        """Write the archive to `path`, through gzip if `compress`."""
        with open(path, "wb") as out:
            self._write_to(out, compress)

    def bytes(self, *, compress: bool = False) -> bytes:
        """The archive in memory, through gzip if `compress`."""
        out = io.BytesIO()
        self._write_to(out, compress)
        return out.getvalue()

    def _add(self, path: str, member: _Member) -> None:
        name = _clean(path)
        if name in self._members:
            raise UsageError(f"initramfs: {path!r} is in the archive already")
        # The kernel creates no parents: a member whose directory is missing is dropped silently.
        parent = os.path.dirname(name)
        above = self._members.get(parent)
        if parent and above is None:
            self._add(parent, _Member(stat.S_IFDIR | 0o755))
        elif above is not None and not stat.S_ISDIR(above.mode):
            raise UsageError(f"initramfs: {path!r}: {parent!r} is not a directory")
        self._members[name] = member

    def _write_to(self, out: BinaryIO, compress: bool) -> None:
        if not compress:
            self._write_plain(out)
            return
        with gzip.GzipFile(filename="", fileobj=out, mode="wb", mtime=0) as packed:
            self._write_plain(packed)

    def _write_plain(self, out: BinaryIO | gzip.GzipFile) -> None:
        done = 0
        for number, (name, member) in enumerate(self._members.items(), start=1):
            done += _write_member(out, number, name, member)
        done += _write_member(out, 0, "TRAILER!!!", _Member(0))
        out.write(bytes(-done % BLOCK))


def _clean(path: str) -> str:
    """The name of `path` as the archive has it: no leading "/", no empty, "." or ".." parts."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in path:
        raise UsageError(f"initramfs: {path!r} is not a path in the archive")
    name = "/".join(parts)
    if len(os.fsencode(name)) >= PATH_MAX:
        raise UsageError(f"initramfs: {path[:40]!r}... is longer than {PATH_MAX - 1} bytes")
    return name


def _write_member(out: BinaryIO | gzip.GzipFile, number: int, name: str, member: _Member) -> int:
    """Write one member; returns its size in the archive in bytes."""
    if member.source is not None:
        try:
            with open(member.source, "rb") as source:
                size = os.fstat(source.fileno()).st_size
                return _write_stream(out, number, name, member, source, size)
        except IsADirectoryError as error:
            raise UsageError(f"initramfs: {member.source} is a directory") from error
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
                raise UsageError(f"initramfs: {member.source}: {error.strerror}") from error
            raise
    return _write_stream(out, number, name, member, io.BytesIO(member.data), len(member.data))


def _write_stream(
    out: BinaryIO | gzip.GzipFile,
    number: int,
    name: str,
    member: _Member,
    data: BinaryIO,
    size: int,
) -> int:
    if size > FILE_MAX:
        raise UsageError(
            f"initramfs: {member.source or name}: {size} bytes; a file holds {FILE_MAX}"
        )
    encoded = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(member.mode) else 1
    # c_ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (number, member.mode, 0, 0, links, 0, size, 0, 0, *member.rdev, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    head += bytes(-len(head) % 4)
    out.write(head)
    left = size
    while left:
        piece = data.read(min(left, _COPY))
        if not piece:
            raise UsageError(f"initramfs: {member.source} became shorter while it was read")
        out.write(piece)
        left -= len(piece)
    out.write(bytes(-size % 4))
    return len(head) + size + -size % 4
