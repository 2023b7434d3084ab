"""Going back to a point, and copies, with a Linux guest: one boot for all of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmm import Machine, MachineConfig
from vmm.testing.kernels import Kernel
from vmm.virtio.net import Nic

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(500)]

PATIENCE = 300.0
"""Seconds for what takes one; a busy emulated host needs more."""
COPIES = 8
READ_ADDRESS = """
cd /sys/bus/virtio/drivers/virtio_net
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
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", memory=192 << 20, cpus=2,
        agent=True, nets=["lan=test-clones-linux"],
    )  # fmt: skip
    with Machine(config) as m:
        m.start()
        shell(m, "echo before > /state; hostname original")
        m.checkpoint()
        for turn in range(10):
            shell(m, f"echo {turn} > /state; head -c 4000000 /dev/urandom > /much")
            assert shell(m, "cat /state; ls /much") == f"{turn}\n/much"
            m.rollback()
            assert shell(m, "cat /state; ls /much 2>/dev/null || echo gone") == "before\ngone"
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
    def ask(number: int) -> tuple[str, str, str]:
        copy = copies[number]
        assert shell(copy, "cat /state; hostname") == "before\noriginal"
        random = shell(copy, "head -c 16 /dev/urandom | md5sum")
        address = shell(copy, READ_ADDRESS)
        return shell(copy, f"hostname copy-{number}; hostname"), random, address

    with ThreadPoolExecutor(COPIES) as pool:
        answers = list(pool.map(ask, range(COPIES)))
    assert [name for name, _, _ in answers] == [f"copy-{number}" for number in range(COPIES)]
    assert len({random for _, random, _ in answers}) == COPIES
    assert [address for _, _, address in answers] == [card(copy) for copy in copies]
    assert len({card(each) for each in [m, *copies]}) == COPIES + 1
