"""`vmm exec` on Linux: a directory as the root on a terminal, an image as the root in a pipe."""

from __future__ import annotations

import hashlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.testing.initrds import busybox
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(400)]

APPLETS = ("sh", "cat", "echo", "sleep", "md5sum", "ls", "uname", "stty", "env", "pwd")


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


def test_a_directory_and_ctrl_c(cloud_kernel: Kernel, root: Path) -> None:
    script = (
        "cat /etc/motd; echo changed > /etc/motd; cat /etc/motd; uname -r; pwd; echo $WORD;"
        "trap 'echo interrupted; exit 42' INT; echo rea''dy; while :; do sleep 0.1; done"
    )
    words = command(
        cloud_kernel, "--root", str(root), "--env", "WORD=given", "--workdir", "/bin", "--",
        "sh", "-c", script,
    )  # fmt: skip
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # controls this session
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            said = read_until(ours, b"ready\r\n")
            os.write(ours, b"\x03")
            said += read_until(ours, None)
            status = process.wait(60)
        finally:
            process.kill()
            os.close(ours)
    lines = said.decode().replace("\r", "").splitlines()
    assert lines[:6] == [
        "from the host", "changed", cloud_kernel.release, "/bin", "given", "ready",
    ]  # fmt: skip
    assert "interrupted" in lines[6]
    assert status == 42
    assert (root / "etc" / "motd").read_text() == "from the host\n"


def read_until(fd: int, wanted: bytes | None) -> bytes:
    """Output up to `wanted`, or (None) to its end."""
    data = b""
    while wanted is None or wanted not in data:
        try:
            part = os.read(fd, 4096)
        except OSError:  # EIO: nobody has the terminal open any more
            part = b""
        if not part:
            assert wanted is None, data.decode(errors="replace")
            return data
        data += part
    return data


def test_an_image_and_a_pipe(cloud_kernel: Kernel, root: Path, tmp_path: Path) -> None:
    image = tmp_path / "root.img"
    with image.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(
        ["/sbin/mkfs.ext4", "-q", "-d", str(root), str(image)], check=True, capture_output=True
    )
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
