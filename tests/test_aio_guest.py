"""vmm.aio.guest: commands and files as coroutines, over the agent itself, on the host."""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest

from tests.support import tiny
from tests.support.bare import until
from tests.support.host_agent import HostAgent
from vmm import AgentError, AsyncMachine, MachineConfig, StateError
from vmm.agent.connection import Connection
from vmm.agent.link import Link
from vmm.agent.process import GuestProcess
from vmm.aio.guest import AsyncGuestCalls
from vmm.aio.process import LINE_MAX, AsyncGuestProcess

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


def test_quick_commands_lose_nothing(guest: Guest) -> None:
    """Of some, all has come before they are known to have started."""

    async def main() -> None:
        for _ in range(40):
            done = await guest.run(["sh", "-c", "echo out; echo err >&2"], input=b"")
            assert (done.stdout, done.stderr) == (b"out\n", b"err\n")

    asyncio.run(main())


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


def test_a_cancelled_command_is_killed(guest: Guest, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("trap", ["", "trap '' HUP TERM; "])
def test_cancelled_with_all_that_it_has_started(guest: Guest, tmp_path: Path, trap: str) -> None:
    script = f"{trap}sleep 1000 & echo $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; wait"

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60) as limit:
                task = asyncio.ensure_future(guest.run(["sh", "-c", script]))
                while not (tmp_path / "pid").exists():
                    await asyncio.sleep(0.001)
                limit.reschedule(asyncio.get_running_loop().time())
                await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    before = tiny.descriptors()
    asyncio.run(main())
    assert tiny.opened_since(before) == []
    pid = int((tmp_path / "pid").read_text())
    until(lambda: gone(pid))


@pytest.mark.parametrize("how", ["cancelled", "interrupted"])
def test_given_up_before_it_is_known_to_run(guest: Guest, tmp_path: Path, how: str) -> None:
    """It may have been started; nobody could kill it later."""
    script = f"trap '' HUP TERM; echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; "
    command = ["sh", "-c", script + "sleep 1000 & wait"]

    def runs() -> None:
        until((tmp_path / "pid").exists)

    async def main() -> None:
        link: Any = guest.agent
        task = asyncio.ensure_future(AsyncGuestProcess.start(link, command))
        await asyncio.sleep(0)
        runs()  # the loop stands still meanwhile
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def interrupt(self: Connection, *args: object) -> bool:
        runs()
        raise KeyboardInterrupt

    if how == "cancelled":
        asyncio.run(main())
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Connection, "wait_for", interrupt)
            GuestProcess(guest.agent, command)
    pid = int((tmp_path / "pid").read_text())
    until(lambda: gone(pid))


def test_what_was_said_before_it_was_late(guest: Guest) -> None:
    async def main() -> None:
        script = "echo first; echo err >&2; setsid sleep 8 & exec sleep 1000"
        with pytest.raises(subprocess.TimeoutExpired) as late:
            await guest.run(["sh", "-c", script], timeout=3)
        assert (late.value.output, late.value.stderr) == (b"first\n", b"err\n")
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_much_both_ways_at_once(guest: Guest) -> None:
    data = random.Random(3).randbytes(2 << 20)

    async def main() -> list[bytes]:
        done = await asyncio.gather(*(guest.run(["cat"], input=data) for _ in range(3)))
        return [each.stdout for each in done]

    assert asyncio.run(main()) == [data] * 3


def test_a_process(guest: Guest) -> None:
    async def main() -> None:
        async with await guest.popen(["sh", "-c", "echo ready; cat; exit 3"]) as process:
            assert process.stdin is not None and process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
            await process.stdin.write(b"one\ntwo\nthree")
            assert await process.stdout.read(2) == b"on"
            assert await process.stdout.readline() == b"e\n"
            process.stdin.close()
            assert [line async for line in process.stdout] == [b"two\n", b"three"]
            assert await process.stdout.read(5) == b"" == await process.stdout.read()
            assert process.stderr is not None and await process.stderr.read() == b""
        assert process.returncode == 3 == await process.wait()
        assert "returncode: 3" in repr(process)

    before = tiny.descriptors(), threading.active_count()
    asyncio.run(main())
    assert (tiny.descriptors(), threading.active_count()) == before


def test_signals_and_ends(guest: Guest) -> None:
    async def main() -> None:
        process = await guest.popen(["sleep", "1000"], stdin=DEVNULL, stdout=DEVNULL)
        assert (process.stdin, process.stdout, process.returncode) == (None, None, None)
        process.terminate()
        assert await process.wait() == -signal.SIGTERM
        process.terminate()  # it has ended: nothing
        process.close()
        process.close()
        process = await guest.popen(["sleep", "1000"])
        process.close()
        with pytest.raises(AgentError, match="this command's connection is closed"):
            await process.wait()
        with pytest.raises(ZeroDivisionError):
            async with await guest.popen(["sleep", "1000"]) as process:
                _ = 1 // 0
        until(lambda: gone(process.pid))
        process = await guest.popen(["true"])
        await process.wait()
        assert process.stdin is not None
        with pytest.raises(BrokenPipeError):
            while True:
                await process.stdin.write(b"x" * 1000)
        assert await process.communicate(b"nobody reads this") == (b"", b"")
        process.close()

    before = tiny.descriptors(), threading.active_count()
    asyncio.run(main())
    assert (tiny.descriptors(), threading.active_count()) == before


def test_a_line_without_end(guest: Guest) -> None:
    async def main() -> None:
        process = await guest.popen(["cat", "/dev/zero"])
        assert process.stdout is not None
        with pytest.raises(ValueError, match=f"a line of more than {LINE_MAX} bytes"):
            await process.stdout.readline()
        process.close()

    asyncio.run(main())


def test_text_and_a_terminal(guest: Guest) -> None:
    async def main() -> None:
        process = await guest.popen(["cat"], encoding="latin-1")
        assert await process.communicate("\xe4\r\n") == ("\xe4\n", "")
        process.close()
        process = await guest.popen(["stty", "size"], tty=True, size=(12, 34), text=True)
        out, err = await process.communicate()
        assert (out, err) == ("12 34\n", None)
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


def test_progress_of_files(guest: Guest, tmp_path: Path) -> None:
    """The function is called on the event loop; what it raises ends the copy."""
    size = 4 << 20
    seen: list[tuple[int, threading.Thread]] = []

    def note(count: int) -> None:
        seen.append((count, threading.current_thread()))

    def stop(count: int) -> None:
        raise LookupError("enough")

    async def main() -> None:
        for copy in (
            guest.put(io.BytesIO(bytes(size)), f"{tmp_path}/file", progress=note),
            guest.get(f"{tmp_path}/file", io.BytesIO(), progress=note),
        ):
            seen.clear()
            await copy
            counts = [count for count, _ in seen]
            assert counts[-1] == size and counts == sorted(set(counts))
            assert {thread for _, thread in seen} == {threading.main_thread()}
        with pytest.raises(LookupError, match="enough"):
            await guest.get(f"{tmp_path}/file", tmp_path / "copy", progress=stop)
        with pytest.raises(LookupError, match="enough"):
            await guest.put(tmp_path / "file", f"{tmp_path}/copy", progress=stop)

    asyncio.run(main())


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


def test_a_cancelled_put_of_a_pipe_without_a_writer_ends(guest: Guest, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await guest.put(tmp_path / "fifo", str(tmp_path / "target"))

    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vmm-")]


def test_run_takes_and_refuses_as_without_asyncio(guest: Guest) -> None:
    async def main() -> None:
        done = await guest.run(["echo", "x"], capture_output=True, timeout=float("inf"))
        assert done.stdout == b"x\n"
        odd: dict[str, Any]
        for odd in ({"input": b"x", "stdin": DEVNULL}, {"user": ""}, {"size": (-1, 0)}):
            with pytest.raises(ValueError, match=r"stdin and input|user=|size="):
                await guest.run(["true"], **odd)

    asyncio.run(main())
