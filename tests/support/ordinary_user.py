"""An ordinary user, made for a test and removed after it, who may open /dev/kvm and nothing else.

What the user needs of this clone, its Python and its kernels is bound into a directory that the
user may read, in a mount namespace that goes with the command: nothing of root's is opened to them.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmm.testing.kernels import cache_directory

ROOT = Path(__file__).resolve().parents[2]
ENTER = """
while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit; shift 2; done; shift
exec setpriv --reuid "$0" --regid "$0" --init-groups --no-new-privs --bounding-set=-all \
    --inh-caps=-all -- "$@"
"""
KVM = os.makedev(10, 232)


class User:
    """A user of this host; `home` is theirs, and a group of theirs may open /dev/kvm."""

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self.home = home
        self.python = str(home / "python" / "bin" / f"python3.{sys.version_info.minor}")
        self._binds: list[tuple[str, str]] = [
            (str(ROOT), self._place("project")),
            (sys.base_prefix, self._place("python")),
            (sysconfig.get_path("platlib"), self._place("packages")),
        ]
        kernels = cache_directory()
        if kernels.is_dir():
            self._binds.append((str(kernels), self._place("kernels")))
        if Path("/dev/kvm").exists():
            node = home / "kvm"
            os.mknod(node, stat.S_IFCHR | 0o660, KVM)
            shutil.chown(node, "root", group(name))
            node.chmod(0o660)
            self._binds.append((str(node), "/dev/kvm"))

    def _place(self, name: str) -> str:
        (self.home / name).mkdir()
        return str(self.home / name)

    def see(self, path: str | Path) -> str:
        """What `path` in the kernels' cache is called by the user."""
        return str(self.home / "kernels" / Path(path).relative_to(cache_directory()))

    def run(
        self,
        words: Sequence[str],
        *,
        timeout: float = 120,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the user, in their home directory or another."""
        binds = [word for pair in self._binds for word in pair]
        command = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", ENTER]
        return subprocess.run(
            [*command, self.name, *binds, "--", *words],
            cwd=cwd or self.home, capture_output=True, text=True, check=False, timeout=timeout,
            env={
                "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(self.home),
                "USER": self.name, "LANG": "C.UTF-8",
                "PYTHONPATH": f"{self.home}/project:{self.home}/packages", **(env or {}),
            },
        )  # fmt: skip

    def vmm(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """`vmm WORDS` as the user."""
        return self.run([self.python, "-m", "vmm", *words], timeout=timeout)


def group(name: str) -> str:
    """The supplementary group of user `name`, as `kvm` is on Debian."""
    return f"{name}kvm"


def _quiet(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def ordinary_user() -> Iterator[User]:
    """A user for as long as the block."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make an ordinary user")
    if shutil.which("useradd") is None:
        pytest.skip("no useradd here")
    name = f"vmmtest{os.getpid()}"
    top = Path(tempfile.mkdtemp(prefix="vmm-user-", dir="/var/tmp"))
    try:
        top.chmod(0o755)
        home = top / "home"
        home.mkdir()
        _quiet("groupadd", group(name))
        try:
            _quiet(
                "useradd", "--no-create-home", "--user-group", "--groups", group(name),
                "--home-dir", str(home), "--shell", "/bin/sh", name,
            )  # fmt: skip
            try:
                shutil.chown(home, name, name)
                yield User(name, home)
            finally:
                _quiet("userdel", name)
        finally:
            _quiet("groupdel", group(name))
    finally:
        shutil.rmtree(top)
