"""What a vhost-user back end has taken and not given back (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD).

It keeps that in memory shared with us, so that it is known when the back end has died: another one
is given it, or the requests are failed one by one. (QEMU, docs/interop/vhost-user.rst, "Inflight
I/O tracking"; split rings.)
"""

from __future__ import annotations

import os
import struct

from vmm.errors import HostError
from vmm.virtio.queue import QueueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory
    from vmm.virtio.device import QueueSlot

DESCRIPTION = struct.Struct("<QQHH4x")
"""mmap size, mmap offset, num queues, queue size."""
_QUEUE = struct.Struct("<QHHHH")
"""struct QueueRegionSplit: features, version, desc_num, last_batch_head, used_idx."""
_DESC = struct.Struct("<B5xHQ")
"""struct DescStateSplit: inflight, next, counter."""


class Inflight:
    """The back end's record.

    Args:
        fd: of the shared memory; ours from now on.
        description: what the back end said of it (DESCRIPTION).

    Raises:
        HostError: it cannot be what it is said to be.
    """

    def __init__(self, fd: int, description: bytes) -> None:
        self.fd = fd
        self.description = description
        self.size, self.offset, self.queues, _ = DESCRIPTION.unpack(description)
        if not self.size or not self.queues or self.offset + self.size > os.fstat(fd).st_size:
            os.close(fd)
            raise HostError("the back end's record of requests is not as long as it says")

    def heads(self, index: int, used: int) -> list[int]:
        """The heads of chains queue `index` has taken, in that order; `used` is its used index.

        The record is read, not mapped: the back end may have cut its file short, and an access
        beyond the end would be SIGBUS. Raises QueueError: it cannot be read.
        """
        share = self.size // self.queues
        at = self.offset + index * share
        _, _, count, last, recorded = _QUEUE.unpack(self._read(at, _QUEUE.size))
        count = max(min(count, (share - _QUEUE.size) // _DESC.size), 0)
        entries = self._read(at + _QUEUE.size, count * _DESC.size)
        found = []
        for head, (taken, _, counter) in enumerate(_DESC.iter_unpack(entries)):
            # It died after it gave the last one back, and before it had noted that.
            if taken and not (head == last and recorded != used):
                found.append((counter, head))
        return [head for _, head in sorted(found)]

    def _read(self, at: int, size: int) -> bytes:
        try:
            data = os.pread(self.fd, size, at)
        except (OSError, OverflowError):
            data = b""
        if len(data) < size:
            raise QueueError("the back end's record of requests has been cut short")
        return data

    def close(self) -> None:
        """Harmless twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def used_index(memory: GuestMemory, slot: QueueSlot) -> int:
    """How many chains a split queue has given back, modulo 2**16: what the driver sees."""
    return memory.read_u16(slot.device + 2)
