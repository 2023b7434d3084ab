"""Events of a machine: log, listeners, streams for threads and coroutines."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import Machine, MachineConfig, events
from vmm.console.tail import ConsoleTail
from vmm.events import ConsoleLine, DeviceError, Event, Paused, Resumed, Started, Stopped
from vmm.machine import event_hub, exits
from vmm.machine.event_hub import EventHub, LineSplitter

pytestmark = pytest.mark.timeout(120)


def needs_kvm(test: Callable[..., object]) -> Callable[..., object]:
    """Whichever back end it has makes no difference here."""
    return pytest.mark.needs_kvm(pytest.mark.one_lane(test))


Make = Callable[..., Machine]
END = exits.MachineExit(exits.STOPPED, "stopped")


@pytest.fixture
def machine(tmp_path: Path) -> Make:
    def make(code: bytes, **options: object) -> Machine:
        values: dict[str, object] = {"memory": 16 << 20, **options}
        return Machine(MachineConfig(tiny.kernel(tmp_path, code), **values))  # type: ignore[arg-type]

    return make


class Hub(EventHub):
    """One without a machine."""

    def __init__(self) -> None:
        self.tail = ConsoleTail()
        self.flushed = 0
        self.failures: list[BaseException] = []
        super().__init__((), self.tail, self._count, self.failures.append)

    def _count(self) -> None:
        self.flushed += 1


def names(log: list[Event]) -> list[str]:
    return [event.name for event in log]


# --- the log --------------------------------------------------------------------------------------


@needs_kvm
def test_the_log_tells_the_life_also_of_before_it_was_asked_for(machine: Make) -> None:
    before = time.monotonic()
    with machine(tiny.SPIN) as m:
        m.start()
        m.pause()
        assert names(m.event_log) == ["started", "paused"]
        m.resume()
        m.emit(DeviceError("disk0: made up"))
        m.stop()
        log = m.event_log
    assert names(log) == ["started", "paused", "resumed", "device error", "stopped"]
    assert isinstance(log[-1], Stopped) and log[-1].exit is m.exit
    times = [before, *(event.time for event in log), time.monotonic()]
    assert times == sorted(times)
    assert m.event_log == log  # also when it is closed


@needs_kvm
@pytest.mark.parametrize("asked", ["early", "late"])
def test_the_end_is_in_the_log_when_wait_returns(machine: Make, asked: str) -> None:
    for _ in range(20):
        with machine(tiny.exits(3)) as m:
            if asked == "early":
                assert m.event_log == []
            m.start()
            m.wait(60)
            assert names(m.event_log) == ["started", "stopped"]


def test_the_log_is_bounded_and_keeps_the_last() -> None:
    hub = Hub()
    for number in range(event_hub.LOG_LIMIT + 5):
        hub.emit(DeviceError(str(number)))
    log = hub.log()
    assert len(log) == event_hub.LOG_LIMIT
    assert str(log[0]) == "device error: 5"


@needs_kvm
def test_what_is_noted_before_anybody_asks_is_bounded(machine: Make) -> None:
    with machine(tiny.SPIN) as m:
        m.start()
        for _ in range(100):
            m.pause()
            m.resume()
        assert names(m.event_log) == ["paused", "resumed"] * 50


@needs_kvm
def test_a_guest_cannot_push_other_events_out_of_the_log(machine: Make) -> None:
    """It tells pvpanic 5,000 times that a crash kernel takes over."""
    code = b"\x66\xba\x05\x05\xb0\x02\xb9\x88\x13\x00\x00\xee\xe2\xfd"
    for early in (True, False):
        with machine(code + tiny.exits(3)) as m:
            if early:
                assert m.event_log == []
            m.start()
            assert m.wait(60).status == 3
            assert names(m.event_log) == ["started", *["panicked"] * 10, "stopped"]


def test_from_many_threads_nothing_is_lost() -> None:
    hub = Hub()
    heard: list[Event] = []
    hub.subscribe(heard.append, ())
    stream = hub.stream((), False)

    def emit(who: int) -> None:
        for number in range(100):
            hub.emit(DeviceError(f"{who} {number}"))

    threads = [threading.Thread(target=emit, args=(who,)) for who in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hub.emit(Stopped(END))
    lines = sorted(f"{who} {number}" for who in range(5) for number in range(100))
    for seen in (hub.log(), heard, list(stream)):
        assert sorted(e.line for e in seen if isinstance(e, DeviceError)) == lines
        assert isinstance(seen[-1], Stopped)


# --- listeners ------------------------------------------------------------------------------------


def test_several_listeners_each_with_its_kinds() -> None:
    hub = Hub()
    every: list[Event] = []
    some: list[Event] = []
    remove = hub.subscribe(every.append, ())
    hub.subscribe(some.append, (Paused, Resumed))
    sent = [Started(), Paused(), Resumed()]
    for event in sent:
        hub.emit(event)
    remove()
    remove()
    hub.emit(Paused("again"))
    assert every == sent
    assert names(some) == ["paused", "resumed", "paused"]


def test_a_listener_may_emit_and_subscribe_and_leave() -> None:
    hub = Hub()
    heard: list[Event] = []

    def once(event: Event) -> None:
        remove()
        hub.subscribe(heard.append, ())
        hub.emit(Resumed())

    remove = hub.subscribe(once, (Paused,))
    hub.emit(Paused())
    hub.emit(Paused())
    assert names(heard) == ["resumed", "paused"]


@needs_kvm
@pytest.mark.parametrize("kind", [Started, ConsoleLine])
def test_what_a_listener_raises_ends_the_machine(machine: Make, kind: type[Event]) -> None:
    def listener(event: Event) -> None:
        raise RuntimeError(f"I do not like {event}")

    with machine(tiny.prints(b"text\n") + tiny.HALT) as m:
        m.subscribe(listener, kind)
        m.start()
        ended = m.wait(60)
    assert ended.kind == exits.MONITOR_ERROR
    assert "RuntimeError: I do not like" in ended.message
    assert "in listener" in ended.report


def test_what_a_listener_raises_at_the_end_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    hub = Hub()

    def listener(event: Event) -> None:
        raise RuntimeError("too late")

    hub.subscribe(listener, (Stopped,))
    hub.emit(Stopped(END))
    assert "RuntimeError: too late" in capsys.readouterr().err
    assert hub.failures == []


@needs_kvm
def test_a_listener_may_end_the_machine(machine: Make) -> None:
    with machine(tiny.prints(b"one\ntwo\n") + tiny.HALT) as m:
        m.subscribe(lambda event: m.end(END), ConsoleLine)
        m.start()
        assert m.wait(60) is END


@needs_kvm
@pytest.mark.parametrize("kind", [Started, Resumed])
def test_a_listener_may_pause_what_is_about_to_run(machine: Make, kind: type[Event]) -> None:
    def listener(event: Event) -> None:
        remove()
        m.pause()

    with machine(tiny.COUNTING) as m:
        if kind is Resumed:
            m.start()
            m.pause()
        remove = m.subscribe(listener, kind)
        m.start() if kind is Started else m.resume()
        assert m.state == "paused"
        count = m.memory.read_u32(tiny.COUNTER)
        time.sleep(0.02)
        assert m.memory.read_u32(tiny.COUNTER) == count
        m.resume()
        deadline = time.monotonic() + 60
        while m.memory.read_u32(tiny.COUNTER) == count:
            assert time.monotonic() < deadline
        assert names(m.event_log)[-3:] == [kind.name, "paused", "resumed"]


# --- console lines --------------------------------------------------------------------------------


@needs_kvm
def test_console_lines_come_whole_and_before_the_end(machine: Make) -> None:
    text = b"one\r\n\ntwo\xff\nlast words"
    with machine(tiny.prints(text) + tiny.exits(0)) as m:
        stream = m.events()
        m.start()
        seen = list(stream)
        assert [event.line for event in seen if isinstance(event, ConsoleLine)] == [
            "one", "", "two\N{REPLACEMENT CHARACTER}", "last words",
        ]  # fmt: skip
        assert names(seen)[-1] == "stopped"
        assert names(m.event_log) == ["started", "stopped"]


def test_lines_out_of_pieces() -> None:
    lines: list[str] = []
    splitter = LineSplitter(lines.append)
    for piece in (b"a", b"b\n", b"c\nd\ne", b""):
        splitter.write(piece)
    assert lines == ["ab", "c", "d"]
    splitter.end()
    splitter.end()
    assert lines[3:] == ["e"]


def test_a_line_without_an_end_does_not_grow() -> None:
    lines: list[str] = []
    splitter = LineSplitter(lines.append)
    for _ in range(3):
        splitter.write(b"x" * event_hub.LINE_LIMIT)
    assert lines == ["x" * event_hub.LINE_LIMIT] * 2


def test_nobody_makes_lines_unless_somebody_wants_them() -> None:
    hub = Hub()
    hub.subscribe(lambda event: None, (Paused,))
    hub.stream((Started, Stopped), False)
    assert hub.tail.on_write is None
    hub.stream((), False)
    assert hub.tail.on_write is not None
    assert hub.flushed == 0


# --- streams --------------------------------------------------------------------------------------


@needs_kvm
def test_async_for(machine: Make) -> None:
    async def watch() -> list[str]:
        seen = []
        with machine(tiny.prints(b"ready\n") + tiny.HALT) as m:
            stream = m.events()
            m.start()
            async for event in stream:
                seen.append(str(event))
                if isinstance(event, ConsoleLine):
                    await asyncio.to_thread(m.stop)
        return seen

    assert asyncio.run(watch()) == [
        "started",
        "console: ready",
        "stopped: stopped by the monitor (status 130)",
    ]


@needs_kvm
def test_a_stream_ends_with_a_machine_that_never_ran(machine: Make) -> None:
    with machine(tiny.HALT) as m:
        stream = m.events()
    assert list(stream) == []
    assert list(m.events()) == []
    assert m.event_log == []


@needs_kvm
def test_history_comes_first(machine: Make) -> None:
    with machine(tiny.SPIN) as m:
        m.start()
        m.pause()
        stream = m.events(Started, Stopped, history=True)
        m.stop()
        assert names(list(stream)) == ["started", "stopped"]
        assert names(list(m.events(history=True))) == ["started", "paused", "stopped"]
        assert list(m.events()) == []


def test_a_stream_without_the_end_among_its_kinds_still_ends() -> None:
    hub = Hub()
    stream = hub.stream((Paused,), False)
    hub.emit(Paused())
    hub.emit(Stopped(END))
    hub.emit(Paused("late"))
    assert names(list(stream)) == ["paused"]


def test_next_with_a_time_limit() -> None:
    hub = Hub()
    with hub.stream((), False) as stream:
        with pytest.raises(TimeoutError, match=r"no event within 0\.01 s"):
            stream.next(0.01)
        hub.emit(Paused())
        event = stream.next(60)
        assert isinstance(event, Paused)
    assert stream.next() is None
    hub.emit(Paused())
    assert list(stream) == []


def test_of_a_stream_nobody_reads_the_oldest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_hub, "STREAM_LIMIT", 3)
    hub = Hub()
    stream = hub.stream((), False)
    for number in range(5):
        hub.emit(DeviceError(str(number)))
    hub.close()
    assert [str(event) for event in stream] == [f"device error: {n}" for n in (2, 3, 4)]
    assert stream.dropped == 2


def test_a_cancelled_reader_loses_no_event() -> None:
    hub = Hub()

    async def read() -> list[str]:
        with hub.stream((), False) as stream:
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            hub.emit(Paused())
            threading.Thread(target=hub.emit, args=(Stopped(END),)).start()
            return [event.name async for event in stream]

    assert asyncio.run(read()) == ["paused", "stopped"]


def test_an_event_after_the_loop_is_closed_harms_nobody() -> None:
    hub = Hub()
    stream = hub.stream((), False)

    async def wait_a_little() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)

    asyncio.run(wait_a_little())
    hub.emit(Started())
    hub.close()
    assert names(list(stream)) == ["started"]


@needs_kvm
def test_a_panic_and_its_pause(machine: Make) -> None:
    with machine(tiny.PANIC + tiny.exits(4), on_panic="pause") as m:
        stream = m.events()
        m.start()
        assert [str(stream.next(60)) for _ in range(3)] == [
            "started",
            "panicked: panicked",
            "paused: the guest's kernel panicked",
        ]
        assert isinstance(m.event_log[1], events.Panicked)


@needs_kvm
def test_a_panic_that_was_only_printed(machine: Make) -> None:
    text = b"Kernel panic - not syncing: hm\n"
    with machine(tiny.prints(text) + tiny.RESET + tiny.HALT) as m:
        m.start()
        assert m.wait(60).kind == exits.PANIC
        assert [str(event) for event in m.event_log[1:]] == [
            "panicked: printed",
            "stopped: the guest's kernel panicked: Kernel panic - not syncing: hm (status 120)",
        ]


@needs_kvm
def test_a_machine_that_is_rolled_back_from_its_end_tells_of_its_next(machine: Make) -> None:
    with machine(tiny.prints(b"once\n") + tiny.exits(4)) as m:
        stopped: list[Event] = []
        m.subscribe(stopped.append, Stopped)
        m.checkpoint()
        for _ in range(2):
            stream = m.events()
            m.start() if m.state == "created" else m.resume()
            seen = names(list(stream))
            assert seen[0] in ("started", "resumed") and seen[1:] == ["console", "stopped"]
            assert m.wait(60).status == 4
            assert list(m.events()) == []
            m.rollback()
        assert len(stopped) == 2


@needs_kvm
def test_snapshots_and_going_back_are_told_between_pauses(machine: Make, tmp_path: Path) -> None:
    with machine(tiny.SPIN) as m:
        m.start()
        m.checkpoint()
        m.rollback()
        m.snapshot(str(tmp_path / "snap"))
        assert [str(event) for event in m.event_log[1:]] == [
            *("paused", "resumed"),
            *("paused", "rolled back", "resumed"),
            *("paused", f"snapshot: {tmp_path}/snap", "resumed"),
        ]


@needs_kvm
def test_what_is_no_listener_or_kind_is_told_at_once(machine: Make) -> None:
    with machine(tiny.HALT) as m:
        odd: tuple[Callable[[], object], ...] = (
            lambda: m.subscribe(5),  # type: ignore[arg-type]
            lambda: m.subscribe(print, 5),  # type: ignore[arg-type]
            lambda: m.events("started"),  # type: ignore[call-overload, no-any-return]
            lambda: m.events(int),  # type: ignore[type-var]
            lambda: m.emit(5),  # type: ignore[arg-type]
        )
        for call in odd:
            with pytest.raises(TypeError, match=r"subscribe|events|emit"):
                call()
        m.start()
        m.emit(Started())  # nobody was left behind who cannot be told
