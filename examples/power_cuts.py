"""Power cuts under ext4: no file may be lost that the guest knows to be safe.

    python -m examples.power_cuts [CUTS]

One guest writes files, each with an fsync, and says on its console which are safe; others come and
go without. At random moments the disk is taken as it would be had the power gone then: with some of
what was not flushed, in whole sectors. e2fsck repairs it as a boot would, and must then find
nothing wrong; debugfs reads the files.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

from vmm import Machine, MachineConfig
from vmm.testing import initrds
from vmm.testing.kernels import debian_kernel

MODULES = ["virtio_mmio", "virtio_blk", "ext4"]
PATH = "/sbin:/usr/sbin:/usr/bin"
KEPT, CHECKED = 40, 15  # files that are there at once; those looked at, as the guest goes on
GUEST = f"""
mount -t ext4 /dev/vda /mnt
( mkdir /mnt/loose; i=0; while :; do
    i=$((i+1)); d=/mnt/loose/$((i % 5)); mkdir -p $d
    head -c $((i * 777 % 30000)) /dev/zero > $d/$i; mv $d/$i /mnt/loose/$((i % 7)).moved
    [ $((i % 3)) = 0 ] && rm -rf $d
done ) 2>/dev/null &
i=0; while :; do
    i=$((i+1))
    yes "file $i" | head -c $((2000 + i % 9 * 3000)) | dd of=/mnt/f$i conv=fsync 2>/dev/null &&
        echo "safe: $i"
    rm -f /mnt/f$((i - {KEPT}))
done
"""


def content(number: int) -> bytes:
    """What the guest writes into file `number`."""
    size, line = 2000 + number % 9 * 3000, b"file %d\n" % number
    return (line * (size // len(line) + 1))[:size]


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of e2fsprogs."""
    program = shutil.which(name, path=PATH) or name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def make_disk(path: str) -> None:
    """A file with an empty ext4 in it."""
    with open(path, "wb") as file:
        file.truncate(8 << 20)
    tool("mke2fs", "-q", "-t", "ext4", "-J", "size=1", path).check_returncode()


def safe(m: Machine) -> int:
    """The last file that the guest knows to be safe."""
    found = re.findall(r"\nsafe: (\d+)(?=\r?\n)", m.console.text())
    return int(found[-1]) if found else 0


def check(image: str, last: int) -> None:
    """AssertionError if the file system is not whole, or a file is not there, up to `last`."""
    repaired = tool("e2fsck", "-p", image)
    assert repaired.returncode in (0, 1), repaired.stdout + repaired.stderr
    whole = tool("e2fsck", "-f", "-n", image)
    assert whole.returncode == 0, repaired.stdout + whole.stdout + whole.stderr
    with tempfile.TemporaryDirectory() as files:
        tool("debugfs", "-R", f"rdump / {files}", image)
        for number in range(max(1, last - CHECKED), last + 1):
            path = os.path.join(files, f"f{number}")
            assert os.path.exists(path), f"f{number} of {last} is lost: {sorted(os.listdir(files))}"
            with open(path, "rb") as file:
                assert file.read() == content(number), f"f{number} of {last} is damaged"


def cut(m: Machine, cuts: int, directory: str, seed: int = 0) -> list[tuple[str, int]]:
    """Take so many cuts of drive 0, and then the plug: each image, and the last file safe in it."""
    chance, disk = random.Random(seed), m.faults.disk(0)
    images = []
    seen = 0
    for number in range(cuts):
        while safe(m) == seen and m.state == "running":
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.2))
        while not disk.unflushed and m.state == "running":
            time.sleep(0.001)
        seen = safe(m)
        images.append((os.path.join(directory, f"cut{number}.img"), seen))
        keep = (0.0, 0.2, 0.5, 0.9)[number % 4]
        print(f"{seen} files:", disk.power_cut_image(images[-1][0], keep, torn=0.5))
    images.append((m.config.drives[0].path, safe(m)))
    print(f"{images[-1][1]} files:", m.faults.power_cut("some", torn=0.5)[0])
    return images


def main(cuts: int) -> None:
    """Boot, cut, and look at what is left."""
    kernel = debian_kernel("cloud-amd64")
    with tempfile.TemporaryDirectory() as directory:
        disk, initrd = os.path.join(directory, "disk.img"), os.path.join(directory, "initrd.img")
        make_disk(disk)
        initrds.build(GUEST, kernel=kernel, modules=MODULES).write(initrd)
        with Machine(MachineConfig(str(kernel.vmlinuz), initrds=[initrd], drives=[disk])) as m:
            m.faults.volatile()
            m.start()
            images = cut(m, cuts, directory)
        for image, last in images:
            check(image, last)
        print(f"{len(images)} cuts, and no file is lost")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
