"""vmm/virtio/fs_sandbox.py: what a guest's root leaves on the host, in FUSE's own protocol."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.support.external import CREATE, MKDIR, OPEN, ROOT, SETATTR, SETXATTR, WRITE, Fuse
from tests.support.ordinary_user import ordinary_user
from vmm.errors import UsageError
from vmm.virtio import fs_sandbox
from vmm.virtio.fs import Share

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as virtiofsd does")

MKNOD = 8
REFUSED = (-errno.EPERM, -errno.ENOSYS)


def chmod(mode: int) -> bytes:
    return struct.pack("<IIQQQQQQIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, mode, 0, 0, 0, 0)


def mknod(name: str, mode: int, device: int = 0) -> bytes:
    return struct.pack("<IIII", mode, device, 0, 0) + name.encode() + b"\0"


def create(name: str, mode: int) -> bytes:
    return struct.pack("<IIII", os.O_CREAT | os.O_RDWR, mode, 0, 0) + name.encode() + b"\0"


def try_all(fuse: Fuse, file: int, directory: int) -> dict[str, int]:
    """Each way of leaving such a file; 0, or the error."""
    zero = struct.pack("<I", 0x01000000)
    answers: dict[str, Any] = {}
    for name, mode in (("suid", 0o4755), ("sgid", 0o2755), ("both", 0o6711)):
        answers[f"chmod {name}"] = fuse.ask(SETATTR, file, chmod(mode))
        answers[f"create {name}"] = fuse.ask(CREATE, ROOT, create(f"create-{name}", mode))
        regular = mknod(f"mknod-{name}", stat.S_IFREG | mode)
        answers[f"mknod {name}"] = fuse.ask(MKNOD, ROOT, regular)
    capability = struct.pack("<II", 20, 0) + b"security.capability\0" + zero * 5
    answers["file capability"] = fuse.ask(SETXATTR, file, capability)
    for name, kind in (("char", stat.S_IFCHR), ("block", stat.S_IFBLK)):
        answers[f"{name} device"] = fuse.ask(MKNOD, ROOT, mknod(name, kind | 0o666, 0x103))
    answers["chmod directory"] = fuse.ask(SETATTR, directory, chmod(0o2775))
    return {name: each if isinstance(each, int) else 0 for name, each in answers.items()}


def left(directory: Path) -> set[str]:
    """What is there that gives somebody else's rights."""
    found = set()
    for path in directory.rglob("*"):
        mode = path.lstat().st_mode
        if mode & 0o6000 or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            found.add(path.name)
    return found


def tree(top: Path) -> Path:
    (top / "share" / "dir").mkdir(parents=True)
    (top / "share" / "file").write_text("x")
    return top / "share"


def test_nothing_is_left_that_gives_others_rights(tmp_path: Path) -> None:
    share = tree(tmp_path)
    fuse = Fuse(Share(str(share), tag="x"))
    with fuse.driver:
        answers = try_all(fuse, fuse.find(ROOT, "file"), fuse.find(ROOT, "dir"))
        assert {name: each for name, each in answers.items() if each not in REFUSED} == {}
        assert left(share) == set()
        ordinary = {
            "chmod": fuse.ask(SETATTR, fuse.find(ROOT, "file"), chmod(0o1777)),
            "create": fuse.ask(CREATE, ROOT, create("made", 0o777)),
            "directory": fuse.ask(MKDIR, ROOT, struct.pack("<II", 0o755, 0) + b"new\0"),
            "fifo": fuse.ask(MKNOD, ROOT, mknod("fifo", stat.S_IFIFO | 0o644)),
            "file": fuse.ask(MKNOD, ROOT, mknod("regular", stat.S_IFREG | 0o644)),
            "whiteout": fuse.ask(MKNOD, ROOT, mknod("whiteout", stat.S_IFCHR)),
        }
        assert {name: each for name, each in ordinary.items() if isinstance(each, int)} == {}
        assert (share / "file").stat().st_mode & 0o7777 == 0o1777


def test_what_had_the_bits_loses_them_when_it_is_written(tmp_path: Path) -> None:
    """Else the guest puts its own program there."""
    share = tree(tmp_path)
    (share / "file").chmod(0o6755)
    fuse = Fuse(Share(str(share), tag="x"))
    with fuse.driver:
        file = fuse.find(ROOT, "file")
        answer = fuse.ask(OPEN, file, struct.pack("<II", os.O_WRONLY, 0))
        assert isinstance(answer, bytes)
        (handle,) = struct.unpack_from("<Q", answer)
        fuse.ask(WRITE, file, struct.pack("<QQIIQII", handle, 0, 4, 0, 0, 0, 0) + b"evil")
    assert (share / "file").read_text() == "evil"
    assert left(share) == set()


@pytest.mark.parametrize("words", ["suid", "dev"])
def test_either_is_had_by_its_word(tmp_path: Path, words: str) -> None:
    share = tree(tmp_path)
    fuse = Fuse(Share.parse(f"{share},tag=x,{words}"))
    with fuse.driver:
        answers = try_all(fuse, fuse.find(ROOT, "file"), fuse.find(ROOT, "dir"))
    refused = {name for name, each in answers.items() if each in REFUSED}
    devices = {"char device", "block device"}
    # virtiofsd offers no extended attributes
    assert refused - {"file capability"} == (devices if words == "suid" else set(answers) - devices
                                             - {"file capability"})  # fmt: skip


USERS = """
import sys
sys.path.insert(0, ".")
from pathlib import Path
from tests.test_virtio_fs_setid import *
share = Path(sys.argv[1])
fuse = Fuse(Share(str(share), tag="x"))
with fuse.driver:
    answers = try_all(fuse, fuse.find(ROOT, "file"), fuse.find(ROOT, "dir"))
print({name: each for name, each in answers.items() if each not in REFUSED}, left(share))
"""


def test_an_ordinary_users_share(tmp_path: Path) -> None:
    with ordinary_user() as user:
        share = tree(user.home)
        for path in (share, *share.rglob("*")):
            os.chown(path, user.home.stat().st_uid, user.home.stat().st_gid)
        done = user.run([user.python, "-c", USERS.replace("pytestmark", ""), str(share)])
        assert done.stdout == "{} set()\n", done.stderr


@pytest.mark.parametrize(
    ("access", "left_out"),
    [
        ("rw", {"mknod", "fsetid", "setfcap"}), ("ro", {"mknod", "fsetid", "setfcap"}),
        ("rw,suid", {"mknod"}), ("rw,dev", {"fsetid", "setfcap"}), ("ro,suid,dev", set()),
    ],
)  # fmt: skip
def test_virtiofsd_is_told(access: str, left_out: set[str]) -> None:
    for kind in ("c", "rust"):
        words = fs_sandbox.command(kind, "virtiofsd", "/mnt", "3", "namespace", access)
        told = {each.rpartition("modcaps=")[2] for each in words if "modcaps=" in each}
        assert {name for each in told for name in each.replace("-", "").split(":")} == left_out


def test_what_is_neither() -> None:
    with pytest.raises(UsageError, match="'setid' is not tag=NAME, readonly, suid or dev"):
        Share.parse("/srv,tag=x,setid")
    with pytest.raises(UsageError, match="suid"):
        Share("/srv", tag="x", suid=1)  # type: ignore[arg-type]
    share = Share.parse("/srv,tag=x,suid=on,dev=off")
    assert (share.suid, share.dev, share.readonly) == (True, False, False)
