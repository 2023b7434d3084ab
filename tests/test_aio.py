"""vmm.aio: a machine's calls as coroutines, and what a cancelled one leaves (nothing)."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import AsyncMachine, ConsoleClosed, HostError, Machine, MachineConfig, StateError
from vmm.aio.thread import in_thread
from vmm.events import ConsoleLine, Stopped
from vmm.machine import exits

pytestmark = pytest.mark.timeout(120)


def needs_kvm(test: Callable[..., object]) -> Callable[..., object]:
    """Whichever back end it has makes no difference here."""
    return pytest.mark.needs_kvm(pytest.mark.one_lane(test))


Config = Callable[..., MachineConfig]
READY = tiny.prints(b"ready\n") + tiny.HALT


@pytest.fixture
def config(tmp_path: Path) -> Config:
    def make(code: bytes, **options: object) -> MachineConfig:
        values: dict[str, object] = {"memory": 16 << 20, **options}
        return MachineConfig(tiny.kernel(tmp_path, code), **values)  # type: ignore[arg-type]

    return make


def run(coroutine: Awaitable[object]) -> None:
    """To its end in a loop of its own; nothing may be left of it."""
    gc.collect()  # what tests before this one have left
    before = tiny.descriptors(), threading.active_count()

    async def main() -> None:
        await coroutine
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert (tiny.descriptors(), threading.active_count()) == before


# --- in_thread ------------------------------------------------------------------------------------


def test_results_and_exceptions_come_back() -> None:
    async def main() -> None:
        assert await in_thread(pow, 2, 10) == 1024
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0)
        with pytest.raises(RuntimeError, match="the end"):
            await in_thread(_stops)

    run(main())


def _stops() -> None:
    raise StopIteration("the end")


@pytest.mark.parametrize("times", [1, 3])
def test_a_cancelled_call_has_ended_before_the_cancellation_goes_on(times: int) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        go.wait(60)
        ended.set()

    async def main() -> None:
        task = asyncio.ensure_future(in_thread(block, abort=go.set if times == 1 else None))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0.001)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    run(main())


def test_what_a_cancelled_call_raises_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    go = threading.Event()

    def fail() -> None:
        go.wait(60)
        raise RuntimeError("nobody asked")

    async def main() -> None:
        task = asyncio.ensure_future(in_thread(fail, abort=go.set))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert "never retrieved" not in caplog.text


# --- a machine --------------------------------------------------------------------------------


@needs_kvm
def test_a_life(config: Config) -> None:
    async def main() -> None:
        async with AsyncMachine(config(tiny.prints(b"ready\n") + tiny.COUNTING)) as m:
            assert m.state == "created"
            await m.start()
            assert await m.wait_for("ready", timeout=60) == "ready"
            await m.pause()
            count = m.memory.read_u32(tiny.COUNTER)
            assert m.vcpus[0].get_regs().rip >= tiny.ENTRY
            await m.resume()
            while m.memory.read_u32(tiny.COUNTER) == count:
                await asyncio.sleep(0.001)
            ended = await m.stop()
            assert ended is m.exit is await m.wait()
            assert ended.kind == exits.STOPPED
            names = [event.name for event in m.event_log]
            assert names == ["started", "paused", "resumed", "stopped"]
        assert m.state == "closed"
        assert await m.wait() is ended

    run(main())


@needs_kvm
def test_the_loop_goes_on_while_a_call_waits(config: Config) -> None:
    """Each of these would wait for ever if another kept the loop."""

    async def main() -> None:
        async with AsyncMachine(config(tiny.ECHO)) as m:
            await m.start()
            await m.wait_for("ready", timeout=60)
            waiting = asyncio.ensure_future(m.wait_for("[x]", timeout=60))
            ending = asyncio.ensure_future(m.wait(60))
            await asyncio.sleep(0)
            m.send("x")
            assert await waiting == "[x]"
            m.send(b"q")
            assert (await ending).status == 7

    run(main())


@needs_kvm
def test_events_beside_it(config: Config) -> None:
    async def main() -> None:
        async with AsyncMachine(config(tiny.prints(b"one\ntwo\n") + tiny.exits(3))) as m:
            stream = m.events(ConsoleLine, Stopped)
            await m.start()
            seen = [str(event) async for event in stream]
        assert seen == [
            "console: one",
            "console: two",
            "stopped: the guest wrote 3 to the exit port (status 3)",
        ]

    run(main())


@needs_kvm
def test_going_back_and_copies(config: Config) -> None:
    async def main() -> None:
        async with AsyncMachine(config(tiny.ECHO)) as m:
            await m.start()
            await m.wait_for("ready", timeout=100)
            await m.checkpoint()
            for copy in await m.clone(2):
                async with copy:
                    copy.send("q")
                    assert (await copy.wait(100)).status == 7
                assert copy.state == "closed"
            for _ in range(2):
                m.send("q")
                assert (await m.wait(100)).status == 7
                await m.rollback()
                await m.resume()
            copying = asyncio.ensure_future(m.clone(20))
            await asyncio.sleep(0)
            copying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await copying

    descriptors = tiny.descriptors()
    run(main())
    assert tiny.descriptors() == descriptors


@needs_kvm
def test_more_at_once_than_the_default_executor_has_threads(config: Config) -> None:
    machine = config(tiny.ECHO, memory=2 << 20)

    async def one() -> int:
        async with AsyncMachine(machine) as m:
            await m.start()
            await m.wait_for("ready", timeout=100)
            started.append(m)
            await m.wait_for("[x]", timeout=100)
            m.send("q")
            return (await m.wait(100)).status

    started: list[AsyncMachine] = []

    async def main() -> None:
        tasks = [asyncio.ensure_future(one()) for _ in range(12)]
        while len(started) < len(tasks):
            await asyncio.sleep(0.01)
            assert not any(task.done() for task in tasks)
        for m in started:
            m.send("x")
        assert await asyncio.gather(*tasks) == [7] * 12

    run(main())


@needs_kvm
def test_shutdown(config: Config) -> None:
    async def main() -> None:
        async with AsyncMachine(config(tiny.POLITE)) as m:
            with pytest.raises(StateError, match="shutdown: the machine is created, not running"):
                await m.shutdown()
            await m.start()
            await m.wait_for("ready", timeout=60)
            assert (await m.shutdown(60)).kind == exits.POWEROFF
        async with AsyncMachine(config(tiny.DEAF)) as m:
            await m.start()
            await m.wait_for("ready", timeout=60)
            assert (await m.shutdown(0.1)).kind == exits.STOPPED
        for paused in (False, True):
            async with AsyncMachine(config(READY)) as m:  # it has no driver for the button
                await m.start()
                await m.wait_for("ready", timeout=60)
                if paused:
                    await m.pause()
                assert (await m.shutdown(None)).kind == exits.STOPPED

    run(main())


@needs_kvm
def test_time_limits_and_ends(config: Config) -> None:
    async def main() -> None:
        async with AsyncMachine(config(READY)) as m:
            with pytest.raises(StateError, match="wait: the machine is created"):
                await m.wait()
            await m.start()
            with pytest.raises(TimeoutError, match=r"the machine has not ended within 0\.05 s"):
                await m.wait(0.05)
            with pytest.raises(TimeoutError, match="never"):
                await m.wait_for("never", timeout=0.05)
            waiting = asyncio.ensure_future(m.wait_for("never"))
            await m.stop()
            with pytest.raises(ConsoleClosed, match="never"):
                await waiting

    run(main())


@needs_kvm
@pytest.mark.parametrize("call", ["wait", "wait_for", "events", "shutdown"])
def test_cancelling_a_wait_leaves_the_machine_running(config: Config, call: str) -> None:
    async def main() -> None:
        async with AsyncMachine(config(READY)) as m:
            await m.start()
            await m.wait_for("ready", timeout=60)
            stream = m.events()
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "wait": m.wait,
                "wait_for": lambda: m.wait_for("never"),
                "events": lambda: anext(stream),
                "shutdown": lambda: m.shutdown(None),
            }
            threads = threading.active_count()
            task = asyncio.ensure_future(calls[call]())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert threading.active_count() == threads
            assert m.state == "running"

    run(main())


@needs_kvm
def test_cancelled_before_the_console_is_attached(config: Config) -> None:
    async def main() -> None:
        async with AsyncMachine(config(READY)) as m:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await m.wait_for("ready")

    run(main())


@needs_kvm
@pytest.mark.parametrize("ticks", [0, 1, 3])
def test_cancelled_on_entering(config: Config, ticks: int) -> None:
    machine = config(READY)

    async def enter() -> None:
        async with AsyncMachine(machine) as m:
            await m.start()
            await m.wait_for("never")

    async def main() -> None:
        task = asyncio.ensure_future(enter())
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


@needs_kvm
def test_cancelled_anywhere_nothing_is_left(config: Config) -> None:
    machine = config(tiny.ECHO, memory=4 << 20, cpus=2, vsock="cid=3")

    async def life() -> None:
        async with AsyncMachine(machine) as m:
            m.bind_vsock(7, lambda reader, writer: asyncio.sleep(1))
            await m.start()
            await m.wait_for("ready", timeout=60)
            await m.checkpoint()
            m.send("x")
            await m.wait_for("[x]", timeout=60)
            await m.rollback()
            one, two = await m.clone(2)
            async with one, two:
                assert one.config.vsock != two.config.vsock
                await one.pause()
            m.send("q")
            assert (await m.wait(60)).status == 7

    async def main() -> None:
        begin = time.monotonic()
        await life()
        whole = time.monotonic() - begin
        for part in range(10):
            task = asyncio.ensure_future(life())
            await asyncio.sleep(whole * part / 10)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


@needs_kvm
def test_an_exception_inside_closes(config: Config) -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            async with AsyncMachine(config(tiny.SPIN, cpus=2)) as m:
                await m.start()
                _ = 1 // 0
        assert m.state == "closed"
        assert m.exit is not None

    run(main())


@needs_kvm
def test_out_of_a_function_or_a_machine(config: Config) -> None:
    async def main() -> None:
        async with AsyncMachine(lambda: Machine(config(READY))) as m:
            assert m.config.memory == 16 << 20
        made = Machine(config(READY))
        m = AsyncMachine(made)
        assert m.machine is made and m.state == "created"
        async with m:
            await m.call(made.start)
        assert made.state == "closed"

    run(main())


def test_a_wrong_configuration_and_too_early() -> None:
    async def main() -> None:
        m = AsyncMachine(MachineConfig("/nosuch/kernel", device="/nosuch/kvm"))
        with pytest.raises(StateError, match="on entering `async with`"):
            m.send("x")
        await m.close()
        with pytest.raises(HostError, match="nosuch"):
            async with m:
                raise AssertionError

    run(main())


def shared() -> list[str]:
    names = vars(AsyncMachine).keys() & vars(Machine).keys()
    return sorted(name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("name", shared())
def test_what_both_have_is_called_alike(name: str) -> None:
    ours, theirs = vars(AsyncMachine)[name], vars(Machine)[name]
    assert type(ours) is type(theirs)
    if not isinstance(ours, property):
        mine, its = inspect.signature(ours), inspect.signature(theirs)
        assert mine.parameters == its.parameters
        returns = str(its.return_annotation).replace("Machine]", "AsyncMachine]")
        assert mine.return_annotation in (its.return_annotation, returns)
