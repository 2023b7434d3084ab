"""vmm/snapshot/folder.py: what is in a snapshot's directory is a file, and the one looked at."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bare import MIB, bare_machine
from tests.support.snapshots import descriptors, read_manifest
from vmm import Machine
from vmm.errors import SnapshotError
from vmm.snapshot.folder import Folder
from vmm.snapshot.store import Snapshot


def test_files_are_opened_below_the_directory(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").write_bytes(b"0123456789")
    before = descriptors()
    folder = Folder(str(tmp_path / "d"))
    os.rename(tmp_path / "d", tmp_path / "e")
    (tmp_path / "d").mkdir()  # another has its name now
    assert folder.read("file", 100) == folder.read("file", 10, 10) == b"0123456789"
    os.close(folder.open("file", 10))
    for call in (lambda: folder.open("file", 9), lambda: folder.read("file", 100, 11)):
        with pytest.raises(SnapshotError, match=r"file has 10 bytes, and had \d+: it is damaged"):
            call()
    with pytest.raises(SnapshotError, match="file has more than the 0 MiB it can have"):
        folder.read("file", 9)
    with pytest.raises(SnapshotError, match="none: No such file or directory; the snapshot is not"):
        folder.open("none")
    folder.close()
    folder.close()
    assert descriptors() == before


def link(path: Path, moved: Path) -> None:
    path.symlink_to(moved)


def socket_at(path: Path, moved: Path) -> None:
    directory = os.open(path.parent, os.O_PATH)  # whose name may be too long for a socket's
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")
    os.close(directory)


def device(path: Path, moved: Path) -> None:
    if os.geteuid():
        pytest.skip("only root makes devices")
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "a symbolic link": link,
    "a FIFO": lambda path, _: os.mkfifo(path),
    "a directory": lambda path, _: path.mkdir(),
    "a socket": socket_at,
    "a character device": device,
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    (path / "disk.img").write_bytes(b"disk".ljust(MIB, b"\0"))
    with bare_machine("1: hlt; jmp 1b", drives=[str(path / "disk.img")]) as m:
        m.snapshot(path / "base")
        m.snapshot(path / "snap", base=path / "base")
    return path


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["snap", "base"])
def test_what_is_no_file_of_the_snapshots_own(
    snapshot: Path, tmp_path: Path, kind: str, which: str
) -> None:
    """In place of every file, in the snapshot and in its base: with the contents it should have."""
    shutil.copytree(snapshot / "base", tmp_path / "base")
    shutil.copytree(snapshot / "snap", tmp_path / "snap")
    directory = tmp_path / which
    names = ["manifest.json", *read_manifest(directory)["files"]]
    assert {"memory", "memory.index", "state.json", "disk0"} <= set(names)
    before = descriptors()
    for name in names:
        os.rename(directory / name, tmp_path / "moved")
        KINDS[kind](directory / name, tmp_path / "moved")
        for look in (Machine.restore, Snapshot):
            with pytest.raises(SnapshotError, match=f"{name} is {kind}; a snapshot has files of"):
                look(str(tmp_path / "snap"), trusted=True)
        assert descriptors() == before
        (directory / name).rmdir() if kind == "a directory" else (directory / name).unlink()
        os.rename(tmp_path / "moved", directory / name)
    with Machine.restore(tmp_path / "snap"):
        pass


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_disk_that_becomes_a_link_meanwhile(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the snapshot was looked at, and before the machine's disk is opened."""
    shutil.copytree(snapshot / "base", tmp_path / "base")
    from vmm.snapshot import restore

    def begin(config: object) -> object:
        os.rename(tmp_path / "base" / "disk0", tmp_path / "disk0")
        (tmp_path / "base" / "disk0").symlink_to(tmp_path / "disk0")
        return made(config)

    made = restore.begin
    monkeypatch.setattr(restore, "begin", begin)
    with pytest.raises(Exception, match="disk0: Too many levels of symbolic links"):
        Machine.restore(tmp_path / "base")
