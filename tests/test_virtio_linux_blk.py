"""The block device under Linux's own driver, over both transports: a file system over two boots,
fio, queues, discard, an image on another, unbind and bind under load; what the guest wrote is
compared on the host.

VMM_BLK_MIB is how much is written to the file system: 200 take a minute more in the nested lane.
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

from tests.support import programs
from tests.test_virtio_vhost_user import qcow2
from vmm import Machine, MachineConfig
from vmm.block.storage_daemon import ExternalDisk
from vmm.testing.kernels import Kernel
from vmm.virtio.blk import Block

MIB = 1 << 20
SIZE = int(os.environ.get("VMM_BLK_MIB", "32"))
PATIENCE = 400 + 4 * SIZE
"""Seconds for each boot, on a busy emulated host."""

pytestmark = [
    pytest.mark.needs_linux_kvm,
    pytest.mark.timeout(2 * PATIENCE),
    pytest.mark.parametrize("transport", ["mmio", "pci"]),
]

__all__ = ["qcow2"]

ROUNDS = 50
CHUNKS = SIZE // 8

# Each writes blocks in random order, reads them again and compares checksums.
FIO = """
[global]
ioengine=libaio
direct=1
rw=randwrite
verify=crc32c
verify_fatal=1
iodepth=8
thread
stonewall
[one-queue-512]
filename=/dev/vda
bs=512
size=128k
[one-queue-4k]
filename=/dev/vda
bs=4k
size=1m
[one-queue-1m]
filename=/dev/vda
bs=1m
size=8m
[four-queues-4k]
filename=/dev/vdc
numjobs=4
cpus_allowed=0-3
cpus_allowed_policy=split
offset_increment=1m
bs=4k
size=512k
[four-queues-64k]
filename=/dev/vdc
numjobs=4
cpus_allowed=0-3
cpus_allowed_policy=split
offset_increment=4m
bs=64k
size=2m
"""
JOBS = 3 + 2 * 4
STAGE = """
fail() { echo "failed: $*"; poweroff -f; }
stage() { echo "stage: $(cut -d ' ' -f 1 /proc/uptime) $*"; }
"""
FIRST_BOOT = f"""{STAGE}
stage booted
echo "queues: $(ls /sys/block/vda/mq | wc -l) $(ls /sys/block/vdc/mq | wc -l)"
/host/fio --output-format=terse /jobs > /tmp/fio || fail "fio: $(tail -n 5 /tmp/fio)"
echo "fio: $(grep '^3;' /tmp/fio | cut -d ';' -f 5 | tr '\n' ' ')"  # each job's error
stage verified
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
stage copied
echo "backed: $(md5sum < /dev/vdd)"
dd if=/dev/vdb of=/dev/vdd bs=64k seek=3 count=5 conv=fsync 2>/dev/null || fail qcow2
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
echo "kept: $(md5sum < /dev/vdd)"
rm file0; sync; cd /; fstrim -v /mnt; umount /mnt || fail umount
echo "readonly: $(cat /sys/block/vdb/ro) $(dd if=/dev/zero of=/dev/vdb count=1 2>&1 | head -n 1)"
cd /sys/block; before=$(cat vdc/size vdd/size | tr '\n' ' ')
echo "grow now"
i=0; while [ $i -lt 200 ]; do
    set -- $before $(cat vdc/size vdd/size)
    [ $1 != $3 ] && [ $2 != $4 ] && break
    sleep 0.1; i=$((i+1))
done
echo "grown: $before$(cat vdc/size vdd/size | tr '\n' ' ')"
echo "new end: $(dd if=/dev/vdd bs=64k skip=60 count=4 2>/dev/null | tr -d '\\0' | wc -c)"
end={(SIZE + 4) * 16 - 1}
dd if=/dev/vdb of=/dev/vdc bs=64k count=1 seek=$end conv=fsync 2>/dev/null || fail the end
stage done
"""


def modules(transport: str, *more: str) -> list[str]:
    return [f"virtio_{transport}", "virtio_blk", *more]


def run(
    kernel: Kernel, initrd: Path, drives: list[str], grow: dict[str, int] | None = None,
    **options: object,
) -> str:  # fmt: skip
    """Boot; the console's output, once the guest has powered off. `grow`: the bytes that disks get
    when the guest says that it waits for them."""
    config = MachineConfig(
        str(kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=PATIENCE, drives=drives,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    with Machine(config) as machine:
        machine.start()
        if grow:
            machine.wait_for("grow now", PATIENCE)
            for name, size in grow.items():
                disk = machine.virtio_device(name)
                assert isinstance(disk, (Block, ExternalDisk))
                assert disk.resize(size) == size
        ended = machine.wait()
        text = machine.console.text()
    assert ended is not None and ended.kind == "poweroff", f"{ended}\n{text[-3000:]}"
    assert "failed:" not in text, text[-3000:]
    print(*re.findall("stage: .*", text), sep="\n")
    return text.replace("\r", "")


def fsck(disk: Path) -> None:
    check = [shutil.which("e2fsck", path=programs.PATH) or "e2fsck", "-f", "-n", str(disk)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_system_over_a_reboot(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], qcow2: Callable[..., str],
    tmp_path: Path, transport: str,
) -> None:  # fmt: skip
    disk, data, copy, base = (
        tmp_path / f"{name}.img" for name in ("disk", "data", "copy", "base")
    )  # fmt: skip
    content = random.Random(1).randbytes(SIZE * MIB)
    data.write_bytes(content)
    backed = random.Random(2).randbytes(2 * MIB)
    base.write_bytes(backed)
    for path, size in ((disk, (SIZE + 64) * MIB), (copy, SIZE * MIB)):
        path.touch()
        os.truncate(path, size)
    overlay = qcow2(len(backed), backing=base)
    layered = f"{overlay},format=qcow2,queues=2,backing={base}"
    drives = [str(disk), f"{data},readonly", f"{copy},queues=4", layered]
    how = {"kernel": cloud_kernel, "modules": modules(transport, "ext4")}
    tools = programs.with_libraries("e2fsprogs", "mke2fs") | programs.with_libraries("fio", "fio")
    initrd = make_initrd(FIRST_BOOT, files={**tools, "jobs": FIO}, **how)
    text = run(cloud_kernel, initrd, drives, transport=transport, cpus=4, memory=512 * MIB)
    assert "queues: 1 4\n" in text
    assert "fio: " + "0 " * JOBS + "\n" in text
    assert f"backed: {hashlib.md5(backed).hexdigest()}" in text
    assert copy.read_bytes() == content
    fsck(disk)
    blocks = disk.stat().st_blocks

    initrd = make_initrd(SECOND_BOOT, **how)
    grow = {"blk2": (SIZE + 4) * MIB, "blk3": 4 * MIB}
    text = run(cloud_kernel, initrd, drives, grow, transport=transport, cpus=2)
    sectors = [size // 512 for size in (SIZE * MIB, len(backed), *grow.values())]
    assert "grown: " + " ".join(map(str, sectors)) in text, text[-2000:]
    assert "new end: 0\n" in text
    assert copy.read_bytes() == content + bytes(4 * MIB - 65536) + content[:65536]
    for number in range(CHUNKS):
        chunk = content[number * 8 * MIB : (number + 1) * 8 * MIB]
        want = hashlib.md5(content[: 30 * 102400] if number == 1 else chunk)
        assert f"{want.hexdigest()}  file{number}\n" in text
    small = hashlib.md5(b"".join(b"file %d\n" % n for n in sorted(range(200), key=str)))
    assert f"small: {small.hexdigest()}" in text
    assert re.search(r"readonly: 1 dd: .*(not permitted|Read-only)", text), text[-2000:]
    fsck(disk)
    assert disk.stat().st_blocks <= blocks - 6 * MIB // 512  # what fstrim gave back
    assert data.read_bytes() == content
    kept = hashlib.md5(backed[: 3 << 16] + content[: 5 << 16] + backed[8 << 16 :])
    assert f"kept: {kept.hexdigest()}" in text
    assert base.read_bytes() == backed


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
        2>/tmp/said || echo "lost: $i: $(cat /tmp/said; dmesg | tail -n 5)"
    echo $device > unbind
    echo $device > bind
    [ $((i % 10)) = 0 ] && echo "stage: $(cut -d ' ' -f 1 /proc/uptime) round $i"
    i=$((i+1))
done
echo "rounds done"
"""


def test_unbind_and_bind_under_load(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path, transport: str
) -> None:
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, 32 * MIB)
    initrd = make_initrd(REBIND, kernel=cloud_kernel, modules=modules(transport))
    drives = [f"{disk},serial=VMM-1,queues=4"]
    text = run(cloud_kernel, initrd, drives, transport=transport, cpus=2)
    assert "serial: VMM-1\n" in text
    assert "queues: 2\n" in text  # one a processor
    assert "cache: write back write back\ncache: write through\n" in text
    assert "lost: " not in text, text
    assert "rounds done" in text
    with open(disk, "rb") as file:
        file.seek(16 * MIB)
        for number in range(ROUNDS):
            assert file.read(4096) == (b"round %d\n" % number * 4096)[:4096]
