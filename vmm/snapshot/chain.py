"""Which directories a snapshot consists of, as its manifests say; nothing of them is checked."""

from __future__ import annotations

import os

from vmm import json_object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CHAIN_MAX = 1000
"""Snapshots that are based on one another."""
MANIFEST_MAX = 16 << 20
"""Bytes of a manifest."""


def chain(path: str) -> list[str]:
    """The directories of the snapshot `path` and of those that it is based on, as far as they are
    there.

    The monitor, which may have been taken over, has written the manifest of `path`, and could name
    any directory in it, such as another machine's snapshot. It names the checksum of that one, too,
    which only who may read the other one knows.
    """
    path = os.path.abspath(path)
    found = [path]
    wanted: object = None
    while len(found) < CHAIN_MAX:
        try:
            manifest = _manifest(path)
            if wanted is not None:
                if manifest["checksum"] != wanted:
                    break
                found.append(path)
            base = manifest["base"]
            path = os.path.abspath(os.path.join(path, base["path"]))
            wanted = str(base["checksum"])
        except (OSError, ValueError, LookupError, TypeError):
            break
    return found


def _manifest(path: str) -> dict[str, Any]:
    """What the manifest of the snapshot `path` says. Raises OSError, ValueError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(os.path.join(path, "manifest.json"), flags), "rb") as file:
        return json_object.read(file.read(MANIFEST_MAX))
