"""Commands in Linux guests, through the agent."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm import AsyncMachine, Machine, MachineConfig
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(300)]


async def _from_many_tasks(machine: Machine) -> list[str]:
    m = AsyncMachine(machine)
    done = await asyncio.gather(
        *(m.run(["sh", "-c", f"echo {number}"], text=True, check=True) for number in range(8))
    )
    return [each.stdout for each in done]


def test_commands_in_an_initrd(cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    initrd = make_initrd("read line", kernel=cloud_kernel)
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=250, cpus=2,
        agent=True,
    )  # fmt: skip
    with Machine(config) as m:
        m.start()
        said = m.run(["/bin/busybox", "uname", "-r"], text=True, check=True).stdout
        assert said == f"{cloud_kernel.release}\n"
        for status in range(20):
            done = m.run(["sh", "-c", f"echo {status}; echo err >&2; exit {status}"])
            assert done.returncode == status
            assert done.stdout == f"{status}\n".encode()
            assert done.stderr == b"err\n"
        with pytest.raises(FileNotFoundError):
            m.run(["/no/such/program"])
        with pytest.raises(subprocess.TimeoutExpired):
            m.run(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], timeout=1)
        said_at_once = asyncio.run(_from_many_tasks(m))
        assert said_at_once == [f"{number}\n" for number in range(8)]
        data = bytes(range(256)) * (1 << 12)
        assert m.run(["cat"], input=data).stdout == data
