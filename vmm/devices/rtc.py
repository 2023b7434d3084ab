"""MC146818 real-time clock and CMOS memory, ports 0x70 (index) and 0x71 (data).

The clock shows the host's time in UTC, plus what the guest set it off by. Sources: Motorola
MC146818A data sheet (registers A to D, UIP, interrupts); the usual PC layout of the other CMOS
bytes (century at 0x32, memory sizes at 0x15, 0x17, 0x30, 0x34 and 0x5b).

Flags of register C are worked out when they are looked at, so a guest that enables no interrupt
costs nothing. Where one is enabled, a thread waits for the next event that raises the line; after
that it waits until the guest reads register C, as a real one raises its line no second time. A
periodic interrupt comes at PERIODIC_MAX a second at most, however fast the rate.
"""

from __future__ import annotations

import threading
import time
from _thread import allocate_lock

from vmm.devices.device import ByteDevice, no_irq, state_bytes, state_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.devices.device import IrqLine
    from vmm.shapes import Shape

SECONDS = 0x00
SECONDS_ALARM = 0x01
MINUTES = 0x02
MINUTES_ALARM = 0x03
HOURS = 0x04
HOURS_ALARM = 0x05
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
A_RATE = 0x0F
B_SET = 0x80
B_UIE = 0x10
B_DM = 0x04
B_24H = 0x02
C_IRQF = 0x80
C_PF, C_AF, C_UF = 0x40, 0x20, 0x10
INTERRUPTS = C_PF | C_AF | C_UF
"""Flags in register C; the bits that enable their interrupts are at the same places in B."""
D_VRT = 0x80
HOURS_PM = 0x80
ANY = 0xC0
"""An alarm register with these bits matches every value."""
SECOND_NS = 1_000_000_000
PERIODIC_MAX = 1024
"""Periodic interrupts a second; the fastest rate would be 8,192."""
LOOK_NS = 10 * SECOND_NS
"""The thread looks at the host's clock at least so often: somebody may set it."""

UPDATE_NS = 244_000 + 1_984_000
"""UIP reads 1 this long before the seconds change: 244 us of warning, 1984 us of update."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


class Rtc(ByteDevice):
    """Two ports.

    Args:
        memory: the guest's memory in bytes, for the size fields.
        clock: gives nanoseconds since 1970 in UTC.
        irq: the interrupt line.
        running: whether the guest runs: while it does not, the line stays as it is.
    """

    LENGTH = 2

    def __init__(
        self,
        memory: int = 0,
        clock: Callable[[], int] = time.time_ns,
        name: str = "rtc",
        irq: IrqLine = no_irq,
        running: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(name)
        self._clock = clock
        self._irq = irq
        self._running = running
        self._lock = allocate_lock()
        self._flags = 0  # register C without IRQF
        self._looked = clock()  # until when the flags are worked out
        self._level = 0
        self._changed: threading.Condition | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
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
                return self._take_flags()
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
                self._look()
                self._cmos[REG_A] = value & ~A_UIP
                self._wake()
            elif index == REG_B:
                self._write_b(value)
            elif index in TIME_REGISTERS:
                if not self._cmos[REG_B] & B_SET:
                    self._show()
                self._cmos[index] = value
                if not self._cmos[REG_B] & B_SET:
                    self._take()
            elif index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
                self._look()
                self._cmos[index] = value
                self._wake()
            elif index not in (REG_C, REG_D):
                self._cmos[index] = value

    def jump(self, seconds: int) -> None:
        """Have the clock go so far ahead, or back."""
        with self._lock:
            self._look()
            self._offset = max(-MAX_OFFSET, min(MAX_OFFSET, self._offset + seconds))
            self._wake()

    def _write_b(self, value: int) -> None:
        """SET stops the clock for a new time to be written; clearing it starts it from there."""
        was = self._cmos[REG_B]
        self._look()
        if value & B_SET:
            value &= ~B_UIE
            if not was & B_SET:
                self._show()
        self._cmos[REG_B] = value
        if was & B_SET and not value & B_SET:
            self._take()
        self._set_line()
        self._wake()

    # --- interrupts (the lock is held) ------------------------------------------------------------

    def _look(self) -> None:
        """Set the flags of what has happened since they were worked out."""
        last, now = self._looked, self._clock()
        self._looked = now
        if now <= last:  # the host's clock was set back
            return
        period = self._period()
        if period and now // period != last // period:
            self._flags |= C_PF
        if self._cmos[REG_B] & B_SET:
            return
        if now // SECOND_NS != last // SECOND_NS:
            self._flags |= C_UF
            alarm = self._next_alarm(last // SECOND_NS + self._offset + 1)
            if alarm is not None and alarm <= now // SECOND_NS + self._offset:
                self._flags |= C_AF

    def _take_flags(self) -> int:
        """Read register C, which clears it and lowers the line."""
        self._look()
        flags = self._flags
        pending = flags & self._cmos[REG_B] & INTERRUPTS
        self._flags = 0
        self._set_line()
        self._wake()
        return flags | (C_IRQF if pending else 0)

    def _set_line(self) -> None:
        level = int(bool(self._flags & self._cmos[REG_B] & INTERRUPTS))
        if level != self._level:
            self._level = level
            self._irq(level)

    def _period(self) -> int:
        """Nanoseconds between two periodic interrupts; 0 for none."""
        rate = self._cmos[REG_A] & A_RATE
        if not rate:
            return 0
        hertz = 32768 >> ((rate if rate > 2 else rate + 7) - 1)
        return SECOND_NS // min(hertz, PERIODIC_MAX)

    def _next_alarm(self, start: int) -> int | None:
        """The first second from `start` on, by the guest's clock, that the alarm is set for."""
        clock = divmod(start % 86400 // 60, 60)
        hour, minute, second = *clock, start % 60
        hours = self._alarm_values(HOURS_ALARM, 24)
        minutes = self._alarm_values(MINUTES_ALARM, 60)
        seconds = self._alarm_values(SECONDS_ALARM, 60)
        if not (hours and minutes and seconds):
            return None
        midnight = start - start % 86400
        for h in (h for h in hours if h >= hour):
            for m in minutes if h > hour else (m for m in minutes if m >= minute):
                later = (h, m) > (hour, minute)
                for s in seconds if later else (s for s in seconds if s >= second):
                    return midnight + h * 3600 + m * 60 + s
        return midnight + 86400 + hours[0] * 3600 + minutes[0] * 60 + seconds[0]

    def _alarm_values(self, index: int, count: int) -> Sequence[int]:
        """The values an alarm register matches, in order; none where it holds no such number."""
        code = self._cmos[index]
        if code & ANY == ANY:
            return range(count)
        value = self._hour(code) if index == HOURS_ALARM else self._number(code)
        return (value,) if value < count else ()

    def _due(self) -> int | None:
        """When the next event comes that raises the line, by the host's clock; None for never."""
        enabled = self._cmos[REG_B] & INTERRUPTS & ~self._flags
        if self._level or not enabled:
            return None
        now, times = self._looked, []
        period = self._period()
        if enabled & C_PF and period:
            times.append((now // period + 1) * period)
        if not self._cmos[REG_B] & B_SET:
            if enabled & C_UF:
                times.append((now // SECOND_NS + 1) * SECOND_NS)
            if enabled & C_AF:
                alarm = self._next_alarm(now // SECOND_NS + self._offset + 1)
                if alarm is not None:
                    times.append((alarm - self._offset) * SECOND_NS)
        return min(times, default=None)

    def _wake(self) -> None:
        """Have the thread look at what it waits for; it starts when it first has something to."""
        if self._changed is not None:
            self._changed.notify()
        elif self._cmos[REG_B] & INTERRUPTS and not self._closed and self._running():
            self._changed = threading.Condition(self._lock)
            self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)
            self._thread.start()

    def _main(self) -> None:
        assert self._changed is not None
        with self._changed:
            while not self._closed:
                due = self._due() if self._running() else None
                if due is None:
                    self._changed.wait()
                    continue
                now = self._clock()
                if now < due:
                    self._changed.wait(min(due - now, LOOK_NS) / SECOND_NS)
                if self._running() and not self._closed:
                    self._look()
                    self._set_line()

    def resumed(self) -> None:
        """The guest goes on after a pause, or after its state was restored."""
        with self._lock:
            self._look()
            if self._level or self._flags & self._cmos[REG_B] & INTERRUPTS:
                # A restored interrupt controller may not know of the line: let it see an edge.
                self._level = 0
                self._irq(0)
            self._set_line()
            self._wake()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._changed is not None:
                self._changed.notify()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # --- the clock --------------------------------------------------------------------------------

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
        self._look()
        year = self._decode(CENTURY, 19, 99) * 100 + self._decode(YEAR, 0, 99)
        days = days_since_1970(year, self._decode(MONTH, 1, 12), self._decode(DAY, 1, 31))
        seconds = self._decode_hour() * 3600
        seconds += self._decode(MINUTES, 0, 59) * 60 + self._decode(SECONDS, 0, 59)
        self._offset = days * 86400 + seconds - self._clock() // SECOND_NS
        self._wake()

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
        return self._hour(code)

    def _hour(self, code: int) -> int:
        """The hour, 0 to 23, in an hours register's code; more where it is none."""
        if self._cmos[REG_B] & B_24H:
            return self._number(code)
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
            self._look()
            return {
                "index": self._index,
                "offset": self._offset,
                "cmos": bytes(self._cmos),
                "flags": self._flags,
                "looked": self._looked,
            }

    def shape(self) -> Shape:
        from vmm.shapes import U8, Data, Table, Whole

        return Table(
            {
                "index": Whole(0, 0x7F),
                "offset": Whole(-MAX_OFFSET, MAX_OFFSET),
                "cmos": Data(128),
            },
            {"flags": Whole(0, U8), "looked": Whole(0, (1 << 63) - 1)},
            lambda state: "" if ("flags" in state) == ("looked" in state) else "half a clock",
        )

    def restore(self, state: dict[str, object]) -> None:
        with self._lock:
            self._index = state_int(state, "index", 0x7F)
            offset = state_int(state, "offset", -1)
            self._offset = max(-MAX_OFFSET, min(MAX_OFFSET, offset))
            self._cmos = bytearray(state_bytes(state, "cmos")[:128].ljust(128, b"\0"))
            self._flags, self._looked = 0, self._clock()
            if "flags" in state:  # not in snapshots of versions before interrupts
                self._flags = state_int(state, "flags", INTERRUPTS)
                self._looked = state_int(state, "looked", (1 << 63) - 1)


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
