"""Snapshots that tests change, as somebody who hands one on can: every checksum is right again."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vmm.snapshot import manifest, plain


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the snapshot `path`."""
    return json.loads((path / manifest.NAME).read_text())  # type: ignore[no-any-return]


def write_manifest(path: Path, told: dict[str, Any]) -> None:
    """Make `told` the manifest of the snapshot `path`, with the checksum that is right for it."""
    told[manifest.CHECKSUM] = manifest.checksum(told)
    (path / manifest.NAME).write_text(json.dumps(told))


def forge(path: Path, /, config: dict[str, object] | None = None, **values: object) -> None:
    """Change keys of the manifest of the snapshot `path`, and of the configuration in it."""
    told = read_manifest(path)
    told.update(values)
    told["config"].update(config or {})
    write_manifest(path, told)


def reseal(path: Path, *names: str) -> None:
    """Have the manifest of the snapshot `path` tell what is in the files `names` now."""
    told = read_manifest(path)
    for name in names:
        data = (path / name).read_bytes()
        told["files"][name] = {"size": len(data)}
        if name.endswith((".json", ".index")):
            told["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    write_manifest(path, told)


def write_state(path: Path, state: object) -> None:
    """Make `state` the state in the snapshot `path`."""
    (path / "state.json").write_bytes(plain.dumps(state))
    reseal(path, "state.json")


def age(path: Path, seconds: int) -> None:
    """Have a snapshot be so much older than it is."""
    state = plain.loads((path / "state.json").read_bytes())
    state["vm"]["realtime"] -= seconds * 10**9
    write_state(path, state)


def descriptors() -> list[str]:
    """What this process has open, to be compared with later. (Guest memory, and the file behind it,
    goes when the last view of it does: that of a ring, in a machine that is garbage.)"""
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))
