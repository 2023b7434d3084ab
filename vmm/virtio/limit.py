"""Rate limits: token buckets for operations and bytes, changeable at run time.

A bucket fills at `rate` tokens a second up to `burst`. What is asked for is granted while the
bucket is not empty, and may leave it in debt: a request larger than the burst is delayed, never
stuck.

    wait = limit.take(len(data))
    if wait:
        ...  # ask again in `wait` seconds; nothing was taken
"""

from __future__ import annotations

import time
from _thread import allocate_lock

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BURST_SECONDS = 0.1
"""A burst that is not given is what the rate yields in this time."""
TICK = 1e-6
"""The shortest wait, seconds: rounding must not ask for none at all."""


class TokenBucket:
    """Tokens at `rate` a second (0: no limit), at most `burst` (0: a tenth of a second's worth).

    Not locked; see `Limit`. Times are monotonic seconds.
    """

    __slots__ = ("burst", "rate", "tokens", "updated")

    def __init__(self, rate: float, burst: float = 0, now: float = 0.0) -> None:
        self.rate = rate
        self.burst = burst or max(rate * BURST_SECONDS, 1)
        self.tokens = self.burst
        self.updated = now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0: now."""
        if not self.rate:
            return 0.0
        self.tokens = min(self.burst, self.tokens + (now - self.updated) * self.rate)
        self.updated = now
        # One whole token: a bucket that is asked again and again must not yield at every fraction.
        need = min(1.0, self.burst)
        return 0.0 if self.tokens > need - TICK else max((need - self.tokens) / self.rate, TICK)


class Limit:
    """A limit of operations and bytes a second together; from any thread.

    Args:
        bytes: a second, 0 for no limit.
        ops: a second, 0 for no limit.
        burst_bytes, burst_ops: what may be taken at once after a pause; 0 for a tenth of a
            second's worth.
        clock: monotonic seconds.

    Attributes:
        active: whether anything is limited.
        on_change: called after each `change`: the device looks again at what waits.

    Raises:
        UsageError: a negative number.
    """

    __slots__ = ("_bytes", "_clock", "_lock", "_ops", "active", "on_change")

    def __init__(
        self,
        *,
        bytes: float = 0,
        ops: float = 0,
        burst_bytes: float = 0,
        burst_ops: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lock = allocate_lock()
        self.on_change: Callable[[], object] | None = None
        self.change(bytes=bytes, ops=ops, burst_bytes=burst_bytes, burst_ops=burst_ops)

    def change(
        self, *, bytes: float = 0, ops: float = 0, burst_bytes: float = 0, burst_ops: float = 0
    ) -> None:
        """Other limits from now on, with full buckets; what waits is looked at again."""
        for value in (bytes, ops, burst_bytes, burst_ops):
            if not 0 <= value < 1e18:
                raise UsageError(f"a limit of {value:g} a second is not from 0 (none) to 1e18")
        now = self._clock()
        with self._lock:
            self._bytes = TokenBucket(bytes, burst_bytes, now)
            self._ops = TokenBucket(ops, burst_ops, now)
            self.active = bool(bytes or ops)
        if self.on_change is not None:
            self.on_change()

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return self.active

    def ready(self) -> float:
        """Seconds until something of any size may be taken; 0.0: now."""
        with self._lock:
            now = self._clock()
            return max(self._bytes.wait(now), self._ops.wait(now))

    def spend(self, size: int, ops: int = 1) -> None:
        """Take `ops` operations of `size` bytes that have happened, whatever is there; negative:
        give them back."""
        with self._lock:
            self._bytes.tokens -= size
            self._ops.tokens -= ops

    def take(self, size: int = 0, ops: int = 1) -> float:
        """Take `ops` operations of `size` bytes in all: 0.0, or the seconds to wait first."""
        with self._lock:
            now = self._clock()
            wait = max(self._bytes.wait(now) if size else 0.0, self._ops.wait(now) if ops else 0.0)
            if not wait:
                self._bytes.tokens -= size
                self._ops.tokens -= ops
            return wait

    @property
    def rates(self) -> tuple[float, float]:
        """(bytes, ops) a second; 0 where there is no limit."""
        return self._bytes.rate, self._ops.rate
