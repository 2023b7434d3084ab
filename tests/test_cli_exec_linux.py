"""`vmm exec` on Linux: a directory as the root, an image, root=; on terminals and in a pipe."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pytest

from tests.support import build_tree
from tests.support.terminals import on_a_terminal, read_until, shown
from vmm.testing.initrds import busybox
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(400)]

APPLETS = (
    *("sh", "cat", "echo", "sleep", "md5sum", "ls", "uname", "stty", "env", "pwd", "id", "tty"),
    *("hostname", "touch"),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system with busybox."""
    top = tmp_path / "root"
    (top / "bin").mkdir(parents=True)
    (top / "etc").mkdir()
    (top / "etc" / "motd").write_text("from the host\n")
    (top / "bin" / "busybox").write_bytes(Path(busybox()).read_bytes())
    (top / "bin" / "busybox").chmod(0o755)
    for applet in APPLETS:
        (top / "bin" / applet).symlink_to("busybox")
    return top


def command(kernel: Kernel, *words: str) -> list[str]:
    options = ["--append", "quiet", "--timeout", "300"]
    return [sys.executable, "-m", "vmm", "exec", str(kernel.vmlinuz), *options, *words]


def test_a_directory_and_a_terminal(cloud_kernel: Kernel, root: Path) -> None:
    script = (
        "cat /etc/motd; echo changed > /etc/motd; cat /etc/motd; uname -r; pwd; echo $WORD; "
        "stty size; trap 'echo interrupted; exit 42' INT; echo rea''dy; while :; do sleep 0.1; done"
    )
    words = command(
        cloud_kernel, "--root", str(root), "--env", "WORD=given", "--workdir", "/bin", "--tty",
        "--", "sh", "-c", script,
    )  # fmt: skip
    with on_a_terminal(words) as (process, terminal):
        modes = termios.tcgetattr(terminal)
        said = read_until(terminal, b"ready\r\n")
        assert termios.tcgetattr(terminal) != modes
        os.write(terminal, b"\x03")  # a character like any other: the guest's terminal knows it
        said += read_until(terminal, b"interrupted\r\n")
        assert process.wait(60) == 42
        assert termios.tcgetattr(terminal) == modes
    lines = shown(said).splitlines()
    assert lines[:7] == [
        "from the host", "changed", cloud_kernel.release, "/bin", "given", "33 101", "ready",
    ]  # fmt: skip
    assert (root / "etc" / "motd").read_text() == "from the host\n"


def make_image(root: Path, tmp_path: Path) -> Path:
    image = tmp_path / "root.img"
    with image.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(
        ["/sbin/mkfs.ext4", "-q", "-d", str(root), str(image)], check=True, capture_output=True
    )
    return image


def test_an_image_and_a_pipe(cloud_kernel: Kernel, root: Path, tmp_path: Path) -> None:
    image = make_image(root, tmp_path)
    before = hashlib.sha256(image.read_bytes()).digest()
    data = os.urandom(1 << 20)
    script = "md5sum; echo err >&2; echo changed > /etc/motd && cat /etc/motd; kill -SEGV $$"
    done = subprocess.run(
        command(cloud_kernel, "--root", str(image), "--", "sh", "-c", script),
        input=data, capture_output=True, check=False, timeout=350,
    )  # fmt: skip
    assert done.stderr == b"err\n"
    assert done.stdout.split() == [hashlib.md5(data).hexdigest().encode(), b"-", b"changed"]
    assert done.returncode == 128 + signal.SIGSEGV
    assert hashlib.sha256(image.read_bytes()).digest() == before


def test_the_kernels_root_and_ctrl_c(cloud_kernel: Kernel, root: Path, tmp_path: Path) -> None:
    """Without an initrd the agent does what the kernel would: mounts root=, executes init=."""
    image = make_image(root, tmp_path)
    script = (
        "cat /etc/motd; trap 'echo interrupted; exit 43' INT; echo rea''dy; "
        "while :; do sleep 0.1; done"
    )
    words = command(
        cloud_kernel, "--drive", f"{image},snapshot", "--append",
        "root=/dev/vda init=/bin/sleep -- 1000", "--", "sh", "-c", script,
    )  # fmt: skip
    with on_a_terminal(words) as (process, terminal):
        said = read_until(terminal, b"ready\r\n")
        assert b"from the host\r\n" in said
        os.write(terminal, b"\x03")  # SIGINT to what is in the foreground
        assert b"interrupted\r\n" in read_until(terminal, None)
        assert process.wait(60) == 43


def test_in_a_build_tree(cloud_kernel: Kernel, root: Path, tmp_path: Path) -> None:
    """A kernel developer's day: no KERNEL, this directory, oneself, a terminal, what is built."""
    tree = build_tree.make(tmp_path / "linux", cloud_kernel)
    results, scratch = tree / "results", Path(tempfile.mkdtemp(dir="/var/tmp"))
    results.mkdir()
    for directory in (results, scratch):
        os.chown(directory, 1000, 1000)
    (root / "data").mkdir()
    (root / "var").symlink_to("/data")  # in the guest, not where the agent begins
    script = (
        "uname -r; pwd; id -u; echo $TERM; tty; hostname; cat ../.config | md5sum; echo kept > it; "
        f"echo $(touch {scratch}/x && ls /data/tmp/{scratch.name})"
    )
    words = [
        sys.executable, "-m", "vmm", "exec", "-v", "--append", "quiet hostname=box", "--timeout",
        "300", "--root", str(root), "--overlay", str(tree), "--rw", str(results), "--overlay",
        str(scratch), "-u", "1000:1000", "-t", "--", "sh", "-c", script,
    ]  # fmt: skip
    with on_a_terminal(words, cwd=results, env={**os.environ, "TERM": "vt220"}) as (process, fd):
        said = shown(read_until(fd, None)).splitlines()
        assert process.wait(60) == 0, said
    line = f"vmm: kernel {cloud_kernel.release}, modules from {tree}, where it was built"
    assert line in said
    digest = hashlib.md5((tree / ".config").read_bytes()).hexdigest()
    at = said.index(cloud_kernel.release)
    assert said[at : at + 8] == [
        cloud_kernel.release, str(results), "1000", "vt220", "/dev/pts/0", "box", f"{digest}  -",
        "x",
    ]  # fmt: skip
    assert (results / "it").read_text() == "kept\n"
    assert (results / "it").stat().st_uid == 1000
    assert list(scratch.iterdir()) == []
    scratch.rmdir()


def test_in_a_build_tree_with_nothing_else_said(cloud_kernel: Kernel) -> None:
    """Its kernel, this host's root, the directory one is in."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as top:
        tree = build_tree.make(Path(top) / "linux", cloud_kernel)
        done = subprocess.run(
            [sys.executable, "-m", "vmm", "exec", "--", "sh", "-c",
             "uname -r; pwd; echo gone > here; cat here; stat -c %U:%G ../../../Makefile"],
            cwd=tree / "tools/testing/selftests", capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=350,
        )  # fmt: skip
        assert (done.stderr, done.returncode) == ("", 0)
        directory = str(tree / "tools/testing/selftests")
        assert done.stdout.splitlines() == [cloud_kernel.release, directory, "gone", "root:root"]
        assert os.listdir(directory) == []
