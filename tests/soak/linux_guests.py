"""The two guests of the soak under Linux, and what runs in them.

Each path that data takes has a file below /figures in the guest that verifies it: a line of
numbers, the first of which is the bytes that were read and found right. fio's output is /fio-PATH.
A program that ends or that reads wrong bytes adds a line to /wrong, which begins with the path's
name.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.support import images, programs
from vmm import Machine, MachineConfig
from vmm.testing import initrds
from vmm.testing.kernels import Kernel

MIB = 1 << 20
DISK = 8 * MIB
STREAM = 2
"""MiB each way of a connection."""
CID = 9
PORT = 5000
CUT_AFTER = 5
"""Seconds without a byte after which a connection to a guest that went back is given up."""
PATIENCE = 300
"""Seconds for a connection that nothing interrupts."""
FILES = 40

COMMON = """
mkdir -p /figures
ifconfig lo 127.0.0.1
mkdir /tools
mount -t ext4 -o ro /dev/vd$(cat /tools-disk) /tools
mount --bind /dev /tools/dev
mount --bind /proc /tools/proc
mount --bind /sys /tools/sys
wrong() { echo "$@" >> /wrong; }
tell() { echo $2 > /figures/.$1; mv /figures/.$1 /figures/$1; }
# Verifies a disk without an end: fio reads its libraries for half a minute here, so it starts once.
verify_disk() {
    chroot /tools /host/fio --filename=$2 --output-format=terse --terse-version=3 --eta=never \\
        --status-interval=2 /job > /fio-$1 2>&1
    wrong "$1: fio has ended"
}
"""
JOB = """
[global]
ioengine=libaio
iodepth=8
direct=1
size=512k
loops=1000000
verify=crc32c
verify_fatal=1
verify_state_save=0
randrepeat=0
thread=1
group_reporting=1
thinktime=50ms
thinktime_blocks=16
[scattered]
rw=randwrite
bs=16k
[large]
rw=write
bs=64k
offset=512k
[small]
rw=randwrite
bs=4k
offset=1m
"""
"""What fio does with each disk: three threads, each with a part of it."""
FIRST = f"""{COMMON}
ifconfig eth0 10.9.0.1 netmask 255.255.255.0 up
verify_disk raw /dev/vda &
verify_disk throttled /dev/vdb &
/bin/soak-stream /figures/network {STREAM} {CUT_AFTER} connect tcp 10.9.0.2 {PORT} &
wait
"""
SECOND = f"""{COMMON}
ifconfig eth0 10.9.0.2 netmask 255.255.255.0 up
verify_disk qcow2 /dev/vda &
/bin/soak-stream /figures/network {STREAM} {CUT_AFTER} listen tcp 10.9.0.2 {PORT} &
/bin/soak-stream /figures/vsock {STREAM} {PATIENCE} connect vsock 2 {PORT} &
mount -t virtiofs soak /mnt || wrong "tree: cannot be mounted"
# Checksums of all files, read anew.
sums() {{ echo 3 > /proc/sys/vm/drop_caches; (cd $1 && find . -type f | sort | xargs md5sum); }}
total=0
while true; do
    rm -rf /tmp/copy /mnt/back
    cp -r /mnt/tree /tmp/copy && cp -r /tmp/copy /mnt/back || wrong "tree: cp failed"
    for each in /tmp/copy /mnt/back; do
        sums $each > /tmp/sums
        cmp /tmp/sums /sums ||
            wrong "tree: $each: $(diff /tmp/sums /sums | grep -c '^+[^+]') files differ"
    done
    total=$((total + 2 * $(cat /size)))
    tell tree $total
    sleep 2
done
"""


class Tree:
    """A directory of the host with files of all sizes."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.files: dict[str, bytes] = {}
        for number in range(FILES):
            name = f"d{number % 5}/file-{number}"
            self.files[name] = rng.randbytes(rng.randrange(1, 60000))
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[name])

    def size(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files.values()))

    def sums(self) -> str:
        """What md5sum says of the files, in the order of `sort`."""
        lines = [
            f"{hashlib.md5(data).hexdigest()}  ./{name}\n" for name, data in self.files.items()
        ]
        return "".join(sorted(lines, key=lambda line: line.split("  ")[1]))


def tools(path: Path) -> Path:
    """A file system at `path` with fio and its libraries: they are too big for a guest's memory."""
    root = path.with_suffix(".root")
    for name in ("dev", "proc", "sys"):
        (root / name).mkdir(parents=True)
    for name, source in programs.with_libraries("fio", "fio").items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / name)
    (root / "job").write_text(JOB)
    mke2fs = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0"]
    subprocess.run([*mke2fs, "-d", root, path, "120M"], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(root)
    return path


class Guests:
    """Makes both machines, with what they need below the directory `scratch`."""

    def __init__(self, kernel: Kernel, scratch: Path, rng: random.Random) -> None:
        self.kernel = kernel
        self.scratch = scratch
        self.stream = programs.compiled("soak_stream", scratch)
        self.tools = tools(scratch / "tools.img")
        self.image = images.make(scratch / "disk.qcow2", "qcow2", DISK)
        self.shared = scratch / "shared"
        self.tree = Tree(self.shared / "tree", rng)
        self.vsock = scratch / "vsock"

    def first(self) -> Machine:
        """The one that goes back: its disks are overlays, which go back with it."""
        drives = [f"{self._disk('raw')},snapshot", f"{self._disk('throttled')},snapshot,bps=2M"]
        return self._machine("first", FIRST, ["virtio_balloon"], drives=drives, balloon=0, rng=True)

    def second(self) -> Machine:
        """The one with devices whose other ends cannot go back."""
        return self._machine(
            "second",
            SECOND,
            ["virtiofs", "vmw_vsock_virtio_transport"],
            drives=[f"{self.image},format=qcow2"],
            shares=[f"{self.shared},tag=soak"],
            vsock=f"cid={CID},path={self.vsock}",
        )

    def _machine(
        self, name: str, script: str, modules: Iterable[str], drives: list[str], **more: object
    ) -> Machine:
        files: dict[str, bytes | str | os.PathLike[str]] = {
            "tools-disk": "abc"[len(drives)],
            "bin/soak-stream": self.stream,
            "sums": self.tree.sums(),
            "size": str(self.tree.size()),
        }
        drivers = ["virtio_mmio", "virtio_blk", "virtio_net", "ext4", *modules]
        path = self.scratch / f"{name}.initrd"
        initrds.build(script, kernel=self.kernel, modules=drivers, files=files).write(path)
        options = {"append": "quiet", "agent": True, "memory": 192 * MIB, "nets": ["lan=soak"]}
        drives = [*drives, f"{self.tools},readonly"]
        return Machine(
            MachineConfig(self.kernel.vmlinuz, initrds=[path], drives=drives, **options, **more)  # type: ignore[arg-type]
        )

    def _disk(self, name: str) -> Path:
        path = self.scratch / f"{name}.img"
        path.touch()
        os.truncate(path, DISK)
        return path
