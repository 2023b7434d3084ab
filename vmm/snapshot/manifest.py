"""A snapshot's manifest: what is in the directory, what made it, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os

from vmm.errors import SnapshotError
from vmm.fifo import open_stored

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAME = "manifest.json"
FORMAT = "vmm snapshot"
SCHEMA = 1
"""Of the manifest and the files it names; a snapshot of a higher one is refused."""
SIZE_MAX = 16 << 20
CHECKSUM = "checksum"
KEYS: dict[str, type | tuple[type, ...]] = {
    "base": (dict, type(None)),
    "host": dict,
    "guest": dict,
    "config": dict,
    "directory": str,
    "disks": list,
    "files": dict,
}
"""What every manifest has."""


def write(directory: str, manifest: dict[str, Any]) -> None:
    """Write it, with its own checksum, and see it on stable storage."""
    data = {"format": FORMAT, "schema": SCHEMA, **manifest}
    data[CHECKSUM] = checksum(data)
    with open(os.path.join(directory, NAME), "x", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read(directory: str) -> dict[str, Any]:
    """The manifest of a snapshot, checked. Raises SnapshotError."""
    path = os.path.join(directory, NAME)
    try:
        with open_stored(path) as file:
            raw = file.read(SIZE_MAX)
    except OSError as err:
        if not os.path.isdir(directory):
            raise SnapshotError(f"{directory} is no directory of a snapshot") from None
        raise SnapshotError(
            f"{directory} is no snapshot, or one that was not finished: {path}: {err.strerror}"
        ) from None
    try:
        data = json.loads(raw)
    except ValueError:
        raise SnapshotError(f"{path} is corrupt: it is not JSON") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SnapshotError(f"{path} is not the manifest of a snapshot")
    schema = data.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise SnapshotError(
            f"{directory} has schema {schema}, newer than {SCHEMA}, which this version of vmm "
            f"understands; it was made by vmm {data.get('vmm', '?')}"
        )
    if data.get(CHECKSUM) != checksum(data):
        raise SnapshotError(f"{path} is corrupt: its checksum is another")
    for key, kind in KEYS.items():
        if not isinstance(data.get(key), kind):
            raise SnapshotError(f"{path} is not whole: {key} is missing")
    names = [*data["files"], *(disk.get("file", "") for disk in data["disks"])]
    outside = [name for name in names if name != os.path.basename(name)]
    if outside:
        raise SnapshotError(f"{path} names files that are not in it: {', '.join(outside)}")
    return data


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


def check_sizes(directory: str, files: dict[str, dict[str, Any]]) -> None:
    """Whether each file is there and as long as it was. Raises SnapshotError."""
    for name, told in files.items():
        path = os.path.join(directory, name)
        try:
            size = os.stat(path).st_size
        except OSError as err:
            raise SnapshotError(f"{path}: {err.strerror}; the snapshot is not complete") from None
        if size != told["size"]:
            raise SnapshotError(f"{path} has {size} bytes, and had {told['size']}: it is damaged")


def read_file(directory: str, name: str, files: dict[str, dict[str, Any]]) -> bytes:
    """A file that has a SHA-256, checked. Raises SnapshotError."""
    path = os.path.join(directory, name)
    try:
        with open_stored(path) as file:
            data = file.readall()
    except OSError as err:
        raise SnapshotError(f"{path}: {err.strerror}; the snapshot is not complete") from None
    if hashlib.sha256(data).hexdigest() != files[name].get("sha256"):
        raise SnapshotError(f"{path} is corrupt: its checksum is another")
    return data
