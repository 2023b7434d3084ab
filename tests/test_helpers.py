"""Helper programs that fail at their start: one line says which and how, after a bounded time."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_virtio_vhost_user import leftovers
from vmm.block import qmp
from vmm.block.drive import Drive
from vmm.errors import HostError
from vmm.net import user
from vmm.net.config import Net
from vmm.virtio import vhost_user_wire
from vmm.virtio.fs import Share

MIB = 1 << 20


def open_share(directory: Path) -> object:
    return Share(str(directory), tag="x").open()


def open_disk(directory: Path, more: str = "") -> object:
    path = directory / "disk.qcow2"
    subprocess.run(
        ["/usr/bin/qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True
    )
    return Drive.parse(f"{path},format=qcow2{more}").open(0)


def open_snapshot(directory: Path) -> object:
    return open_disk(directory, ",snapshot")


def open_card(directory: Path) -> object:
    return Net.parse("user").open(0)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Have the first program of a name in PATH be a script."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (tmp_path / "bin").mkdir()

    def make(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


KINDS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "share": ("virtiofsd", open_share),
    "disk": ("qemu-storage-daemon", open_disk),
    "snapshot": ("qemu-storage-daemon", open_snapshot),
    "card": ("passt", open_card),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", r"it has ended \(status 3\)|it ended without a word"),
        ("kill -KILL $$", "it was killed by SIGKILL|it ended without a word"),
        ("echo first >&2; echo why it fails >&2; exit 1", "why it fails"),
        ("echo why it fails >&2; exec sleep 60", "why it fails|was not ready within"),
        ("exec sleep 60", "does not answer|was not ready within"),
    ],
)
def test_one_that_does_not_serve(
    tmp_path: Path,
    program: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    script: str,
    said: str,
) -> None:
    for module, name in (
        (vhost_user_wire, "TIMEOUT"), (qmp, "ANSWER_WITHIN"), (user, "START_WITHIN"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 0.5)
    name, opened = KINDS[kind]
    program(name, script)
    with pytest.raises(HostError) as caught:
        opened(tmp_path)
    line = str(caught.value)
    option = {"share": "--fs ", "card": "--net user"}.get(kind, "--drive ")
    assert re.fullmatch(rf"{option}.*{name}:? .*({said}).*", line), line
    assert "Errno" not in line
    assert leftovers() == []
