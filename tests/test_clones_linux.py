"""Going back to a point, and copies, with a Linux guest: one boot for all of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmm import Machine, MachineConfig
from vmm.testing.kernels import Kernel
from vmm.virtio.net import Nic

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(900)]

PATIENCE = 300.0
"""Seconds for what takes one; a busy emulated host needs more."""
COPIES = 8
CPUS = 2
DRIVER = "/sys/bus/virtio/drivers/virtio_net"
READ_ADDRESS = f"""
cd {DRIVER}
for device in virtio*; do echo $device > unbind; echo $device > bind; done
cat /sys/class/net/*/address | grep -v 00:00:00:00:00:00
"""


def shell(machine: Machine, line: str) -> str:
    done = machine.run(["sh", "-c", line], text=True, timeout=PATIENCE)
    assert done.returncode == 0, done
    return str(done.stdout).strip()


def card(machine: Machine) -> str:
    """The MAC its device shows."""
    nic = machine.virtio_device("net0")
    assert isinstance(nic, Nic)
    return bytes(nic.config[:6]).hex(":")


def test_a_running_linux_goes_back_and_has_copies(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path]
) -> None:
    initrd = make_initrd(
        "while true; do sleep 1; done", kernel=cloud_kernel, modules=["virtio_mmio", "virtio_net"]
    )
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", memory=192 << 20,
        cpus=CPUS, agent=True, nets=["lan=test-clones-linux"],
    )  # fmt: skip
    with Machine(config) as m:
        m.start()
        # The agent answers before init has inserted the modules.
        shell(m, f"while [ ! -e {DRIVER}/bind ]; do sleep 0.1; done")
        shell(m, "echo before > /state; hostname original")
        m.checkpoint()
        for turn in range(10):
            said = shell(
                m,
                "cat /state; ls /much 2>/dev/null || echo none;"
                f"echo {turn} > /state; head -c 4000000 /dev/urandom > /much; cat /state; ls /much",
            )
            assert said == f"before\nnone\n{turn}\n/much"
            m.rollback()
        m.stop()
        m.rollback()
        assert m.state == "paused"
        m.resume()
        assert shell(m, "cat /state") == "before"
        copies = m.clone(COPIES)
        try:
            _each_is_its_own(m, copies)
        finally:
            for copy in copies:
                copy.close()
        assert shell(m, "cat /state; hostname") == "before\noriginal"


def _each_is_its_own(m: Machine, copies: list[Machine]) -> None:
    def ask(number: int) -> list[str]:
        line = f"cat /state; hostname; hostname copy-{number}; hostname; "
        line += "head -c 16 /dev/urandom | md5sum;" + READ_ADDRESS
        return shell(copies[number], line).split("\n")

    with ThreadPoolExecutor(COPIES) as pool:
        answers = list(pool.map(ask, range(COPIES)))
    said = [[answer[0], answer[1], answer[2], answer[4]] for answer in answers]
    assert said == [
        ["before", "original", f"copy-{number}", card(copy)] for number, copy in enumerate(copies)
    ]
    assert len({answer[3] for answer in answers}) == COPIES
    assert len({card(each) for each in [m, *copies]}) == COPIES + 1


def test_copies_draw_random_numbers_of_their_own(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where nothing but the seed differs: one processor, and the same first command."""
    command = ["head", "-c", "16", "/dev/urandom"]
    loop = "while true; do sleep 1; done"
    initrd = make_initrd(loop, kernel=cloud_kernel, modules=["virtio_mmio"])
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", memory=192 << 20,
        agent=True,
    )  # fmt: skip
    with Machine(config) as m:
        m.start()
        shell(m, "until [ -c /dev/urandom ]; do sleep 1; done")  # init mounts it
        m.snapshot(str(tmp_path / "snapshot"))
        with m.clone(2) as copies:
            drawn = [each.run(command, check=True).stdout for each in copies]
    for _ in range(2):
        with Machine.restore(str(tmp_path / "snapshot")) as each:
            each.start()
            drawn.append(each.run(command, check=True).stdout)
    assert len(set(drawn)) == len(drawn)
