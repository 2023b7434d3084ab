"""vmm/snapshot/chain.py: the directories of a snapshot and its bases."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vmm.snapshot.chain import CHAIN_MAX, chain


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[]", b"7", b'{"base": [1]}', b'{"base": 7}',
                                  b'{"base": {"path": 7}}', b"\xff"],
                         ids=lambda text: repr(text[:20]))  # fmt: skip
def test_a_base_whose_manifest_is_none_ends_the_chain(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    assert chain(str(tmp_path)) == [str(tmp_path)]


def manifest(directory: Path, checksum: str, base: dict[str, object] | None) -> str:
    directory.mkdir(exist_ok=True)
    text = json.dumps({"checksum": checksum, "base": base})
    (directory / "manifest.json").write_text(text)
    return str(directory)


def test_a_chain_is_followed_by_checksum(tmp_path: Path) -> None:
    """A monitor that was taken over wrote the first manifest: it reads nothing else by that."""
    other = manifest(tmp_path / "other", "5ec7e7", None)
    (tmp_path / "keys").mkdir()
    one = tmp_path / "one"
    for base in (
        {"path": "../other", "checksum": "guess"}, {"path": "../other", "checksum": None},
        {"path": "../other"}, {"path": "../keys", "checksum": "x"}, {"path": f"{tmp_path}/keys"},
        {"path": "..", "checksum": "x"}, {"path": "/", "checksum": None}, {"checksum": "5ec7e7"},
    ):  # fmt: skip
        manifest(one, "1", base)
        assert chain(str(one)) == [str(one)], base
    manifest(one, "1", {"path": "../other", "checksum": "5ec7e7"})
    assert chain(str(one)) == [str(one), other]
    (tmp_path / "other" / "manifest.json").rename(tmp_path / "elsewhere")
    (tmp_path / "other" / "manifest.json").symlink_to(tmp_path / "elsewhere")
    assert chain(str(one)) == [str(one)]
    os.unlink(tmp_path / "other" / "manifest.json")
    os.mkfifo(tmp_path / "other" / "manifest.json")
    assert chain(str(one)) == [str(one)]
    manifest(tmp_path / "loop", "l", {"path": "../loop", "checksum": "l"})
    assert len(chain(str(tmp_path / "loop"))) == CHAIN_MAX
