"""vmm/virtio/fs*.py: what a virtiofsd of ours lets a guest do, asked in FUSE's own protocol."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import boot_files
from tests.support.external import OPEN, ROOT, Fuse
from tests.support.ordinary_user import User, group, ordinary_user
from tests.test_virtio_vhost_user import leftovers
from vmm.errors import HostError, UsageError
from vmm.virtio import fs_sandbox
from vmm.virtio.fs import Share

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as virtiofsd does")
pytestmark = root_only


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


def test_what_it_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = Share(str(tmp_path), tag="x", readonly=True)
    monkeypatch.setattr(fs_sandbox, "__file__", "/nowhere.py")
    with pytest.raises(HostError, match=rf"--fs {tmp_path}: virtiofsd: .*nowhere.py"):
        share.open()
    assert leftovers() == []


# --- the root directory, and ordinary users -------------------------------------------------------

ASK = """
import json, os, sys
from tests.support.external import ROOT, Fuse
from vmm.errors import VmmError
from vmm.virtio.fs import Share

path, access, *below = sys.argv[1:]
try:
    fuse = Fuse(Share(path, tag="x", readonly=access == "ro"))
except VmmError as err:
    print(err)
    sys.exit(err.exit_status)
with fuse.driver:
    told = {}
    noatime = os.O_NOATIME if access == "ro" else 0  # as overlayfs in a guest asks
    for name in below:
        try:
            node = ROOT
            for word in name.split("/"):
                directory, node = node, fuse.find(node, word)
            told[name] = fuse.read(node, noatime).decode()
        except AssertionError as err:
            told[name] = str(err).splitlines()[0]
    changes = fuse.changes(directory, node, below[-1].rpartition("/")[2].encode())
    told["changes"] = {k: v if isinstance(v, int) else 0 for k, v in changes.items()}
    print(json.dumps(told))
"""
"""Serve a directory, read files in it, try to change the last one's directory; JSON of it all."""
EROFS, EACCES = -errno.EROFS, -errno.EACCES


@pytest.mark.parametrize("path", ["/", "/.", "/usr/.."])
def test_the_root_directory_is_served(share: Path, path: str) -> None:
    """pivot_root(2) cannot make the root of a namespace its root."""
    fuse = Fuse(Share(path, tag="x", readonly=True))
    with fuse.driver:
        directory = ROOT
        for name in share.parts[1:]:
            directory = fuse.find(directory, name)
        file = fuse.find(directory, "file")
        assert fuse.read(file) == b"unchanged"
        assert set(fuse.changes(directory, file, b"file").values()) == {-errno.EROFS}
        below = fuse.find(directory, "below")
        inner = fuse.find(below, "file")
        assert fuse.read(inner) == b"unchanged too"
        assert set(fuse.changes(below, inner, b"file").values()) == {-errno.EROFS}
        # What the kernel shows as files is no less read-only.
        node = ROOT
        for name in ("proc", "sys", "kernel", "hostname"):
            node = fuse.find(node, name)
        assert fuse.ask(OPEN, node, struct.pack("<II", os.O_WRONLY, 0)) == -errno.EROFS
    assert leftovers() == []


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    with ordinary_user() as made:
        yield made


def ask(user: User, path: str | Path, access: str, *below: str) -> dict[str, Any]:
    done = user.run([user.python, "-c", ASK, str(path), access, *below])
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    return told


def test_an_ordinary_users_root_directory(user: User) -> None:
    """Every file that the user may read, none that they may not, nothing changes."""
    mine = user.home / "mine"
    mine.mkdir()
    files = {"own": ("vmmx", 0o600), "groups": ("vmmx", 0o640), "roots": ("vmmx", 0o600)}
    for name, (text, mode) in files.items():
        (mine / name).write_text(text)
        (mine / name).chmod(mode)
    shutil.chown(mine, user.name, user.name)
    shutil.chown(mine / "own", user.name, user.name)
    shutil.chown(mine / "groups", "root", group(user.name))
    place = str(mine).lstrip("/")
    told = ask(user, "/", "ro", f"{place}/roots", f"{place}/groups", f"{place}/own")
    changes = told.pop("changes")
    assert list(told.values()) == [str(EACCES), "vmmx", "vmmx"]
    assert set(changes.values()) == {EROFS}
    assert sorted(each.name for each in mine.iterdir()) == ["groups", "own", "roots"]


def test_an_ordinary_users_own_directory(user: User) -> None:
    """Who the guest says makes a file does not matter: it is the user's."""
    mine = user.home / "share,d"
    mine.mkdir()
    (mine / "file").write_text("text")
    for path in (mine, mine / "file"):
        shutil.chown(path, user.name, user.name)
    assert set(ask(user, mine, "ro", "file")["changes"].values()) == {EROFS}
    told = ask(user, mine, "rw", "file")
    assert told["file"] == "text"
    assert {name: error for name, error in told["changes"].items() if error} == {
        "unlink": -errno.EIO,  # as for root, see above
    }
    made = sorted(mine.iterdir())
    assert [path.name for path in made] == ["hard", "link", "n", "new", "other"]
    assert {path.owner() for path in made if not path.is_symlink()} == {user.name}


def test_a_directory_that_the_user_may_not_read(user: User) -> None:
    closed = user.home / "closed"
    closed.mkdir(mode=0o700)
    done = user.run([user.python, "-c", ASK, str(closed), "ro", "file"])
    assert done.stdout == f"--fs {closed}: virtiofsd: this user may not read it\n"
    assert (done.returncode, done.stderr) == (69, "")


@pytest.mark.needs_kvm
def test_a_person_in_a_directory_that_they_may_not_enter(user: User) -> None:
    """As after `sudo -u USER` of root's, in /root: the command begins in /."""
    closed = user.home / "root"
    closed.mkdir(mode=0o700)
    kernel = user.home / "kernel"
    kernel.write_bytes(boot_files.elf())
    words = ["exec", str(kernel), "--root", "/", "--timeout", "60", "--", "true"]
    done = user.run([user.python, "-m", "vmm", *words], cwd=closed)
    assert done.stderr.splitlines()[0] == (
        f"vmm: this user may not enter {closed}: the command begins in /"
    )
    assert done.returncode == 42, done.stderr


@pytest.mark.parametrize("access", ["ro", "rw"])
def test_where_there_are_no_user_namespaces(user: User, access: str) -> None:
    """One line says what would help. The limit is that of a user namespace around it."""
    mine = user.home / f"none-{access}"
    mine.mkdir()
    shutil.chown(mine, user.name, user.name)
    inside = 'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all "$@"'
    done = user.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", inside, "sh",
         user.python, "-c", ASK, str(mine), access, "file"]
    )  # fmt: skip
    assert done.stdout == (
        f"--fs {mine}: virtiofsd: this host allows 0 user namespaces; as root: "
        "sysctl user.max_user_namespaces=10000\n"
    )
    assert (done.returncode, done.stderr) == (69, "")
    assert list(mine.iterdir()) == []


def test_root_in_a_container(tmp_path: Path) -> None:
    """Without CAP_SYS_ADMIN and user namespaces: what needs neither is served."""
    (tmp_path / "file").write_text("text")
    inside = (
        'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-sys_admin "$@"'
    )
    words = ["unshare", "--user", "--map-root-user", "sh", "-c", inside, "sh", sys.executable]
    served = subprocess.run(
        [*words, "-c", ASK, str(tmp_path), "rw", "file"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (served.returncode, served.stderr) == (0, ""), served.stdout
    assert json.loads(served.stdout)["file"] == "text"
    refused = subprocess.run(
        [*words, "-c", ASK, str(tmp_path), "ro", "file"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.stdout.startswith(f"--fs {tmp_path}: virtiofsd: this host allows 0 user")
    assert (refused.returncode, refused.stderr) == (69, "")


CHROOT = """
for each in /*; do
    if [ -L "$each" ]; then cp -P "$each" "$0/"
    elif [ -d "$each" ]; then mkdir -p "$0$each" && mount --rbind "$each" "$0$each"; fi
done
exec chroot "$0" /bin/sh -c 'cd "$0" && exec "$@"' "$PWD" "$@"
"""


def test_a_chroot(tmp_path: Path) -> None:
    """A chroot has no mounts of its own: read-only cannot be promised there."""
    top, shared = tmp_path / "top", tmp_path / "shared"
    top.mkdir()
    shared.mkdir()
    (shared / "file").write_text("text")
    words = ["unshare", "--mount", "sh", "-c", CHROOT, str(top), sys.executable, "-c", ASK]
    refused = subprocess.run(
        [*words, str(shared), "ro", "file"], capture_output=True, text=True, check=False
    )
    assert refused.stdout == (
        f"--fs {shared}: virtiofsd: this is a chroot, which cannot have mounts of its own; "
        "run it outside, or share it writable\n"
    )
    assert (refused.returncode, refused.stderr) == (69, "")
    served = subprocess.run(
        [*words, str(shared), "rw", "file"], capture_output=True, text=True, check=False
    )
    assert (served.returncode, served.stderr) == (0, ""), served.stdout
    assert json.loads(served.stdout)["file"] == "text"


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(512))
    with pytest.raises(UsageError, match=rf"--fs {file}: this is a file, .* --drive {file}$"):
        Share(str(file), tag="x").check_host()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match=r"--fs .*/fifo: this is no directory$"):
        Share(str(tmp_path / "fifo"), tag="x").check_host()
