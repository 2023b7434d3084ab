"""Linux's own drivers on devices that virtiofsd serves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(300)]

FS = """
mount -t virtiofs data /mnt || echo FAILED mount
md5sum /mnt/random
cp /mnt/random /mnt/copy && mkdir -p /mnt/a/b && mv /mnt/copy /mnt/a/b/moved
ln -s b/moved /mnt/a/link && ln /mnt/a/b/moved /mnt/a/hard && chmod 600 /mnt/a/hard
echo appended >> /mnt/log; echo appended >> /mnt/log; rm /mnt/gone
i=0; while [ $i -lt 200 ]; do echo $i > /mnt/a/$i; i=$((i+1)); done; ls /mnt/a | wc -l
umount /mnt
for i in 1 2 3 4 5; do
  echo virtio0 > /sys/bus/virtio/drivers/virtiofs/unbind
  echo virtio0 > /sys/bus/virtio/drivers/virtiofs/bind
done
mount -t virtiofs data /mnt && md5sum /mnt/a/link
"""


def run(kernel: Kernel, initrd: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "run", str(kernel.vmlinuz), "--initrd", str(initrd),
         "--append", "quiet", "--cpus", "2", "--timeout", "150", *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_host_directory(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    share = tmp_path / "share,d"
    share.mkdir()
    data = os.urandom(3_000_000)
    (share / "random").write_bytes(data)
    (share / "gone").touch()
    initrd = make_initrd(FS, kernel=cloud_kernel, modules=["virtio_mmio", "virtiofs"])
    said = run(cloud_kernel, initrd, "--fs", str(share).replace(",", ",,") + ",tag=data")
    assert said.count(hashlib.md5(data).hexdigest()) == 2
    assert "FAILED" not in said
    assert "203" in said
    assert (share / "a" / "b" / "moved").read_bytes() == data
    assert os.readlink(share / "a" / "link") == "b/moved"
    assert (share / "a" / "hard").stat().st_nlink == 2
    assert (share / "a" / "hard").stat().st_mode & 0o777 == 0o600
    assert (share / "log").read_text() == "appended\n" * 2
    assert not (share / "gone").exists()
    assert (share / "a" / "199").read_text() == "199\n"
