"""A snapshot's manifest: what is in the directory, what made it, and whether it is whole.

Somebody else may have written it. Its shape is checked here, once, before anything is done with
what it says; what it names of the host is checked in `vmm.snapshot.trust`.
"""

from __future__ import annotations

import hashlib
import json
import os

from vmm.errors import ShapeError, SnapshotError
from vmm.shapes import (
    U64,
    Either,
    Items,
    Maybe,
    Pairs,
    Shape,
    Table,
    Text,
    Whole,
)  # fmt: skip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.snapshot.folder import Folder

NAME = "manifest.json"
FORMAT = "vmm snapshot"
SCHEMA = 1
"""Of the manifest and the files it names; a snapshot of a higher one is refused."""
SIZE_MAX = 1 << 20
"""Bytes of a manifest; that of a machine with a hundred devices has 60,000."""
STATE, MEMORY, INDEX = "state.json", "memory", "memory.index"
"""The files that every snapshot has."""
READ_MAX = 256 << 20
"""Bytes of a file that is read as a whole: a state, an index."""
FILES_MAX = 1024
DEPTH_MAX = 16
"""Lists and tables within one another."""
CHECKSUM = "checksum"
KEEP, COPIES = "keep", ("copy", "reflink")
"""What is said of a disk that was left where it is, and of those in the snapshot."""

_SIZE = Whole(0, (1 << 63) - 1)
_NAME, _WORD, _PATH, _HASH = Text(255), Text(200), Text(4095), Text(64)


class _FileName(Text):
    """The name of a file in the snapshot's own directory."""

    def check(self, value: object, where: str) -> None:
        super().check(value, where)
        if value != os.path.basename(str(value)) or value in ("", os.curdir, os.pardir):
            raise ShapeError(f"{where}: {str(value)[:200]!r} names a file that is not in it")


_FILE = _FileName(255)
_DISK = Table(
    {"path": _PATH, "size": _SIZE, "how": Text(20, (KEEP, *COPIES))},
    {
        "file": _FILE,
        "index": _FILE,
        "mtime": Whole(-(1 << 63), (1 << 63) - 1),
        "stored": _SIZE,
    },
)
SHAPE: dict[str, Shape] = {
    "base": Maybe(Table({"path": _PATH, "checksum": _HASH})),
    "host": Pairs(_WORD, Either(Whole(-1, U64), _WORD), 100),
    "guest": Table({"tsc_khz": Whole(0, 0xFFFFFFFF), "features": Text(1 << 16)}),
    "config": Pairs(_WORD, Shape(), 1000),
    "directory": _PATH,
    "disks": Items(_DISK, 0, 500),
    "files": Pairs(_FILE, Table({"size": _SIZE}, {"sha256": _HASH}), FILES_MAX),
}
"""What every manifest has. The configuration is looked at where machines are configured."""
_WHOLE = Table(SHAPE, {"vmm": _WORD, "id": _WORD, "created": _WORD, "seal": _HASH})


def write(directory: str, manifest: dict[str, Any]) -> None:
    """Write it, with its own checksum, and see it on stable storage."""
    data = {"format": FORMAT, "schema": SCHEMA, **manifest}
    data[CHECKSUM] = checksum(data)
    with open(os.path.join(directory, NAME), "x", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Folder) -> dict[str, Any]:
    """The manifest of a snapshot, checked. Raises SnapshotError."""
    path = os.path.join(folder.path, NAME)
    try:
        raw = folder.read(NAME, SIZE_MAX)
    except SnapshotError as err:
        raise SnapshotError(
            f"{folder.path} is no snapshot, or one that was not finished: {err}"
        ) from None
    try:
        data = parse(raw)
    except ValueError as err:
        raise SnapshotError(f"{path} is corrupt: it is not JSON ({err})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SnapshotError(f"{path} is not the manifest of a snapshot")
    schema = data.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise SnapshotError(
            f"{folder.path} has schema {str(schema)[:20]}, newer than {SCHEMA}, which this version "
            f"of vmm understands; it was made by vmm {str(data.get('vmm', '?'))[:20]}"
        )
    if data.get(CHECKSUM) != checksum(data):
        raise SnapshotError(f"{path} is corrupt: its checksum is another")
    try:
        _WHOLE.check(data, NAME)
    except ShapeError as err:
        raise SnapshotError(f"{folder.path} is not whole: {err}") from None
    wrong = _wrong_files(data)
    if wrong:
        raise SnapshotError(f"{folder.path} is not whole: {NAME}: {wrong}")
    return data


def parse(raw: bytes) -> Any:
    """JSON text, as this package writes it. Raises ValueError.

    Refused are what other parsers read otherwise: a key that is given twice, NaN and infinities.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is given twice")
        return found

    def constant(text: str) -> None:
        raise ValueError(f"{text} is no number")

    try:
        data = json.loads(raw, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(data)
    return data


def _check_depth(data: object) -> None:
    """ValueError where `data` is nested so deeply that others could not look through it."""
    level = [data]
    for _ in range(DEPTH_MAX):
        below: list[object] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
            elif isinstance(each, list):
                below += each
        level = below
    if level:
        raise ValueError("nested too deeply")


def _wrong_files(data: dict[str, Any]) -> str:
    """How the files that are told of do not fit together; empty: they do."""
    files, disks = data["files"], data["disks"]
    for name in (STATE, MEMORY, INDEX):
        if name not in files:
            return f"files: {name} is missing"
    used = {STATE, MEMORY, INDEX, NAME}
    for number, disk in enumerate(disks):
        if disk["how"] == KEEP:
            if "file" in disk or "index" in disk or "mtime" not in disk:
                return f"disks[{number}] is said to be left where it is, and is not"
            continue
        names = [disk.get("file", "")] + ([disk["index"]] if "index" in disk else [])
        for name in names:
            if name not in files or name in used:
                return f"disks[{number}]: {name!r} is no file of its own"
            used.add(name)
        if files[names[0]]["size"] != disk["size"]:
            return f"disks[{number}]: {names[0]!r} has another size than the disk"
    for name in files:
        if _read_whole(name) and "sha256" not in files[name]:
            return f"files: {name} has no checksum"
    return ""


def checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything in it but the checksum, as JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def seal(directory: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size of each file, and SHA-256 of those that are read as a whole; all on stable storage."""
    return {name: _seal(os.path.join(directory, name)) for name in names}


def _seal(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        if not _read_whole(path):
            return {"size": size}
        return {"size": size, "sha256": hashlib.sha256(file.read()).hexdigest()}


def _read_whole(path: str) -> bool:
    return path.endswith((".json", ".index"))


def check_files(folder: Folder, files: dict[str, dict[str, Any]]) -> None:
    """Whether each file is there, is a file, and as long as it was. Raises SnapshotError."""
    for name, told in files.items():
        folder.check(name, told["size"])


def read_file(folder: Folder, name: str, files: dict[str, dict[str, Any]]) -> bytes:
    """A file that has a SHA-256, checked. Raises SnapshotError."""
    told = files[name]
    data = folder.read(name, READ_MAX, told["size"])
    if hashlib.sha256(data).hexdigest() != told.get("sha256"):
        raise SnapshotError(f"{folder.path}/{name} is corrupt: its checksum is another")
    return data
