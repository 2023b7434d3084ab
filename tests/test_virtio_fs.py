"""vmm/virtio/fs*.py: what a virtiofsd of ours lets a guest do, asked in FUSE's own protocol."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.virtio_driver import BUFFERS
from tests.test_virtio_vhost_user import External, leftovers
from vmm.errors import HostError
from vmm.virtio import fs, fs_readonly
from vmm.virtio.fs import Share

LOOKUP, SETATTR, SYMLINK, MKDIR, UNLINK, RMDIR, LINK = 1, 4, 6, 9, 10, 11, 13
OPEN, READ, WRITE, SETXATTR, INIT, CREATE, RENAME2 = 14, 15, 16, 21, 26, 35, 45
ROOT = 1

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as virtiofsd does")
pytestmark = root_only


class Fuse:
    """A guest's file system driver, as far as it is needed."""

    def __init__(self, share: Share) -> None:
        self.driver = External(share.open())
        self.unique = 0
        self.ask(INIT, 0, struct.pack("<IIII", 7, 31, 0, 0))

    def ask(self, opcode: int, node: int, data: bytes) -> bytes | int:
        """What is answered, or the error (negative)."""
        driver = self.driver
        self.unique += 1
        request = struct.pack("<IIQQIIII", 40 + len(data), opcode, self.unique, node, 0, 0, 0, 0)
        driver.memory.write(BUFFERS, request + data)
        driver.rings[1].add(
            [(BUFFERS, len(request + data), False), (BUFFERS + 0x10000, 8192, True)]
        )
        driver.kick(1)
        driver.wait(1)
        size, error, unique = struct.unpack("<IiQ", driver.memory.read(BUFFERS + 0x10000, 16))
        assert unique == self.unique
        return error or driver.memory.read(BUFFERS + 0x10010, size - 16)

    def find(self, node: int, name: str) -> int:
        answer = self.ask(LOOKUP, node, name.encode() + b"\0")
        assert isinstance(answer, bytes), answer
        return int(struct.unpack_from("<Q", answer)[0])

    def read(self, node: int) -> bytes:
        answer = self.ask(OPEN, node, struct.pack("<II", os.O_RDONLY, 0))
        assert isinstance(answer, bytes), answer
        (handle,) = struct.unpack_from("<Q", answer)
        data = self.ask(READ, node, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0))
        assert isinstance(data, bytes), data
        return data

    def changes(self, directory: int, file: int, name: bytes) -> dict[str, bytes | int]:
        """What each way of changing something is answered."""
        chmod = struct.pack("<IIQQQQQQIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o777, 0, 0, 0, 0)
        create = struct.pack("<IIII", os.O_CREAT | os.O_RDWR, 0o644, 0, 0)
        truncate = struct.pack("<II", 8, 0) + bytes(80)
        return {
            "mkdir": self.ask(MKDIR, directory, struct.pack("<II", 0o755, 0) + b"new\0"),
            "create": self.ask(CREATE, directory, create + b"n\0"),
            "symlink": self.ask(SYMLINK, directory, b"link\0target\0"),
            "link": self.ask(LINK, directory, struct.pack("<Q", file) + b"hard\0"),
            "write": self.ask(OPEN, file, struct.pack("<II", os.O_WRONLY, 0)),
            "read and write": self.ask(OPEN, file, struct.pack("<II", os.O_RDWR, 0)),
            "truncate": self.ask(OPEN, file, struct.pack("<II", os.O_RDONLY | os.O_TRUNC, 0)),
            "chmod": self.ask(SETATTR, file, chmod),
            "size": self.ask(SETATTR, file, truncate),
            "rename": self.ask(
                RENAME2, directory, struct.pack("<QII", directory, 0, 0) + name + b"\0other\0"
            ),
            "unlink": self.ask(UNLINK, directory, name + b"\0"),
        }


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Path]:
    """A directory with a file, and another file system mounted below."""
    directory = tmp_path / "share,d"
    (directory / "below").mkdir(parents=True)
    (directory / "file").write_text("unchanged")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(directory / "below")], check=True)
    try:
        (directory / "below" / "file").write_text("unchanged too")
        yield directory
    finally:
        subprocess.run(["umount", str(directory / "below")], check=True)


def test_a_readonly_share_does_not_change(share: Path) -> None:
    before = {path: path.stat() for path in share.rglob("*")}
    text = str(share).replace(",", ",,") + ",tag=x,readonly"
    fuse = Fuse(Share.parse(text))
    with fuse.driver:
        file = fuse.find(ROOT, "file")
        assert fuse.read(file) == b"unchanged"
        refused = fuse.changes(ROOT, file, b"file")
        below = fuse.find(ROOT, "below")
        inner = fuse.find(below, "file")
        assert fuse.read(inner) == b"unchanged too"
        refused |= {f"{name} below": x for name, x in fuse.changes(below, inner, b"file").items()}
    assert {name: error for name, error in refused.items() if error != -errno.EROFS} == {}
    after = {path: path.stat() for path in share.rglob("*")}
    assert {path: (stat.st_size, stat.st_mode, stat.st_mtime_ns, stat.st_nlink)
            for path, stat in before.items()} == {
        path: (stat.st_size, stat.st_mode, stat.st_mtime_ns, stat.st_nlink)
        for path, stat in after.items()
    }  # fmt: skip
    (share / "file").write_text("here it can be written")  # the mount was its own
    assert leftovers() == []


@pytest.mark.parametrize("readonly", [False, True])
def test_a_relative_path(share: Path, monkeypatch: pytest.MonkeyPatch, readonly: bool) -> None:
    monkeypatch.chdir(share.parent)
    fuse = Fuse(Share(share.name, tag="x", readonly=readonly))
    with fuse.driver:
        assert fuse.read(fuse.find(ROOT, "file")) == b"unchanged"


def test_a_writable_one_does(share: Path) -> None:
    fuse = Fuse(Share(str(share), tag="x"))
    with fuse.driver:
        answers = fuse.changes(ROOT, fuse.find(ROOT, "file"), b"file")
    assert {name: each for name, each in answers.items() if isinstance(each, int) and each} == {
        "unlink": -errno.EIO,  # virtiofsd looks it up first, and it is called otherwise by then
    }
    assert sorted(path.name for path in share.iterdir()) == [
        "below", "hard", "link", "n", "new", "other",
    ]  # fmt: skip


def test_where_no_mount_can_be_made(tmp_path: Path) -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-I", fs_readonly.__file__,
         str(tmp_path), "/bin/echo", "served"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("a read-only mount cannot be made (Operation not permitted); it")
    assert done.stderr.count("\n") == 1


def test_what_it_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = Share(str(tmp_path), tag="x", readonly=True)
    monkeypatch.setattr(fs_readonly, "__file__", "/nowhere.py")
    with pytest.raises(HostError, match=rf"--fs {tmp_path}: virtiofsd: .*nowhere.py"):
        share.open()
    assert leftovers() == []


def test_one_that_can_be_told_is_told(tmp_path: Path) -> None:
    """virtiofsd 1.13 (Debian 13) has the option; its help says so."""
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\necho '      --readonly  Set the filesystem read-only'\n")
    program.chmod(0o755)
    share = Share(str(tmp_path), tag="x", readonly=True)
    command = [str(program), "--shared-dir", str(tmp_path)]
    assert share._readonly(command) == [*command, "--readonly"]
    old = [fs.VIRTIOFSD[1], "-o", "source=x"]
    assert share._readonly(old)[-3:] == old
    assert share._readonly(old)[3] == str(tmp_path)
