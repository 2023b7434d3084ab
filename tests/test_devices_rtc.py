"""vmm.devices.rtc against the C library's calendar."""

from __future__ import annotations

import calendar
import datetime
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vmm.devices.rtc import PERIODIC_MAX, Rtc, days_since_1970

SECOND = 1_000_000_000


class Clock:
    """The host's time, held still."""

    def __init__(self, text: str) -> None:
        when = datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)
        self.now = int(when.timestamp()) * SECOND

    def __call__(self) -> int:
        return self.now


def peek(rtc: Rtc, index: int) -> int:
    rtc.write(0, 1, index)
    return rtc.read(1, 1)


def poke(rtc: Rtc, index: int, value: int) -> None:
    rtc.write(0, 1, index)
    rtc.write(1, 1, value)


def registers(rtc: Rtc) -> list[int]:
    """Century, year, month, day, hours, minutes, seconds, as the registers hold them."""
    return [peek(rtc, index) for index in (0x32, 9, 8, 7, 4, 2, 0)]


def test_bcd_is_the_default() -> None:
    rtc = Rtc(clock=Clock("2026-11-23T14:09:58"))
    assert registers(rtc) == [0x20, 0x26, 0x11, 0x23, 0x14, 0x09, 0x58]
    assert peek(rtc, 6) == 2, "a Monday; Sunday is 1"
    assert peek(rtc, 0x0B) == 0x02
    assert peek(rtc, 0x0D) == 0x80, "valid"


def test_binary_and_12_hours() -> None:
    rtc = Rtc(clock=Clock("2026-11-23T14:09:58"))
    poke(rtc, 0x0B, 0x06)
    assert registers(rtc) == [20, 26, 11, 23, 14, 9, 58]
    poke(rtc, 0x0B, 0x04)
    assert peek(rtc, 4) == 0x80 | 2
    poke(rtc, 0x0B, 0x00)
    assert peek(rtc, 4) == 0x80 | 0x02


@pytest.mark.parametrize(
    ("hour", "code"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_12_hour_codes_both_ways(hour: int, code: int) -> None:
    clock = Clock(f"2030-01-01T{hour:02}:00:00")
    rtc = Rtc(clock=clock)
    poke(rtc, 0x0B, 0x00)
    assert peek(rtc, 4) == code
    other = Rtc(clock=Clock("2030-01-01T05:00:00"))
    poke(other, 0x0B, 0x00)
    poke(other, 4, code)
    poke(other, 0x0B, 0x02)
    assert peek(other, 4) == hour // 10 << 4 | hour % 10


def test_the_hosts_time_by_default() -> None:
    rtc = Rtc()
    poke(rtc, 0x0B, 0x06)
    before = int(time.time())
    century, *rest = registers(rtc)
    shown = calendar.timegm((century * 100 + rest[0], *rest[1:]))
    # The registers may be read on both sides of a tick; a minute is not lost to that.
    assert abs(shown - before) <= 60


def test_time_goes_on_from_what_the_guest_sets() -> None:
    clock = Clock("2026-11-23T14:09:58")
    rtc = Rtc(clock=clock)
    poke(rtc, 0x0B, 0x82)
    for index, value in ((0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23)):
        poke(rtc, index, value)
    poke(rtc, 2, 0x59)
    poke(rtc, 0, 0x59)
    clock.now += 100 * SECOND
    assert registers(rtc) == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59], "stopped while SET"
    poke(rtc, 0x0B, 0x02)
    clock.now += SECOND
    assert registers(rtc) == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]
    other = Rtc(clock=clock)
    other.restore(rtc.save())
    assert registers(other) == registers(rtc)


def test_uip_announces_the_tick() -> None:
    clock = Clock("2026-11-23T14:09:58")
    rtc = Rtc(clock=clock)
    start = clock.now
    for after, uip in ((0, 0), (500_000_000, 0), (997_000_000, 0), (998_000_000, 0x80)):
        clock.now = start + after
        assert peek(rtc, 0x0A) == 0x26 | uip
    poke(rtc, 0x0B, 0x82)
    assert peek(rtc, 0x0A) == 0x26, "no updates while SET"


def test_a_guest_that_writes_nonsense_gets_some_time() -> None:
    rtc = Rtc(clock=Clock("2026-11-23T14:09:58"))
    for mode in (0x00, 0x02, 0x04, 0x06):
        poke(rtc, 0x0B, 0x80 | mode)
        for index in (0x32, 9, 8, 7, 6, 4, 2, 0):
            poke(rtc, index, 0xFF)
        poke(rtc, 0x0B, mode)
        assert all(0 <= value <= 255 for value in registers(rtc))


def test_cmos_bytes_keep_what_is_written() -> None:
    rtc = Rtc()
    poke(rtc, 0x0F, 0x0A)
    poke(rtc, 0x7F, 0x5A)
    assert (peek(rtc, 0x0F), peek(rtc, 0x7F)) == (0x0A, 0x5A)
    assert peek(rtc, 0xFF) == 0x5A, "bit 7 of the index is the NMI mask"
    poke(rtc, 0x0D, 0)
    assert (peek(rtc, 0x0C), peek(rtc, 0x0D)) == (0, 0x80)


@pytest.mark.parametrize(
    ("mib", "extended", "above16", "above4g"),
    [(0, 0, 0, 0), (16, 15 << 10, 0, 0), (256, 0xFFFF, 3840, 0), (5120, 0xFFFF, 48896, 32768)],
)
def test_memory_sizes(mib: int, extended: int, above16: int, above4g: int) -> None:
    rtc = Rtc(mib << 20)
    assert peek(rtc, 0x17) | peek(rtc, 0x18) << 8 == extended
    assert peek(rtc, 0x34) | peek(rtc, 0x35) << 8 == above16
    assert peek(rtc, 0x5B) | peek(rtc, 0x5C) << 8 | peek(rtc, 0x5D) << 16 == above4g


def test_days_agree_with_the_standard_library() -> None:
    epoch = datetime.date(1970, 1, 1)
    for days in range(-70 * 365, 8000 * 365, 11):
        date = epoch + datetime.timedelta(days)
        assert days_since_1970(date.year, date.month, date.day) == days


# --- interrupts -----------------------------------------------------------------------------------

A, B, C = 0x0A, 0x0B, 0x0C
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10


class Line:
    """An interrupt line: its level, and how often it rose."""

    def __init__(self) -> None:
        self.level = self.rises = 0
        self.changed = threading.Event()

    def __call__(self, level: int) -> None:
        assert level != self.level or not level, "called on a change of level only"
        self.level = level
        self.rises += level
        self.changed.set()

    def rose(self, seconds: float = 20.0) -> bool:
        """Whether the level is 1, at the latest in so long."""
        end = time.monotonic() + seconds
        while not self.level and time.monotonic() < end:
            self.changed.clear()
            self.changed.wait(0.05)
        return bool(self.level)


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def make(line: Line) -> Iterator[Callable[..., Rtc]]:
    """Makes clocks on `line`, and ends their threads."""
    made: list[Rtc] = []

    def rtc(**options: object) -> Rtc:
        made.append(Rtc(irq=line, **options))  # type: ignore[arg-type]
        return made[-1]

    yield rtc
    for each in made:
        each.close()


def alarm_at(rtc: Rtc, hours: int, minutes: int, seconds: int) -> None:
    for index, value in ((5, hours), (3, minutes), (1, seconds)):
        poke(rtc, index, value)


def test_flags_without_interrupts(make: Callable[..., Rtc], line: Line) -> None:
    """A guest that polls register C sees what has happened; reading clears it; no thread."""
    clock = Clock("2026-11-23T14:09:58")
    rtc = make(clock=clock)
    alarm_at(rtc, 0x14, 0x10, 0x00)
    poke(rtc, A, 0x20)  # no periodic rate
    assert peek(rtc, C) & IRQF == 0
    clock.now += SECOND // 2
    assert peek(rtc, C) == 0
    clock.now += SECOND // 2
    assert peek(rtc, C) == UF
    assert peek(rtc, C) == 0
    clock.now += 2 * SECOND
    assert peek(rtc, C) == UF | AF
    poke(rtc, A, 0x26)
    clock.now += SECOND // 1000 * 2
    assert peek(rtc, C) == PF
    assert (line.rises, rtc._thread) == (0, None)


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x14, 0x10, 0x00), 2),
        ((0x14, 0x09, 0x59), 1),
        ((0x14, 0x09, 0x58), 86400),
        ((0x14, 0x09, 0x57), 86399),
        ((0xFF, 0xFF, 0xFF), 1),
        ((0xC0, 0xFF, 0x00), 2),
        ((0xFF, 0x09, 0x00), 3542),
        ((0x13, 0xFF, 0xFF), 82202),
        ((0x00, 0x00, 0x00), 35402),
        ((0x24, 0x00, 0x00), None),
        ((0xBF, 0xBF, 0xBF), None),
    ],
)
def test_alarms(make: Callable[..., Rtc], alarm: tuple[int, int, int], seconds: int | None) -> None:
    clock = Clock("2026-11-23T14:09:58")
    rtc = make(clock=clock)
    alarm_at(rtc, *alarm)
    peek(rtc, C)
    for wait in (seconds,) if seconds is not None else (86400, 86400 * 3):
        clock.now += (wait - 1) * SECOND
        assert not peek(rtc, C) & AF
        clock.now += SECOND
        assert bool(peek(rtc, C) & AF) == (seconds is not None)


def test_alarms_in_binary_and_12_hours(make: Callable[..., Rtc]) -> None:
    clock = Clock("2026-11-23T14:09:58")
    rtc = make(clock=clock)
    poke(rtc, B, BINARY)
    alarm_at(rtc, 0x80 | 2, 10, 0)
    peek(rtc, C)
    clock.now += 2 * SECOND
    assert peek(rtc, C) & AF
    alarm_at(rtc, 2, 10, 0)  # in the morning
    clock.now += 43200 * SECOND - SECOND
    assert not peek(rtc, C) & AF
    clock.now += SECOND
    assert peek(rtc, C) & AF


def test_a_clock_that_is_set_holds_still_and_disables_updates(make: Callable[..., Rtc]) -> None:
    clock = Clock("2026-11-23T14:09:58")
    rtc = make(clock=clock, running=lambda: False)
    poke(rtc, B, SET | UIE | H24)
    assert peek(rtc, B) == SET | H24
    peek(rtc, C)
    clock.now += 5 * SECOND
    assert not peek(rtc, C) & (UF | AF)


def test_updates_raise_the_line_once_until_register_c_is_read(
    make: Callable[..., Rtc], line: Line
) -> None:
    rtc = make()
    poke(rtc, B, UIE | H24)
    for count in (1, 2):
        assert line.rose()
        time.sleep(1.2)
        assert line.rises == count, "a second tick, not read"
        assert peek(rtc, C) & (IRQF | UF) == IRQF | UF
        assert line.level == 0
    poke(rtc, B, H24)
    time.sleep(1.2)
    assert line.rises == 2


def test_an_alarm_raises_the_line(make: Callable[..., Rtc], line: Line) -> None:
    rtc = make()
    poke(rtc, B, BINARY | H24)
    when = time.gmtime(time.time() + 2)
    alarm_at(rtc, when.tm_hour, when.tm_min, when.tm_sec)
    peek(rtc, C)
    poke(rtc, B, AIE | BINARY | H24)
    assert line.rose()
    assert time.time() >= calendar.timegm(when) - 0.01
    assert peek(rtc, C) & (IRQF | AF) == IRQF | AF


@pytest.mark.parametrize("rate", [1, 2, 3, 6, 12])
def test_periodic_interrupts_come_and_are_bounded(
    make: Callable[..., Rtc], line: Line, rate: int
) -> None:
    rtc = make()
    poke(rtc, A, 0x20 | rate)
    poke(rtc, B, PIE | H24)
    start = time.monotonic()
    while time.monotonic() - start < 0.1:
        if line.rose(5):
            peek(rtc, C)
    took = time.monotonic() - start
    assert 1 <= line.rises <= took * PERIODIC_MAX + 2


def test_a_flag_that_is_set_raises_the_line_when_its_interrupt_is_enabled(
    make: Callable[..., Rtc], line: Line
) -> None:
    clock = Clock("2026-11-23T14:09:58")
    rtc = make(clock=clock)
    clock.now += SECOND
    poke(rtc, B, UIE | H24)
    assert line.level == 1
    poke(rtc, B, H24)
    assert line.level == 0


def test_the_line_stays_while_the_guest_does_not_run(make: Callable[..., Rtc], line: Line) -> None:
    runs = [True]
    rtc = make(running=lambda: runs[0])
    poke(rtc, B, UIE | H24)
    assert line.rose()
    runs[0] = False
    peek(rtc, C)
    time.sleep(1.3)
    assert line.rises == 1
    runs[0] = True
    rtc.resumed()
    assert line.rose()


def test_interrupts_are_part_of_the_state(make: Callable[..., Rtc], line: Line) -> None:
    clock = Clock("2026-11-23T14:09:58")
    rtc = make(clock=clock, running=lambda: False)
    alarm_at(rtc, 0x14, 0x10, 0x00)
    peek(rtc, C)
    poke(rtc, B, AIE | H24)
    before = rtc.save()
    clock.now += 5 * SECOND  # the alarm passes
    rung = rtc.save()
    for state in (before, rung):
        other_line = Line()
        other = Rtc(clock=clock, irq=other_line)
        other.restore(state)
        assert other_line.rises == 0
        other.resumed()
        assert other_line.level == 1
        assert peek(other, C) & (IRQF | AF) == IRQF | AF
        other.close()
    for hostile in (
        {**rung, "flags": -1, "looked": -1},
        {**rung, "flags": 1 << 70, "looked": 1 << 70},
        {key: value for key, value in rung.items() if key in ("index", "offset", "cmos")},
    ):
        other = Rtc(clock=clock)
        other.restore(hostile)
        other.resumed()
        peek(other, C)
        other.close()


def test_its_thread_ends(make: Callable[..., Rtc]) -> None:
    rtc = make()
    poke(rtc, B, UIE | H24)
    thread = rtc._thread
    assert thread is not None and thread.is_alive()
    rtc.close()
    rtc.close()
    assert not thread.is_alive()
    poke(rtc, B, UIE | AIE | H24)
