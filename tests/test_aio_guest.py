"""vmm.aio.guest: commands and files as coroutines, over the agent itself, on the host."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.bare import until
from tests.support.host_agent import HostAgent
from vmm import AgentError, AsyncMachine, MachineConfig, StateError
from vmm.agent.link import Link
from vmm.aio.guest import AsyncGuestCalls

pytestmark = pytest.mark.timeout(120)


class Guest(AsyncGuestCalls):
    """The host for a guest."""

    def __init__(self, agent: HostAgent) -> None:
        self.agent = agent

    def _agent(self) -> Link:
        return self.agent  # type: ignore[return-value]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with HostAgent(tmp_path_factory.mktemp("agent")) as running:
        yield Guest(running)


def test_many_at_once(guest: Guest) -> None:
    async def main() -> list[subprocess.CompletedProcess[str]]:
        commands = (guest.run(["sh", "-c", f"cat; exit {n}"], input=f"{n}\n") for n in range(20))
        return await asyncio.gather(*commands)

    done = asyncio.run(main())
    assert [(one.stdout, one.returncode) for one in done] == [(f"{n}\n", n) for n in range(20)]


def test_what_it_raises(guest: Guest) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await guest.run(["/no/such/program"])
        with pytest.raises(subprocess.CalledProcessError):
            await guest.run(["false"], check=True)
        with pytest.raises(subprocess.TimeoutExpired):
            await guest.run(["sleep", "1000"], timeout=0.05)

    asyncio.run(main())


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_cancelled_command_is_hung_up_on(guest: Guest, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    script = f"echo $$ > {told}.new; mv {told}.new {told}; exec sleep 1000"

    async def main() -> None:
        task = asyncio.ensure_future(guest.run(["sh", "-c", script]))
        while not told.exists():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = tiny.descriptors(), threading.active_count()
    asyncio.run(main())
    assert (tiny.descriptors(), threading.active_count()) == before
    pid = int(told.read_text())
    until(lambda: gone(pid))


def test_a_process(guest: Guest) -> None:
    async def main() -> None:
        process = await guest.popen(["cat"])
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.close()
        assert await asyncio.to_thread(process.stdout.read) == b"hello\n"
        assert await asyncio.to_thread(process.wait) == 0
        process.close()

    asyncio.run(main())


def test_files(guest: Guest, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)

    async def main() -> bytes:
        got = io.BytesIO()
        await guest.put(io.BytesIO(data), f"{tmp_path}/file", mode=0o600)
        await guest.get(f"{tmp_path}/file", got)
        with pytest.raises(FileNotFoundError):
            await guest.get(f"{tmp_path}/nosuch", got)
        return got.getvalue()

    assert asyncio.run(main()) == data
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_of_a_machine_without_an_agent_or_whose_agent_does_not_answer(tmp_path: Path) -> None:
    kernel = tiny.kernel(tmp_path, tiny.prints(b"no Linux\n") + tiny.HALT)

    async def main() -> None:
        async with AsyncMachine(MachineConfig(kernel, memory=16 << 20)) as m:
            await m.start()
            with pytest.raises(StateError, match="has no agent in the guest"):
                await m.run(["true"])
        async with AsyncMachine(MachineConfig(kernel, memory=64 << 20, agent=True)) as m:
            with pytest.raises(StateError, match="is created, not running"):
                await m.run(["true"])
            await m.start()
            await m.wait_for("no Linux")
            with pytest.raises(AgentError, match=r"not answered within 0\.1 s; last .*no Linux"):
                await m.wait_for_agent(0.1)
            waiting = asyncio.ensure_future(m.run(["true"]))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            waiting = asyncio.ensure_future(m.run(["true"]))
            await asyncio.sleep(0.01)
            await m.stop()
            with pytest.raises(AgentError, match="the machine ended before its agent answered"):
                await waiting

    before = tiny.descriptors(), threading.active_count()
    asyncio.run(main())
    assert (tiny.descriptors(), threading.active_count()) == before
