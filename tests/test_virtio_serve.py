"""vmm/virtio/serve.py: a thread a queue, woken by an eventfd."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.virtio.device import VirtioDevice
from vmm.virtio.queue import Chain
from vmm.virtio.serve import QueueThread


class Worker(VirtioDevice):
    """Remembers which thread answered; fails where `error` is set."""

    ID = 61
    QUEUES = (16, 16)

    def __init__(self) -> None:
        super().__init__("worker")
        self.threads: list[str] = []
        self.error: BaseException | None = None

    def request(self, index: int, chain: Chain) -> int | None:
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        return chain.write(b"done")


def until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_each_queue_has_its_thread() -> None:
    device = Worker()
    failures: list[BaseException] = []
    with Driver(device) as driver:
        driver.transport.served = True
        threads = [
            QueueThread(device, index, fd, failures.append)
            for index, fd in enumerate(driver.transport.notify_fds)
        ]
        for count in range(1, 101):
            for index in (0, 1):
                driver.rings[index].add([(BUFFERS, 4, True)])
                driver.kick(index)
                until(driver.rings[index].used)
            assert len(device.threads) == 2 * count
        assert set(device.threads) == {"worker-q0", "worker-q1"}
        for thread in threads:
            thread.close()
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
        time.sleep(0.02)
        assert driver.rings[0].used() == []
        os.eventfd_write(driver.transport.notify_fds[0], 1)  # still open
    assert failures == []


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_what_escapes_is_told(error: BaseException) -> None:
    device = Worker()
    failures: list[BaseException] = []
    with Driver(device) as driver:
        driver.transport.served = True
        thread = QueueThread(device, 0, driver.transport.notify_fds[0], failures.append)
        device.error = error
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
        until(lambda: failures)
        thread.close()
    assert failures == [error]


def test_it_can_be_closed_from_itself() -> None:
    device = Worker()
    failures: list[BaseException] = []
    with Driver(device) as driver:
        driver.transport.served = True
        threads: list[QueueThread] = []
        answer = device.request

        def request(index: int, chain: Chain) -> int | None:
            threads[0].close()
            return answer(index, chain)

        device.request = request  # type: ignore[method-assign]
        threads.append(QueueThread(device, 0, driver.transport.notify_fds[0], failures.append))
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
        until(driver.rings[0].used)
        threads[0].close()
    assert failures == []
