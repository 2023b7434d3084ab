"""Snapshots that tests change."""

from __future__ import annotations

import json
from pathlib import Path

from vmm.snapshot import manifest, plain


def age(path: Path, seconds: int) -> None:
    """Have a snapshot be so much older than it is; its checksums are right again."""
    state = plain.loads((path / "state.json").read_bytes())
    state["vm"]["realtime"] -= seconds * 10**9
    (path / "state.json").write_bytes(plain.dumps(state))
    told = json.loads((path / manifest.NAME).read_text())
    told["files"].update(manifest.seal(str(path), ["state.json"]))
    told[manifest.CHECKSUM] = manifest.checksum(told)
    (path / manifest.NAME).write_text(json.dumps(told))
