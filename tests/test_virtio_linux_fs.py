"""`vmm exec KERNEL --root /` and --fs on Linux: as root, and as an ordinary user with /dev/kvm."""

from __future__ import annotations

import os
import shutil
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
