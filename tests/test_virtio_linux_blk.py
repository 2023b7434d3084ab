"""The block device under Linux's own driver: a file system over two boots, queues, discard,
unbind and bind under load; what the guest wrote is compared on the host.

VMM_BLK_MIB is how much is written: 200 take a minute more in the nested lane.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm import Machine, MachineConfig
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(300)]

MIB = 1 << 20
SIZE = int(os.environ.get("VMM_BLK_MIB", "32"))
ROUNDS = 50
MODULES = ["virtio_mmio", "virtio_blk", "ext4"]
SBIN = "/sbin:/usr/sbin:/usr/bin"

CHUNKS = SIZE // 8
STAGE = """
fail() { echo "failed: $*"; poweroff -f; }
stage() { echo "stage: $(cut -d ' ' -f 1 /proc/uptime) $*"; }
"""
FIRST_BOOT = f"""{STAGE}
stage booted
/host/mke2fs -q -t ext4 /dev/vda || fail mke2fs
mount -t ext4 /dev/vda /mnt || fail mount
stage mounted
cd /mnt
i=0; while [ $i -lt {CHUNKS} ]; do
    dd if=/dev/vdb of=file$i bs=1M skip=$((i * 8)) count=8 2>/dev/null || fail dd
    i=$((i+1))
done
mkdir small; i=0; while [ $i -lt 200 ]; do echo "file $i" > small/$i; i=$((i+1)); done
rm file1; dd if=/dev/vdb of=file1 bs=100k count=30 2>/dev/null
stage written
dd if=/dev/vdb of=/dev/vdc bs=256k iflag=direct oflag=direct 2>/dev/null || fail direct
cd /; umount /mnt || fail umount
stage done
"""
SECOND_BOOT = f"""{STAGE}
stage booted
mount -t ext4 -o discard /dev/vda /mnt || fail mount
cd /mnt
i=0; while [ $i -lt {CHUNKS} ]; do md5sum file$i; i=$((i+1)); done
echo "small: $(cat small/* | md5sum)"
stage read
rm file0; sync; cd /; fstrim -v /mnt; umount /mnt || fail umount
echo "readonly: $(cat /sys/block/vdb/ro) $(dd if=/dev/zero of=/dev/vdb count=1 2>&1 | head -n 1)"
stage done
"""


def programs(*names: str) -> dict[str, Path]:
    """Host programs and the libraries they want, by their place in the guest."""
    files: dict[str, Path] = {}
    for name in names:
        path = shutil.which(name, path=SBIN)
        if path is None:
            pytest.skip(f"no {name} here: apt-get install e2fsprogs")
        files[f"host/{name}"] = Path(path)
        libraries = subprocess.run(["ldd", path], capture_output=True, text=True, check=True)
        for library in re.findall(r"(/\S+\.so\S*)", libraries.stdout):
            files[library.lstrip("/")] = Path(library)
    return files


def run(kernel: Kernel, initrd: Path, drives: list[str], **options: object) -> str:
    """Boot; the console's output, once the guest has powered off."""
    config = MachineConfig(
        str(kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=280, cpus=2,
        drives=drives, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    with Machine(config) as machine:
        machine.start()
        ended = machine.wait()
        text = machine.console.text()
    assert ended is not None and ended.kind == "poweroff", f"{ended}\n{text[-3000:]}"
    assert "failed:" not in text, text[-3000:]
    print(*re.findall("stage: .*", text), sep="\n")
    return text.replace("\r", "")


def test_a_file_system_over_a_reboot(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    disk, data, copy = (tmp_path / name for name in ("disk.img", "data.img", "copy.img"))
    content = random.Random(1).randbytes(SIZE * MIB)
    data.write_bytes(content)
    for path, size in ((disk, (SIZE + 64) * MIB), (copy, SIZE * MIB)):
        path.touch()
        os.truncate(path, size)
    tools = programs("mke2fs")
    drives = [str(disk), f"{data},readonly", str(copy)]
    boots = [
        make_initrd(script, kernel=cloud_kernel, modules=MODULES, files=tools)
        for script in (FIRST_BOOT, SECOND_BOOT)
    ]
    run(cloud_kernel, boots[0], drives)
    assert copy.read_bytes() == content
    check = [shutil.which("e2fsck", path=SBIN) or "e2fsck", "-f", "-n", str(disk)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    blocks = disk.stat().st_blocks

    text = run(cloud_kernel, boots[1], drives)
    for number in range(CHUNKS):
        chunk = content[number * 8 * MIB : (number + 1) * 8 * MIB]
        want = hashlib.md5(content[: 30 * 102400] if number == 1 else chunk)
        assert f"{want.hexdigest()}  file{number}\n" in text
    small = hashlib.md5(b"".join(b"file %d\n" % n for n in sorted(range(200), key=str)))
    assert f"small: {small.hexdigest()}" in text
    assert re.search(r"readonly: 1 dd: .*(not permitted|Read-only)", text), text[-2000:]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert disk.stat().st_blocks <= blocks - 6 * MIB // 512  # what fstrim gave back
    assert data.read_bytes() == content


# Each round writes a block of its own with fsync, under a load of reads and writes, and then takes
# the driver away and gives it back.
REBIND = f"""
echo "serial: $(cat /sys/block/vda/serial)"
echo "queues: $(ls /sys/block/vda/mq | wc -l)"
echo "cache: $(cat /sys/block/vda/queue/write_cache) $(cat /sys/block/vda/cache_type)"
echo "write through" > /sys/block/vda/cache_type
echo "cache: $(cat /sys/block/vda/queue/write_cache)"
echo "write back" > /sys/block/vda/cache_type
device=$(basename $(readlink /sys/block/vda/device))
node() {{  # not in /dev: whoever writes to /dev/vda while it is away makes a file of that name
    rm -f $1
    mknod $1 b $(cat /sys/bus/virtio/devices/$device/block/*/dev | tr : ' ') || sleep 0.1
}} 2>/dev/null
( while :; do node /tmp/r; dd if=/tmp/r of=/dev/null bs=64k count=64 2>/dev/null; done ) &
( while :; do
    node /tmp/w; [ -b /tmp/w ] && dd if=/dev/zero of=/tmp/w bs=64k seek=64 count=64 2>/dev/null
done ) &
cd /sys/bus/virtio/drivers/virtio_blk
i=0; while [ $i -lt {ROUNDS} ]; do
    until node /tmp/disk && [ -b /tmp/disk ]; do :; done
    yes "round $i" | head -c 4096 > /tmp/block
    taskset $((i % 2 + 1)) dd if=/tmp/block of=/tmp/disk bs=4096 seek=$((4096 + i)) conv=fsync \\
        2>/dev/null || echo "lost: $i"
    echo $device > unbind
    echo $device > bind
    [ $((i % 10)) = 0 ] && echo "stage: $(cut -d ' ' -f 1 /proc/uptime) round $i"
    i=$((i+1))
done
echo "rounds done"
"""


def test_unbind_and_bind_under_load(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, 32 * MIB)
    initrd = make_initrd(REBIND, kernel=cloud_kernel, modules=MODULES[:2])
    text = run(cloud_kernel, initrd, [f"{disk},serial=VMM-1,queues=4"])
    assert "serial: VMM-1\n" in text
    assert "queues: 2\n" in text  # one a processor
    assert "cache: write back write back\ncache: write through\n" in text
    assert "lost" not in text
    assert "rounds done" in text
    with open(disk, "rb") as file:
        file.seek(16 * MIB)
        for number in range(ROUNDS):
            assert file.read(4096) == (b"round %d\n" % number * 4096)[:4096]
