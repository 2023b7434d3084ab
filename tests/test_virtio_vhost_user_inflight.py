"""vmm/virtio/vhost_user_inflight.py: a record that its back end may change as it likes."""

from __future__ import annotations

import os
import random

import pytest

from vmm.errors import HostError
from vmm.virtio.queue import QueueError
from vmm.virtio.vhost_user_inflight import DESCRIPTION, Inflight

SIZE = 16 + 16 * 16


def record(size: int = SIZE) -> tuple[int, Inflight]:
    fd = os.memfd_create("record")
    os.ftruncate(fd, size)
    return fd, Inflight(os.dup(fd), DESCRIPTION.pack(SIZE, 0, 1, 16))


def test_heads_are_in_their_order() -> None:
    fd, inflight = record()
    entries = {3: 9, 5: 7, 11: 8}
    data = (0).to_bytes(8, "little") + b"\1\0" + b"\x10\0" + b"\0\0" + b"\0\0"
    for head in range(16):
        taken = bytes([head in entries]) + bytes(7) + entries.get(head, 0).to_bytes(8, "little")
        data += taken
    os.pwrite(fd, data, 0)
    assert inflight.heads(0, 0) == [5, 11, 3]
    inflight.close()
    os.close(fd)


@pytest.mark.parametrize("size", [0, 15, 16, SIZE - 1])
def test_a_record_that_is_cut_short_is_an_error_and_no_signal(size: int) -> None:
    fd, inflight = record()
    os.pwrite(fd, b"\x10\0", 10)
    os.ftruncate(fd, size)
    with pytest.raises(QueueError, match="cut short"):
        inflight.heads(0, 0)
    inflight.close()
    os.close(fd)


def test_a_record_shorter_than_it_says() -> None:
    with pytest.raises(HostError, match="not as long as it says"):
        record(SIZE - 1)


def test_whatever_is_in_it() -> None:
    fd, inflight = record()
    chance = random.Random(1)
    for _ in range(500):
        os.pwrite(fd, chance.randbytes(SIZE), 0)
        assert all(0 <= head < 16 for head in inflight.heads(0, chance.getrandbits(16)))
    inflight.close()
    os.close(fd)
