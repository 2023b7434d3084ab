"""vmm/isolated with Linux in it: commands and files by the agent, snapshots."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from vmm import AgentError, AsyncMachine, Machine, MachineConfig
from vmm.machine import exits
from vmm.testing import initrds
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(900)]

MIB = 1 << 20


@pytest.fixture
def initrd(cloud_kernel: Kernel, tmp_path: Path) -> Path:
    path = tmp_path / "initrd.img"
    initrds.waiting(cloud_kernel, {"balloon": 0}).write(str(path))
    return path


def test_commands_files_and_moments(cloud_kernel: Kernel, initrd: Path, tmp_path: Path) -> None:
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=850, agent=True,
        balloon=0,
    )  # fmt: skip
    with Machine(config, isolate=True) as m:
        m.start()
        said = m.run(["/bin/busybox", "uname", "-r"], text=True, check=True).stdout
        assert said == f"{cloud_kernel.release}\n"
        (tmp_path / "tree").mkdir()
        data = os.urandom(MIB)
        (tmp_path / "tree" / "file").write_bytes(data)
        sizes: list[int] = []
        m.put(tmp_path / "tree", "/there", progress=sizes.append)
        m.get("/there", tmp_path / "back")
        assert (tmp_path / "back" / "file").read_bytes() == data
        assert sizes[-1] == MIB
        with m.popen(["/bin/busybox", "cat"]) as process:
            assert process.communicate(b"hello")[0] == b"hello"
        assert m.balloon.stats(60)["total_memory"] > 0
        asyncio.run(with_coroutines(m))
        m.snapshot(tmp_path / "snap")
        assert m.shutdown(0.1).kind in (exits.STOPPED, exits.POWEROFF)
        with pytest.raises(AgentError, match="ended"):
            m.run(["true"])
    with Machine.restore(tmp_path / "snap", isolate=True) as m:
        m.start()
        assert m.run(["/bin/busybox", "stat", "-c", "%s", "/there/file"]).stdout == b"%d\n" % MIB
        with (
            pytest.raises(AgentError, match="was killed by SIGKILL"),
            m.popen(["/bin/busybox", "sleep", "1000"]) as process,
        ):
            os.kill(m.process.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            process.wait(60)
        assert m.wait(60).kind == exits.CRASHED


async def with_coroutines(machine: Machine) -> None:
    m = AsyncMachine(machine)
    await m.wait_for_agent()
    done = await m.run(["/bin/busybox", "echo", "async"])
    assert done.stdout == b"async\n"
