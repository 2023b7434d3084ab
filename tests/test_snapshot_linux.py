"""Snapshots of Linux guests: restored with disk and network I/O under way, again and again; clocks,
the generation ID, and a chain of ten.

fio verifies what it wrote, iperf3 fails where the network does; both go on in loops in the guest,
and each round's outcome is counted. VMM_SNAPSHOT_CYCLES is the length of the chain.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import netns
from vmm import Machine, MachineConfig
from vmm.snapshot import manifest, plain
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(900)]

MIB = 1 << 20
CYCLES = int(os.environ.get("VMM_SNAPSHOT_CYCLES", "10"))
OUT, GATEWAY = "10.7.0.2", "10.7.0.1"
SBIN = "/sbin:/usr/sbin:/usr/bin"
PATIENCE = 240.0
"""Seconds for what takes few; a busy emulated host needs more."""

DHCP = """#!/bin/sh
[ "$1" = bound ] || exit 0
ifconfig $interface $ip netmask $subnet
route add default gw $router
"""
FIO = (
    "fio --name=v --filename=/dev/vdb --rw=randwrite --bs=16k --size=2m --ioengine=libaio "
    "--iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 --randrepeat=0 --output=/dev/null"
)
IPERF = f"iperf3 -c {GATEWAY} -t 1 -b 2M --connect-timeout 5000"
# Each loop counts its rounds in a file a round, so that a count never is half written.
SCRIPT = f"""
mkdir -p /tools /count/fio /count/fio-bad /count/iperf /count/iperf-bad
mount -t ext4 -o ro /dev/vda /tools
mount --bind /dev /tools/dev
mount -t proc proc /tools/proc
ifconfig lo 127.0.0.1
udhcpc -q -f -n -i eth0 -s /bin/dhcp
again() {{ # NAME COMMAND...
    name=$1; shift; i=0
    while [ ! -e /stop ]; do
        i=$((i+1))
        if chroot /tools "$@" >/tmp/$name 2>&1; then touch /count/$name/$i
        else touch /count/$name-bad/$i; fi
    done
    touch /stopped-$name
}}
again fio {FIO} &
again iperf {IPERF} &
wait
while true; do sleep 1; done
"""


@pytest.fixture
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
    tree = path.with_suffix(".tree")
    for directory in ("dev", "proc", "tmp", "bin"):
        (tree / directory).mkdir(parents=True)
    for name in ("fio", "iperf3"):
        program = shutil.which(name)
        if program is None:
            pytest.skip(f"no {name} here: apt-get install {name}")
        shutil.copy(program, tree / "bin" / name)
        libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
        for library in re.findall(r"(/\S+\.so\S*)", libraries.stdout):
            target = tree / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(library, target)
    mke2fs = shutil.which("mke2fs", path=SBIN) or "mke2fs"
    with open(path, "wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(
        [mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(path)], check=True
    )
    shutil.rmtree(tree)
    return path


class Guest:
    """What the tests ask a machine's guest."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def shell(self, line: str) -> str:
        done = self.machine.run(["sh", "-c", line], text=True, timeout=PATIENCE)
        return str(done.stdout).strip()

    def rounds(self, name: str) -> int:
        """The number of the loop's last good round."""
        return int(self.shell(f"ls /count/{name} | sort -n | tail -n 1") or 0)

    def goes_on(self, name: str) -> None:
        """A round that began after now ends well."""
        begun = int(self.shell(f"ls /count/{name} /count/{name}-bad | grep -c '[0-9]'") or 0)
        deadline = time.monotonic() + PATIENCE
        while self.rounds(name) < begun + 2:
            assert time.monotonic() < deadline, self.shell(f"cat /tmp/{name}; dmesg | tail -n 30")

    def check(self, iperf: bool = True) -> None:
        """Both loops go on, no block was read back wrong, and the kernel has no complaint."""
        self.goes_on("fio")
        assert self.shell("ls /count/fio-bad") == "", self.shell("cat /tmp/fio")
        if iperf:
            self.goes_on("iperf")
        complaints = self.shell("dmesg | grep -iE 'stall|lockup|BUG|hung task|I/O error' | tail")
        assert complaints == ""


def an_hour_ago(path: Path) -> None:
    """Have a snapshot be an hour older than it is."""
    state = plain.loads((path / "state.json").read_bytes())
    state["vm"]["realtime"] -= 3600 * 10**9
    (path / "state.json").write_bytes(plain.dumps(state))
    told = json.loads((path / manifest.NAME).read_text())
    told["files"].update(manifest.seal(str(path), ["state.json"]))
    told[manifest.CHECKSUM] = manifest.checksum(told)
    (path / manifest.NAME).write_text(json.dumps(told))


def stage(text: str, begin: list[float]) -> None:
    now = time.monotonic()
    print(f"{text}: {now - begin[0]:.1f} s")
    begin[0] = now


def test_a_busy_guest_again_and_again(
    full_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path, network: None
) -> None:
    clock = [time.monotonic()]
    tools = tools_image(tmp_path / "tools.img")
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, 16 * MIB)
    initrd = make_initrd(
        SCRIPT,
        kernel=full_kernel,
        modules=["virtio_mmio", "virtio_blk", "virtio_net", "ext4", "crc32c_generic"],
        files={"bin/dhcp": DHCP},
    )
    config = MachineConfig(
        str(full_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", cpus=2, agent=True,
        memory=384 * MIB, drives=[f"{tools},readonly", str(disk)], nets=["user"],
        modules=str(full_kernel.modules),
    )  # fmt: skip
    snap = tmp_path / "busy"
    stage("prepared", clock)
    with Machine(config) as m:
        m.start()
        guest = Guest(m)
        guest.check()
        stage("booted", clock)
        m.snapshot(str(snap))
        stage("snapshot", clock)
        guest.check()
        stage("the machine itself goes on", clock)
        assert abs(int(guest.shell("date +%s")) - time.time()) < 60
        first_id = m.memory.read(0xFF000, 16)
        mac = bytes(m.virtio_device("net0").config[:6])
    assert not (snap / "disk0").exists() and (snap / "disk1").exists()

    for number in range(3):
        capture = tmp_path / f"pcap{number}"
        if number == 2:
            an_hour_ago(snap)
        with Machine.restore(str(snap), verify=number == 1, nets=[f"user,pcap={capture}"]) as m:
            assert m.memory.read(0xFF000, 16) != first_id
            m.start()
            guest = Guest(m)
            offset = int(guest.shell("date +%s")) - time.time()
            assert abs(offset - (3600 if number == 2 else 0)) < 60
            rtc = int(guest.shell("cat /sys/class/rtc/rtc0/since_epoch"))
            assert abs(rtc - time.time()) < 60
            assert guest.shell("dmesg | grep -c 'reseeded due to virtual machine fork'") == "1"
            guest.check()
        frames = capture.read_bytes()
        assert b"\xff" * 6 + mac + b"\x08\x06" in frames  # it has said where it is
        stage(f"restored {number + 1}", clock)

    path = snap
    for number in range(CYCLES):
        following = tmp_path / f"cycle{number}"
        with Machine.restore(str(path)) as m:
            m.start()
            guest = Guest(m)
            said = guest.shell(f"echo {number} >> /cycles; cat /cycles").split()
            assert said == [str(each) for each in range(number + 1)]
            m.snapshot(str(following), base=str(path))
        path = following
        stage(f"cycle {number + 1}", clock)
    with Machine.restore(str(path), verify=True) as m:
        m.start()
        guest = Guest(m)
        guest.check()
        forks = int(guest.shell("dmesg | grep -c 'reseeded due to virtual machine fork'"))
        assert forks == CYCLES + 1
    stage("the last of the chain", clock)
