"""As tests/test_kill.py, with Linux as the guest, over PCI: the monitor is killed while files and
blocks are written and flushed; each is there afterwards.

VMM_LINUX_KILLS is how often; VMM_KILL_SEED where the moments come from.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import programs
from tests.test_kill import BLOCK, BLOCKS, SEED, Host, finish, kill, namespace
from tests.test_virtio_vhost_user import qcow2
from vmm.testing.kernels import Kernel

KILLS = int(os.environ.get("VMM_LINUX_KILLS", "2"))
pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(300 + 100 * KILLS)]

__all__ = ["namespace", "qcow2"]

DRIVERS = [
    "virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_console", "virtio_balloon",
    "vmw_vsock_virtio_transport", "virtiofs",
]  # fmt: skip

# Blocks as tests/support/kill_guest.c has them, of lines of their number.
SCRIPT = f"""
option() {{ sed -n "s/.*\\b$1=\\([0-9]*\\).*/\\1/p" /proc/cmdline; }}
from=$(option from) until=$(option until)
mount -t virtiofs share /mnt || echo "failed: mount"
ifconfig eth0 up; ifconfig eth1 up
( while :; do head -c 100000 /dev/hwrng; done | vsock-pipe connect 2 1024 ) > /dev/null 2>&1 &
echo started
number=$((from > {BLOCKS - 2} ? from - {BLOCKS - 2} : 1))
while [ $number -le $from ]; do
    for disk in vda vdb; do
        found=$(dd if=/dev/$disk bs={BLOCK} count=1 skip=$((number % {BLOCKS})) 2>/dev/null |
            head -n 1)
        [ "$found" -ge $number ] || echo "lost: $disk $number: $found"
    done
    number=$((number + 1))
done
echo verified
number=$((from + 1)); while :; do
    yes $number | head -c {BLOCK} > /tmp/block
    for disk in vda vdb; do
        dd if=/tmp/block of=/dev/$disk bs={BLOCK} seek=$((number % {BLOCKS})) conv=fsync \\
            2>/dev/null || echo "failed: $disk $number"
    done
    dd if=/tmp/block of=/mnt/$number conv=fsync 2>/dev/null || echo "failed: file $number"
    echo "ack $number"
    [ $number = "$until" ] && break
    number=$((number + 1))
done
"""


class LinuxHost(Host):
    def numbers(self, block: bytes) -> set[int]:
        line = block.split(b"\n")[0] + b"\n"
        assert block == (line * BLOCK)[:BLOCK]
        return {int(line)}

    def look(self) -> None:
        super().look()
        for number in range(1, self.acknowledged + 1):
            data = (self.share / str(number)).read_bytes()
            assert data == (b"%d\n" % number * BLOCK)[:BLOCK], number


def test_a_monitor_killed_while_linux_writes(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], namespace: None,
    qcow2: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    if shutil.which("passt") is None:
        pytest.skip("no passt here")
    initrd = make_initrd(
        SCRIPT,
        kernel=cloud_kernel,
        modules=DRIVERS,
        files={"bin/vsock-pipe": programs.compiled("vsock_pipe", tmp_path)},
    )
    machine = [
        str(cloud_kernel.vmlinuz), "--initrd", str(initrd), "--cpus", "2", "--transport", "pci",
        "--timeout", "300",
    ]  # fmt: skip
    host = LinuxHost(tmp_path, machine, qcow2)
    chance = random.Random(SEED)
    for number in range(KILLS):
        before = host.acknowledged
        kill(host, acks=chance.randrange(2, 30))
        assert host.acknowledged > before, number
    finish(host, 5)
    host.check_nothing_is_left()
