"""Faults as Linux sees them, in one boot: errors, lost packets, a clock that jumps, and the power
cuts of examples/power_cuts.py, in which no file may be lost that the guest knows to be safe."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples import power_cuts
from tests.support import netns
from vmm import Machine, MachineConfig
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(900)]

CUTS = 20
HOST, GUEST = "10.9.0.1", "10.9.0.2"
PINGS = 8

SCRIPT = f"""
ask() {{ echo "ask: $1"; read line; }}
errors() {{ grep -c 'Input/output error'; }}
get() {{ dd if=/dev/vdb of=/dev/null bs=4k count=1 skip=$1 iflag=direct 2>&1 | errors; }}
put() {{ dd if=/dev/zero of=/dev/vdb bs=4k count=1 seek=$1 oflag=direct 2>&1 | errors; }}
echo; ifconfig eth0 {GUEST} netmask 255.255.255.0
ask errors
echo "reads: $(get 1) $(get 2) $(get 3) writes: $(put 1) $(put 2) $(put 3)"
ask ping
ping -q -c {PINGS} -i 0.2 -W 5 {HOST} | grep received
# Of so long a second the watchdogs would tell, in the middle of other lines.
dmesg -n 1; echo 0 > /proc/sys/kernel/watchdog
echo 0 > /sys/module/workqueue/parameters/watchdog_thresh
clock() {{ echo "clock: $(cut -d . -f 1 /proc/uptime) $(date +%s)"; }}
echo "source: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
clock
ask clock
clock
{power_cuts.GUEST}
"""


def test_linux_under_faults(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    if shutil.which("e2fsck", path=power_cuts.PATH) is None:
        pytest.skip("no e2fsck here: apt-get install e2fsprogs")
    disk, other = str(tmp_path / "ext4.img"), tmp_path / "other.img"
    power_cuts.make_disk(disk)
    other.touch()
    os.truncate(other, 1 << 20)
    initrd = make_initrd(SCRIPT, kernel=cloud_kernel, modules=[*power_cuts.MODULES, "virtio_net"])
    with netns.network_namespace():
        config = MachineConfig(
            str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=880, cpus=2,
            drives=[disk, str(other)], nets=[f"tap,address={HOST}/24"], fault_seed=12,
        )  # fmt: skip
        with Machine(config) as m:
            try:
                m.faults.volatile()
                m.start()
                errors(m)
                pings(m)
                clocks(m)
                images = power_cuts.cut(m, CUTS, str(tmp_path))
                cuts = [event.details for event in m.faults.log if event.kind == "power cut"]
            except BaseException:
                print(m.console.text()[-3000:])
                print(*m.faults.log[-20:], sep="\n")
                raise
    assert len(images) == CUTS + 1
    assert sum(each["lost"] for each in cuts) > 0  # type: ignore[misc]
    with ThreadPoolExecutor(2) as pool:  # two programs at a time
        list(pool.map(lambda each: power_cuts.check(*each), images))


def errors(m: Machine) -> None:
    m.wait_for("\nask: errors", timeout=300)
    with (
        m.faults.disk(1).fail(on="read", sectors=range(16, 24)),
        m.faults.disk(1).fail(on="write", nth=2),
    ):
        m.send("\n")
        m.wait_for("reads: 0 1 0 writes: 0 1 0", timeout=120)
        m.wait_for("\nask: ping", timeout=120)


def pings(m: Machine) -> None:
    def echo_request(frame: bytes) -> bool:
        return frame[12:14] == b"\x08\x00" and frame[23] == 1 and frame[34] == 8

    with m.faults.net(0).loss(0.5, direction="tx", match=echo_request) as loss:
        m.send("\n")
        line = m.wait_for(re.compile(r"\d+ packets transmitted, \d+ packets received"), timeout=120)
    assert loss.count == 3  # the seed says so
    assert f"{PINGS} packets transmitted, {PINGS - 3} packets received" in line


def clocks(m: Machine) -> None:
    m.wait_for("source: kvm-clock", timeout=120)
    m.wait_for("\nask: clock", timeout=120)
    m.faults.clock_jump(5000)
    m.send("\n")
    m.wait_for("\nsafe: ", timeout=120)
    before, after = re.findall(r"clock: (\d+) (\d+)\r?\n", m.console.text())
    for first, second in zip(before, after, strict=True):
        assert 5000 <= int(second) - int(first) < 7000
