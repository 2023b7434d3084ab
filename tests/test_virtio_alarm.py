"""vmm/virtio/alarm.py: what is set is called, the earliest first, and not after the end."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from vmm.virtio.alarm import Alarm


def test_each_key_is_called_when_its_time_has_come() -> None:
    called: SimpleQueue[int] = SimpleQueue()
    alarm = Alarm("test", called.put, lambda err: None)
    alarm.set(1, 1000)
    alarm.set(2, 0.02)
    alarm.set(3, 0.01)
    alarm.set(1, 0.001)  # instead of the first
    assert {called.get(timeout=30) for _ in range(3)} == {1, 2, 3}
    alarm.set(4, 0)
    assert called.get(timeout=30) == 4
    alarm.set(5, 1000)
    alarm.clear()
    alarm.set(6, 0)
    assert called.get(timeout=30) == 6
    alarm.set(7, 1000)
    alarm.close()
    alarm.close()
    alarm.set(8, 0)
    assert called.empty()
    assert not [each for each in threading.enumerate() if each.name == "test"]


def test_the_earliest_is_called_first() -> None:
    alarm = Alarm("test", lambda key: None, lambda err: None)
    alarm._times = {1: -3.0, 2: -1.0, 3: -2.0}
    assert [alarm._next() for _ in range(3)] == [1, 3, 2]


def test_a_bug_is_told() -> None:
    told: SimpleQueue[BaseException] = SimpleQueue()

    def fail(key: int) -> None:
        raise ValueError(key)

    alarm = Alarm("test", fail, told.put)
    alarm.set(5, 0)
    with pytest.raises(ValueError, match="5"):
        raise told.get(timeout=30)
    alarm.close()


def test_it_can_be_closed_by_what_it_calls() -> None:
    done = threading.Event()

    def call(key: int) -> None:
        alarm.close()
        done.set()

    alarm = Alarm("test", call, lambda err: None)
    alarm.set(0, 0)
    assert done.wait(30)
