"""`vmm exec KERNEL --root /` and --fs on Linux: as root, and as an ordinary user with /dev/kvm."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ordinary_user import ordinary_user
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(400)]
OPTIONS = ("--append", "quiet", "--timeout", "300")


def test_the_hosts_root_directory(cloud_kernel: Kernel) -> None:
    """The first command of docs/exec.md."""
    file = Path(f"/var/tmp/vmm-test-{os.getpid()}")
    file.write_text("from the host\n")
    script = f"uname -r; id; cat {file}; echo changed > {file}; cat {file}"
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "exec", str(cloud_kernel.vmlinuz), *OPTIONS,
         "--root", "/", "--", "sh", "-c", script],
        capture_output=True, text=True, check=False, timeout=350,
    )  # fmt: skip
    assert (done.stderr, done.returncode) == ("", 0)
    lines = done.stdout.splitlines()
    assert lines[0] == cloud_kernel.release
    assert lines[1].startswith("uid=0(root) gid=0(root)")
    assert lines[2:] == ["from the host", "changed"]
    assert file.read_text() == "from the host\n"
    file.unlink()


def test_an_ordinary_user(cloud_kernel: Kernel) -> None:
    """The host's root directory, and a directory of the user's that the guest's root writes to.

    mount(8) is root's program with its set-user-ID bit, and root is nobody to the guest.
    """
    with ordinary_user() as user:
        mine = user.home / "mine"
        mine.mkdir()
        secret = user.home / "secret"
        secret.write_text("not for them\n")
        secret.chmod(0o600)
        shutil.chown(mine, user.name, user.name)
        script = (
            f"id; cat {secret}; touch {user.home}/new && ls {user.home}/new; "
            "mkdir /run/m && mount -t virtiofs mine /run/m && echo made > /run/m/made && "
            "cat /run/m/made"
        )
        done = user.vmm(
            "exec", user.see(cloud_kernel.vmlinuz), *OPTIONS, "--root", "/",
            "--fs", f"{mine},tag=mine", "--", "sh", "-c", script,
            timeout=350,
        )  # fmt: skip
        assert "Permission denied" in done.stderr, done.stderr
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].startswith("uid=0(root) gid=0(root)")
        assert lines[1:] == [f"{user.home}/new", "made"]
        assert not (user.home / "new").exists()
        made = mine / "made"
        assert (made.read_text(), made.owner()) == ("made\n", user.name)
        assert os.stat(made).st_gid == os.stat(mine).st_gid


def test_an_ordinary_users_day(cloud_kernel: Kernel) -> None:
    """--rw, --overlay and -u: names of every kind, who owns what is made, what else is in a
    directory than files."""
    with ordinary_user() as user:
        home = os.fsencode(user.home)
        names = [b"plain", b"sp ace", b"a,b:c\\d", b"n\xff\xc3", b"'$(q)\""]
        for name in [*names, b"over"]:
            os.mkdir(home + b"/" + name)
            os.chown(home + b"/" + name, os.stat(home).st_uid, os.stat(home).st_gid)
        plain = user.home / "plain"
        shutil.copy("/usr/bin/id", plain / "roots-id")
        (plain / "roots-id").chmod(0o4755)
        (plain / "out").symlink_to("/proc/version")
        (plain / "secret").write_text("not for them\n")
        (plain / "secret").chmod(0o600)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(plain / "socket"))
        (user.home / "script").write_text(
            "id -un; pwd; cd plain; ./roots-id -u; grep -c Linux out; cat secret; ls -F socket\n"
            "echo text > file; mkdir dir; mkfifo fifo; (echo piped > fifo & cat fifo)\n"
            "ln file hard; ln -s /nowhere link; mv dir moved; truncate -s 1G sparse\n"
            "cp roots-id own-id; chmod 4755 own-id; touch over-it; rm over-it\n"
            'cd ..; for each in sp* a* n* \\\'*; do echo there > "$each/new" && echo in; done\n'
            "touch here; echo kept > over/new; cat over/new; chown root over/new; echo end\n"
        )
        options = [b"--rw=" + home + b"/" + name for name in names]
        done = user.run(
            [user.python, "-m", "vmm", "exec", user.see(cloud_kernel.vmlinuz), *OPTIONS,
             "--root", "/", *map(os.fsdecode, options), "--overlay", "over", "-u", user.name,
             "--", "sh", "script"],
            timeout=350,
        )  # fmt: skip
        uid = os.stat(home).st_uid
        lines = done.stdout.splitlines()
        assert lines == [
            user.name, str(user.home), str(uid), "1", "socket=", "piped", *["in"] * 4, "kept",
            "end",
        ], done.stdout + done.stderr  # fmt: skip
        complaints = done.stderr.splitlines()
        assert len(complaints) == 3, complaints
        assert "Permission denied" in complaints[0]
        assert "own-id" in complaints[1] and "Operation not permitted" in complaints[1]
        assert "Operation not permitted" in complaints[2]
        made = [plain / each for each in ("file", "moved", "fifo", "hard", "sparse", "own-id")]
        assert {os.lstat(path).st_uid for path in [*made, plain / "link"]} == {uid}
        assert not (plain / "own-id").stat().st_mode & 0o6000
        assert (plain / "file").read_text() == "text\n"
        assert (plain / "file").stat().st_nlink == 2
        assert (plain / "sparse").stat().st_blocks == 0
        assert os.readlink(plain / "link") == "/nowhere"
        for name in names[1:]:
            assert os.stat(home + b"/" + name + b"/new").st_uid == uid
        assert os.listdir(user.home / "over") == []
        assert not (user.home / "here").exists()


def test_a_guests_root_leaves_no_rights_on_the_host(cloud_kernel: Kernel, tmp_path: Path) -> None:
    """Set-ID bits and device nodes in a share of root's, which others on the host would use."""
    share = tmp_path / "share"
    (share / "dir").mkdir(parents=True)
    (share / "had").write_text("x")
    (share / "had").chmod(0o6755)
    script = (
        f"cd {share}; cp -p /bin/sh shell; chmod 4755 shell; chmod 2755 shell; cp /bin/sh plain; "
        "install -m 4755 /bin/true installed; mknod block b 8 0; mknod char c 1 1; "
        "cat /bin/true > had; mkfifo fifo; chmod 1777 dir; ls"
    )
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "exec", str(cloud_kernel.vmlinuz), *OPTIONS,
         "--root", "/", "--rw", str(share), "--", "sh", "-c", script],
        capture_output=True, text=True, check=False, timeout=350,
    )  # fmt: skip
    assert {"dir", "fifo", "had", "plain", "shell"} <= set(done.stdout.split()), done.stderr
    assert done.stderr.count("Operation not permitted") == 5, done.stderr
    for path in share.rglob("*"):
        mode = path.lstat().st_mode
        assert not mode & 0o6000 and not stat.S_ISBLK(mode) and not stat.S_ISCHR(mode), path
    assert stat.S_IMODE((share / "dir").stat().st_mode) == 0o1777
