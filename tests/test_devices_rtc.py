"""vmm.devices.rtc against the C library's calendar."""

from __future__ import annotations

import calendar
import datetime
import time

import pytest

from vmm.devices.rtc import Rtc, days_since_1970

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
