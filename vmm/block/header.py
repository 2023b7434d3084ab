"""The other files that an image's header names: a backing file, an external data file, extents.

Whoever made an image chose these names. A header that names /etc/shadow, or a host on the network,
would have it opened for the guest; so they count only where the person has named them too
(`backing=`, `data-file=`).
"""

from __future__ import annotations

import os
import struct

from vmm.errors import UsageError

NAME_MAX = 1023
"""Bytes of a backing file's name (QEMU, docs/interop/qcow2.txt)."""
EXTENSIONS_MAX = 1000
"""Header extensions that are looked at; images have a handful."""
AREA = 2 << 20
"""Bytes of a qcow2 header with its extensions: the largest cluster."""
DESCRIPTOR_MAX = (1 << 20) - 1
"""Bytes of a VMDK descriptor: as many as QEMU reads (vmdk_read_desc in block/vmdk.c)."""
EXTENT_NAME_MAX = 511
"""Bytes of an extent's name in a VMDK descriptor, as QEMU reads it."""
ACCESSES = (b"RW", b"RDONLY", b"NOACCESS")
"""The words that a line about an extent begins with."""
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_DATA_FILE = 0x44415441
INCOMPATIBLE_DATA_FILE = 1 << 2
_QCOW2 = struct.Struct(">4sIQI")  # magic, version, backing_file_offset, backing_file_size
_QED = struct.Struct("<4sIII5QII")
QED_BACKING, QED_BACKING_RAW = 1 << 0, 1 << 2


class Header:
    """What the header of an image names.

    Attributes:
        backing: the backing file's name; empty: there is none.
        backing_format: its format, where the header tells.
        data_file: the name of the file with the data (qcow2); empty: there is none.
        extents: (kind, name) of the files a VMDK descriptor lists.
        encrypted: the data can be read with a key only (qcow2, qcow).
    """

    def __init__(self) -> None:
        self.backing = ""
        self.backing_format = ""
        self.data_file = ""
        self.extents: list[tuple[str, str]] = []
        self.encrypted = False


def read(fd: int, format: str, path: str) -> Header:
    """The header of the open image `fd`, whose mark was found. Raises UsageError, OSError."""
    header = Header()
    try:
        if format in ("qcow", "qcow2"):
            _qcow(fd, header)
        elif format == "qed":
            _qed(fd, header)
        elif format == "vmdk":
            _vmdk(fd, header)
    except (ValueError, struct.error):
        raise UsageError(f"--drive {path}: the header of this {format} image is broken") from None
    return header


def _text(data: bytes) -> str:
    return os.fsdecode(data.split(b"\0")[0])


def _name(fd: int, offset: int, size: int) -> str:
    if not offset or not size:
        return ""
    if size > NAME_MAX or offset > AREA:
        raise ValueError
    # Never empty: that there is a backing file is what counts.
    return _text(os.pread(fd, size, offset)) or "a file without a name"


def _qcow(fd: int, header: Header) -> None:
    area = os.pread(fd, AREA, 0)
    _, version, offset, size = _QCOW2.unpack_from(area)
    header.backing = _name(fd, offset, size)
    (method,) = struct.unpack_from(">I", area, 36 if version < 2 else 32)
    header.encrypted = bool(method)
    if version < 2:
        return
    at, incompatible = 72, 0
    if version >= 3:
        (incompatible,) = struct.unpack_from(">Q", area, 72)
        (at,) = struct.unpack_from(">I", area, 100)
    data_file = ""
    for _ in range(EXTENSIONS_MAX):
        if at + 8 > len(area):
            break
        kind, size = struct.unpack_from(">II", area, at)
        if not kind:
            break
        value = area[at + 8 : at + 8 + min(size, NAME_MAX)]
        if kind == EXT_BACKING_FORMAT:
            header.backing_format = _text(value)
        elif kind == EXT_DATA_FILE:
            data_file = _text(value)
        at += 8 + (size + 7) // 8 * 8
    else:
        raise ValueError
    if incompatible & INCOMPATIBLE_DATA_FILE:
        header.data_file = data_file or "a file without a name"


def _qed(fd: int, header: Header) -> None:
    fields = _QED.unpack(os.pread(fd, _QED.size, 0))
    features, offset, size = fields[4], fields[9], fields[10]
    if features & QED_BACKING:
        header.backing = _name(fd, offset, size) or "a file without a name"
        header.backing_format = "raw" if features & QED_BACKING_RAW else ""


def _vmdk(fd: int, header: Header) -> None:
    head = os.pread(fd, 512, 0)
    sparse = head[:4] == b"KDMV"
    offset, size, listed = 0, DESCRIPTOR_MAX, not sparse
    if sparse:
        capacity, _, sector, sectors = struct.unpack_from("<QQQQ", head, 12)
        offset = sector << 9 & (1 << 64) - 1  # QEMU's is a number of 64 bits
        # Of a sparse extent the descriptor lists the file itself, and nobody opens what it lists;
        # of a file with a descriptor alone (capacity 0) they are opened, however long the header
        # says that the descriptor is.
        listed = not capacity
        if not listed:
            size = min(sectors * 512, DESCRIPTOR_MAX)
        if offset >= 1 << 63:
            raise ValueError
    if (sparse and not offset) or head[:4] == b"COWD":
        return
    # A file that is no sparse extent is read as a descriptor, whatever its first lines are.
    text = os.pread(fd, size, offset).split(b"\0")[0]
    for line in text.split(b"\n"):
        if line.strip().startswith(b"parentFileNameHint"):
            name = _text(line.partition(b"=")[2].strip().strip(b'"'))
            header.backing = name or "a file without a name"
        elif listed and line.split(None, 1)[:1] and line.split(None, 1)[0] in ACCESSES:
            header.extents += _extent(line)


def _extent(line: bytes) -> list[tuple[str, str]]:
    """The (kind, name) of an extent from its line in a VMDK descriptor; none where the extent has
    no file. Raises ValueError.

    QEMU reads such a line by sscanf(3), which takes line ends for blanks. A line that is not
    written as QEMU and VMware write it is refused here, because the two readers might see
    different names in it.
    """
    words = line.split(None, 3)
    if len(words) == 3 and words[2] == b"ZERO":
        return []
    if len(words) < 4 or not words[1].isdigit() or not words[2].isalpha():
        raise ValueError
    before, _, rest = words[3].partition(b'"')
    name, end, _ = rest.partition(b'"')
    if before or not end or not name or b"\r" in name or len(name) > EXTENT_NAME_MAX:
        raise ValueError
    return [(words[2].decode(), os.fsdecode(name))]
