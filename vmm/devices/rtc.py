"""MC146818 real-time clock and CMOS memory, ports 0x70 (index) and 0x71 (data).

The clock shows the host's time in UTC, plus what the guest set it off by. Alarm and rate
registers keep what is written; no interrupt is raised. Sources: Motorola MC146818A data sheet
(registers A to D, UIP); the usual PC layout of the other CMOS bytes (century at 0x32, memory
sizes at 0x15, 0x17, 0x30, 0x34 and 0x5b).
"""

from __future__ import annotations

import time
from _thread import allocate_lock

from vmm.devices.device import ByteDevice, state_bytes, state_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 0x00
MINUTES = 0x02
HOURS = 0x04
WEEKDAY = 0x06
DAY = 0x07
MONTH = 0x08
YEAR = 0x09
REG_A = 0x0A
REG_B = 0x0B
REG_C = 0x0C
REG_D = 0x0D
CENTURY = 0x32
TIME_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

A_UIP = 0x80
A_DEFAULT = 0x26
"""A 32,768 Hz time base, 1,024 Hz periodic rate: what firmware leaves."""
B_SET = 0x80
B_DM = 0x04
B_24H = 0x02
D_VRT = 0x80
HOURS_PM = 0x80

UPDATE_NS = 244_000 + 1_984_000
"""UIP reads 1 this long before the seconds change: 244 us of warning, 1984 us of update."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


class Rtc(ByteDevice):
    """Two ports. `memory` is the guest's memory in bytes, for the size fields; `clock` gives
    nanoseconds since 1970 in UTC."""

    LENGTH = 2

    def __init__(
        self, memory: int = 0, clock: Callable[[], int] = time.time_ns, name: str = "rtc"
    ) -> None:
        super().__init__(name)
        self._clock = clock
        self._lock = allocate_lock()
        self._index = 0
        self._offset = 0  # seconds the guest's clock is ahead of the host's
        self._cmos = bytearray(128)
        self._cmos[REG_A] = A_DEFAULT
        self._cmos[REG_B] = B_24H
        self._store_memory(memory)

    def read8(self, offset: int) -> int:
        if offset == 0:
            return 0xFF  # the index register cannot be read back
        with self._lock:
            index = self._index
            if index == REG_A:
                return self._cmos[REG_A] | (A_UIP if self._updating() else 0)
            if index == REG_C:
                return 0
            if index == REG_D:
                return D_VRT
            if index in TIME_REGISTERS and not self._cmos[REG_B] & B_SET:
                self._show()
            return self._cmos[index]

    def write8(self, offset: int, value: int) -> None:
        with self._lock:
            index = self._index
            if offset == 0:
                self._index = value & 0x7F  # bit 7 masks the NMI on a PC
            elif index == REG_A:
                self._cmos[REG_A] = value & ~A_UIP
            elif index == REG_B:
                self._write_b(value)
            elif index in TIME_REGISTERS:
                if not self._cmos[REG_B] & B_SET:
                    self._show()
                self._cmos[index] = value
                if not self._cmos[REG_B] & B_SET:
                    self._take()
            elif index not in (REG_C, REG_D):
                self._cmos[index] = value

    def jump(self, seconds: int) -> None:
        """Have the clock go so far ahead, or back."""
        with self._lock:
            self._offset = max(-MAX_OFFSET, min(MAX_OFFSET, self._offset + seconds))

    def _write_b(self, value: int) -> None:
        """SET stops the clock for a new time to be written; clearing it starts it from there."""
        was = self._cmos[REG_B]
        if value & B_SET and not was & B_SET:
            self._show()
        self._cmos[REG_B] = value
        if was & B_SET and not value & B_SET:
            self._take()

    def _now(self) -> int:
        """The guest's time, in seconds since 1970."""
        return self._clock() // 1_000_000_000 + self._offset

    def _updating(self) -> bool:
        if self._cmos[REG_B] & B_SET:
            return False
        return self._clock() % 1_000_000_000 >= 1_000_000_000 - UPDATE_NS

    def _show(self) -> None:
        """Put the present time into the time registers."""
        year, month, day, hour, minute, second, weekday = time.gmtime(self._now())[:7]
        self._cmos[SECONDS] = self._code(second)
        self._cmos[MINUTES] = self._code(minute)
        self._cmos[HOURS] = self._code_hour(hour)
        self._cmos[WEEKDAY] = self._code((weekday + 1) % 7 + 1)  # Sunday is 1
        self._cmos[DAY] = self._code(day)
        self._cmos[MONTH] = self._code(month)
        self._cmos[YEAR] = self._code(year % 100)
        self._cmos[CENTURY] = self._code(year // 100)

    def _take(self) -> None:
        """Let the clock go on from what the time registers hold."""
        year = self._decode(CENTURY, 19, 99) * 100 + self._decode(YEAR, 0, 99)
        days = days_since_1970(year, self._decode(MONTH, 1, 12), self._decode(DAY, 1, 31))
        seconds = self._decode_hour() * 3600
        seconds += self._decode(MINUTES, 0, 59) * 60 + self._decode(SECONDS, 0, 59)
        self._offset = days * 86400 + seconds - self._clock() // 1_000_000_000

    def _code(self, value: int) -> int:
        return value if self._cmos[REG_B] & B_DM else value // 10 << 4 | value % 10

    def _code_hour(self, hour: int) -> int:
        if self._cmos[REG_B] & B_24H:
            return self._code(hour)
        return self._code((hour + 11) % 12 + 1) | (HOURS_PM if hour >= 12 else 0)

    def _decode(self, index: int, low: int, high: int) -> int:
        return max(low, min(high, self._number(self._cmos[index])))

    def _number(self, code: int) -> int:
        return code if self._cmos[REG_B] & B_DM else (code >> 4) * 10 + (code & 0x0F)

    def _decode_hour(self) -> int:
        if self._cmos[REG_B] & B_24H:
            return self._decode(HOURS, 0, 23)
        code = self._cmos[HOURS]
        hour = self._number(code & ~HOURS_PM) % 12
        return hour + 12 if code & HOURS_PM else hour

    def _store_memory(self, memory: int) -> None:
        """Base memory and extended memory in KiB, from 16 MiB in 64 KiB, from 4 GiB likewise."""
        low = min(memory, 3 * GIB)
        extended = min(max(low - MIB, 0) // KIB, 0xFFFF)
        self._put(0x15, min(memory // KIB, 640))
        self._put(0x17, extended)
        self._put(0x30, extended)
        self._put(0x34, min(max(low - 16 * MIB, 0) // (64 * KIB), 0xFFFF))
        high = (memory - low) // (64 * KIB)
        self._cmos[0x5B:0x5E] = min(high, 0xFFFFFF).to_bytes(3, "little")

    def _put(self, index: int, value: int) -> None:
        self._cmos[index : index + 2] = value.to_bytes(2, "little")

    def save(self) -> dict[str, object]:
        with self._lock:
            return {"index": self._index, "offset": self._offset, "cmos": bytes(self._cmos)}

    def restore(self, state: dict[str, object]) -> None:
        with self._lock:
            self._index = state_int(state, "index", 0x7F)
            offset = state_int(state, "offset", -1)
            self._offset = max(-MAX_OFFSET, min(MAX_OFFSET, offset))
            self._cmos = bytearray(state_bytes(state, "cmos")[:128].ljust(128, b"\0"))


MAX_OFFSET = 1 << 38
"""Seconds; the years 1900 to 9999 that the registers can tell are within it."""


def days_since_1970(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 to a date of the Gregorian calendar; a day past the end of its month
    runs on into the next. (`calendar.timegm` would load a dozen modules for this.)"""
    if month <= 2:  # count years from March, so that the leap day is the last
        year -= 1
        month += 12
    days = 365 * year + year // 4 - year // 100 + year // 400
    return days + (153 * (month - 3) + 2) // 5 + day - 1 - 719468
