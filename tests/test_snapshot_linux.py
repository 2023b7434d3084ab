"""Snapshots of Linux guests: restored with disk and network I/O under way, again and again; clocks,
the generation ID, and a chain of ten.

fio writes and verifies without end, and would end at the first block that is not what it was;
iperf3 runs in a loop whose rounds are counted. VMM_SNAPSHOT_KIB is the size of fio's file, all of
which is written and verified at each look; VMM_SNAPSHOT_CYCLES the length of the chain.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.snapshots import age
from vmm import Machine, MachineConfig, layout
from vmm.testing import initrds
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(900)]

MIB = 1 << 20
KIB = int(os.environ.get("VMM_SNAPSHOT_KIB", "512"))
CPUS = 2
CYCLES = int(os.environ.get("VMM_SNAPSHOT_CYCLES", "10"))
LONG = 1200
"""Seconds; of 2,199 and more Linux 6.1 has a processor believe it was stuck (docs/snapshots.md)."""
OUT, GATEWAY = "10.7.0.2", "10.7.0.1"
SBIN = "/sbin:/usr/sbin:/usr/bin"
PATIENCE = 400.0
"""Seconds for what takes few; a busy emulated host needs more."""

DHCP = """#!/bin/sh
[ "$1" = bound ] || exit 0
ifconfig $interface $ip netmask $subnet
route add default gw $router
"""
FIO = (
    f"fio --name=v --filename=/dev/vdb --rw=randwrite --bs=16k --size={KIB}k --loops=1000000 "
    "--ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 --randrepeat=0 "
    "--verify_state_save=0"
)
IPERF = f"iperf3 -c {GATEWAY} -t 1 -b 2M --connect-timeout 5000"
# A round is a file, so that a count never is half written.
SCRIPT = f"""
mkdir -p /tools /good /bad
mount -t ext4 -o ro /dev/vda /tools
mount --bind /dev /tools/dev
mount -t proc proc /tools/proc
mount -t tmpfs tmp /tools/tmp
ifconfig lo 127.0.0.1
ifconfig eth0 up
udhcpc -q -f -n -i eth0 -s /bin/dhcp
(chroot /tools {FIO} > /fio 2>&1; echo "ended: $?" >> /fio) &
i=0
while true; do
    i=$((i+1))
    if chroot /tools {IPERF} > /iperf 2>&1
    then touch /good/$i; else touch /bad/$i; fi
done
"""


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """A host with a route for passt, and a server for iperf3; this thread is in it."""
    server = shutil.which("iperf3")
    if server is None:
        pytest.skip("no iperf3 here: apt-get install iperf3")
    with netns.network_namespace():
        netns.ip("tuntap add out mode tap")
        netns.ip(f"addr add {OUT}/24 dev out")
        netns.ip("link set out up")
        netns.ip(f"route add default via {GATEWAY} dev out")
        with subprocess.Popen([server, "-s"], stdout=subprocess.DEVNULL) as process:
            yield
            process.terminate()


def tools_image(path: Path) -> Path:
    """A file system with fio, iperf3 and their libraries."""
    files = {}
    for name in ("fio", "iperf3"):
        program = shutil.which(name)
        if program is None:
            pytest.skip(f"no {name} here: apt-get install {name}")
        files[f"/bin/{name}"] = program
        libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
        files.update((each, each) for each in re.findall(r"(/\S+\.so\S*)", libraries.stdout))
    directories = {"/dev", "/proc", "/tmp"}
    for target in files:
        directories.update(str(each) for each in Path(target).parents if each != Path("/"))
    commands = [f"mkdir {each}" for each in sorted(directories, key=len)]
    commands += [f"write {os.path.realpath(source)} {target}" for target, source in files.items()]
    commands += [f"set_inode_field {target} mode 0100755" for target in files]
    mke2fs, debugfs = (shutil.which(name, path=SBIN) or name for name in ("mke2fs", "debugfs"))
    options = ["-b", "4096", "-O", "^has_journal", "-N", "256", "-E", "root_owner=0:0"]
    path.touch()
    os.truncate(path, 128 * MIB)
    subprocess.run([mke2fs, "-q", "-t", "ext4", *options, str(path)], check=True)
    script = path.with_suffix(".debugfs")
    script.write_text("\n".join(commands) + "\n")
    done = subprocess.run(
        [debugfs, "-w", "-f", str(script), str(path)], capture_output=True, text=True, check=True
    )
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1")]
    assert complaints == []
    return path


class Guest:
    """What the tests ask a machine's guest."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def shell(self, line: str) -> str:
        try:
            done = self.machine.run(["sh", "-c", line], text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            processes = self.machine.run(["ps"], text=True, timeout=PATIENCE).stdout
            raise AssertionError(
                f"{line}\n{processes}\n{self.machine.console.text()[-2000:]}"
            ) from None
        return str(done.stdout).strip()

    def ready(self) -> None:
        """Both have begun; the agent answers before the disks are there."""
        self.shell("while [ ! -e /good/1 ] && [ ! -e /bad/5 ]; do sleep 0.2; done")
        assert self.shell("ls /good") != "", self.shell("cat /iperf /fio; ifconfig; dmesg | tail")

    def moved(self) -> tuple[int, int]:
        """Sectors read and written on fio's disk."""
        numbers = self.shell("cat /sys/block/vdb/stat").split()
        return int(numbers[2]), int(numbers[6])

    def date(self) -> float:
        """How many seconds its clock is ahead of ours; 0 where that cannot be told apart."""
        before = time.time()
        now = int(self.shell("date +%s"))
        after = time.time()
        return max(now - after, 0.0) + min(now - before + 1, 0.0)

    def forked(self, times: int) -> None:
        """It has been told of a new generation, and fed its random numbers, so many times."""
        count = "$(dmesg | grep -c 'reseeded due to virtual machine fork')"
        self.shell(f"while [ {count} -lt {times} ]; do sleep 0.1; done")
        assert self.shell(f"echo {count}") == str(times)

    def fio_goes_on(self) -> None:
        """It writes and verifies all of its file at least once more (a sector is half a KiB)."""
        read, written = self.moved()
        deadline = time.monotonic() + PATIENCE
        while True:
            now = self.moved()
            if now[0] > read + 4 * KIB and now[1] > written + 4 * KIB:
                break
            assert time.monotonic() < deadline, self.shell("tail /fio; dmesg | tail -n 30")
            time.sleep(0.3)
        assert self.shell("grep -aE 'ended|verify:|err=' /fio") == ""

    def iperf_goes_on(self) -> None:
        """A round that began after now ends well."""
        begun = int(self.shell("ls /good /bad | grep -c '[0-9]'") or 0)
        deadline = time.monotonic() + PATIENCE
        while int(self.shell("ls /good | sort -n | tail -n 1") or 0) < begun + 2:
            assert time.monotonic() < deadline, self.shell("cat /iperf; dmesg | tail -n 30")
            time.sleep(0.3)

    def check(self, restored: bool = True) -> None:
        """Both go on, and the kernel has no complaint."""
        if restored:  # the peer of its connection is gone, for which it might wait for ever
            self.shell("killall -KILL iperf3 || true")
        self.fio_goes_on()
        self.iperf_goes_on()
        complaints = self.shell("dmesg | grep -E 'I/O error|Oops|stuck for [0-9]{4}' | tail")
        assert complaints == ""


def stage(text: str, begin: list[float]) -> None:
    now = time.monotonic()
    print(f"{text}: {now - begin[0]:.1f} s")
    begin[0] = now


@dataclass
class Busy:
    """A snapshot of a guest with both under way, and what the machine was then."""

    path: Path
    generation: bytes
    mac: bytes


@pytest.fixture(scope="module")
def busy(full_kernel: Kernel, tmp_path_factory: pytest.TempPathFactory, network: None) -> Busy:
    clock = [time.monotonic()]
    directory = tmp_path_factory.mktemp("busy")
    tools = tools_image(directory / "tools.img")
    disk = directory / "disk.img"
    disk.touch()
    os.truncate(disk, 16 * MIB)
    initrds.build(
        SCRIPT,
        kernel=full_kernel,
        modules=["virtio_mmio", "virtio_blk", "virtio_net", "ext4", "crc32c_generic"],
        files={"bin/dhcp": DHCP},
    ).write(directory / "initrd")
    unpacked = full_kernel.directory / "vmlinux"  # spares an emulated host the XZ
    config = MachineConfig(
        str(unpacked if unpacked.exists() else full_kernel.vmlinuz),
        initrds=[str(directory / "initrd")], append="quiet", cpus=CPUS, agent=True,
        memory=384 * MIB, drives=[f"{tools},readonly", str(disk)], nets=["user,host-loopback=on"],
        modules=str(full_kernel.modules),
    )  # fmt: skip
    snap = directory / "snapshot"
    stage("prepared", clock)
    with Machine(config) as m:
        m.start()
        guest = Guest(m)
        guest.ready()
        stage("booted", clock)
        guest.check(restored=False)
        stage("busy", clock)
        m.snapshot(str(snap))
        stage("snapshot", clock)
        guest.check(restored=False)
        stage("the machine itself goes on", clock)
        assert abs(guest.date()) < 60
        made = Busy(
            snap, m.memory.read(layout.VMGENID, 16), bytes(m.virtio_device("net0").config[:6])
        )
    assert not (snap / "disk0").exists() and (snap / "disk1").exists()
    return made


def test_restored_three_times(busy: Busy, tmp_path: Path) -> None:
    clock = [time.monotonic()]
    for number in range(3):
        capture = tmp_path / f"pcap{number}"
        if number == 2:
            age(busy.path, LONG)
        with Machine.restore(
            str(busy.path), verify=number == 1, nets=[f"user,host-loopback=on,pcap={capture}"]
        ) as m:
            assert m.memory.read(layout.VMGENID, 16) != busy.generation
            m.start()
            guest = Guest(m)
            assert abs(guest.date() - (LONG if number == 2 else 0)) < 60
            began = time.time()
            rtc = int(guest.shell("cat /sys/class/rtc/rtc0/since_epoch"))
            assert began - 60 < rtc < time.time() + 60
            guest.forked(1)
            guest.check()
        frames = capture.read_bytes()
        assert b"\xff" * 6 + busy.mac + b"\x08\x06" in frames  # it has said where it is
        stage(f"restored {number + 1}", clock)
    age(busy.path, -LONG)


def test_a_chain(busy: Busy, tmp_path: Path) -> None:
    """Each is made by a machine restored from the one before."""
    clock = [time.monotonic()]
    path = busy.path
    for number in range(CYCLES):
        following = tmp_path / f"cycle{number}"
        with Machine.restore(str(path)) as m:
            m.start()
            guest = Guest(m)
            said = guest.shell(f"echo {number} >> /cycles; cat /cycles").split()
            assert said == [str(each) for each in range(number + 1)]
            guest.forked(number + 1)
            m.snapshot(str(following), base=str(path))
        path = following
        stage(f"cycle {number + 1}", clock)
    with Machine.restore(str(path), verify=True) as m:
        m.start()
        guest = Guest(m)
        guest.check()
        guest.forked(CYCLES + 1)
    stage("the last of the chain", clock)
