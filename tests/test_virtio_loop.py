"""vmm/virtio/loop.py: devices on an asyncio loop in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.virtio.device import VirtioDevice
from vmm.virtio.loop import DeviceLoop
from vmm.virtio.queue import Chain


class OnLoop(VirtioDevice):
    """Answers a request at once, or (queue 1) when a pipe of the host's has something to read."""

    ID = 60
    QUEUES = (16, 16)
    ON_LOOP = True

    def __init__(self) -> None:
        super().__init__("on-loop")
        self.error: Exception | None = None
        self.threads: set[str] = set()
        self.waiting: list[Chain] = []
        self.readable, self.writable = os.pipe()

    def loop_running(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_reader(self.readable, self._ready)

    def _ready(self) -> None:
        data = os.read(self.readable, 100)
        queue = self.slots[1].queue
        assert queue is not None
        self.finish(1, queue, self.waiting[0], self.waiting.pop(0).write(data))

    def request(self, index: int, chain: Chain) -> int | None:
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        if index:
            self.waiting.append(chain)
            return None
        return chain.write(b"done")

    def close(self) -> None:
        for fd in (self.readable, self.writable):
            os.close(fd)
        self.readable = self.writable = -1


@pytest.fixture
def failures() -> list[BaseException]:
    return []


@pytest.fixture
def loop(failures: list[BaseException]) -> Iterator[DeviceLoop]:
    loop = DeviceLoop(failures.append)
    yield loop
    loop.close()


def until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def serve(loop: DeviceLoop, driver: Driver) -> OnLoop:
    device = driver.device
    assert isinstance(device, OnLoop)
    loop.call(lambda: device.loop_running(loop.loop))
    for index, fd in enumerate(driver.transport.notify_fds):
        loop.serve(device, index, fd)
    driver.transport.served = True
    return device


def test_queues_and_the_hosts_descriptors(loop: DeviceLoop, failures: list[BaseException]) -> None:
    with Driver(OnLoop()) as driver:
        device = serve(loop, driver)
        for _ in range(50):
            driver.rings[0].add([(BUFFERS, 4, True)])
            driver.rings[1].add([(BUFFERS + 64, 100, True)])
            driver.kick(0)
            driver.kick(1)
            until(driver.rings[0].used)
            until(lambda: device.waiting)
            os.write(device.writable, b"from the host")
            until(driver.rings[1].used)
            assert driver.memory.read(BUFFERS + 64, 13) == b"from the host"
        assert device.threads == {"devices"}
        loop.close()
    assert failures == []


def test_what_escapes_is_told(loop: DeviceLoop, failures: list[BaseException]) -> None:
    with Driver(OnLoop()) as driver:
        device = serve(loop, driver)
        device.error = RuntimeError("bug")
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
        until(lambda: failures)
        assert failures == [device.error]
        device.error = None  # the loop goes on
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
        until(driver.rings[0].used)
        loop.close()


def test_a_task_that_fails_is_told(loop: DeviceLoop, failures: list[BaseException]) -> None:
    def fail() -> None:
        raise ValueError("bug")

    loop.call(fail)
    until(lambda: failures)
    assert [str(err) for err in failures] == ["bug"]


def test_closing_cancels_what_is_left(failures: list[BaseException]) -> None:
    loop, ended, started = DeviceLoop(failures.append), [], threading.Event()

    async def wait() -> None:
        started.set()
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(True)

    tasks: list[asyncio.Task[None]] = []
    loop.call(lambda: tasks.append(loop.loop.create_task(wait())))
    assert started.wait(20)
    loop.close()
    loop.close()
    assert ended == [True]
    assert tasks[0].cancelled()
    assert failures == []
