"""vmm/virtio/limit.py: what a bucket lets through over time."""

from __future__ import annotations

import pytest

from vmm.errors import UsageError
from vmm.virtio.limit import Limit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(limit: Limit, clock: Clock, seconds: float, size: int) -> int:
    """Operations of `size` bytes that go through, asking whenever it says."""
    end, done = clock.now + seconds, 0
    while True:
        wait = limit.take(size)
        if not wait:
            done += 1
            assert done < 10_000_000
            continue
        if clock.now + wait > end:
            clock.now = end
            return done
        clock.now += wait


@pytest.mark.parametrize(("bytes", "ops", "size", "each_second"), [
    (1000, 0, 10, 100), (1 << 20, 0, 4096, 256), (0, 50, 4096, 50), (1000, 50, 10, 50),
    (1000, 500, 10, 100), (10, 0, 1000, 0.01), (0, 0.5, 1, 0.5), (1 << 30, 0, 1 << 20, 1024),
])  # fmt: skip
def test_the_rate_is_kept(bytes: float, ops: float, size: int, each_second: float) -> None:
    clock = Clock()
    limit = Limit(bytes=bytes, ops=ops, clock=clock)
    run(limit, clock, 1000 / each_second / 10, size)  # the burst
    done = run(limit, clock, 1000 / each_second, size)
    assert 980 <= done <= 1020


def test_a_burst_after_a_pause_and_no_more() -> None:
    clock = Clock()
    limit = Limit(bytes=100, burst_bytes=1000, clock=clock)
    assert [limit.take(100) for _ in range(10)] == [0.0] * 10
    assert limit.take(100) == pytest.approx(0.01)
    clock.now += 1000
    assert run(limit, clock, 0, 100) == 10


def test_one_larger_than_the_burst_goes_through_and_is_paid_for() -> None:
    clock = Clock()
    limit = Limit(bytes=100, burst_bytes=10, clock=clock)
    assert limit.take(1010) == 0
    wait = limit.take(1)
    assert wait == pytest.approx(10, rel=0.01)
    clock.now += wait / 2
    assert limit.take(1) == pytest.approx(wait / 2)
    clock.now += wait / 2
    assert limit.take(1) == 0


def test_without_limits_everything_goes() -> None:
    limit = Limit()
    assert not limit
    assert all(limit.take(1 << 40) == 0 for _ in range(1000))


def test_operations_without_bytes_pass_a_byte_limit() -> None:
    clock = Clock()
    limit = Limit(bytes=1, burst_bytes=1, clock=clock)
    assert limit.take(100) == 0
    assert limit.take(1) > 0
    assert limit.take(0) == 0  # a flush


def test_a_change_takes_effect_at_once() -> None:
    clock = Clock()
    limit = Limit(ops=1, clock=clock)
    assert run(limit, clock, 1, 1) == 2
    limit.change(ops=1000)
    assert limit.rates == (0, 1000)
    assert run(limit, clock, 1, 1) == pytest.approx(1100, abs=5)
    limit.change()
    assert not limit
    assert limit.take(1 << 60) == 0


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_senseless_rates(value: float) -> None:
    with pytest.raises(UsageError, match="a limit of"):
        Limit(bytes=value)
