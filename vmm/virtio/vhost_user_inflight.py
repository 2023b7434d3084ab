"""What a vhost-user back end has taken and not given back (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD).

It keeps that in memory shared with us, so that it is known when the back end has died: another one
is given it, or the requests are failed one by one. (QEMU, docs/interop/vhost-user.rst, "Inflight
I/O tracking"; split rings.)
"""

from __future__ import annotations

import mmap
import os
import struct

from vmm.errors import HostError

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
        """The heads of chains queue `index` has taken, in that order; `used` is its used index."""
        share = self.size // self.queues
        with mmap.mmap(self.fd, self.offset + self.size) as memory:
            at = self.offset + index * share
            _, _, count, last, recorded = _QUEUE.unpack_from(memory, at)
            count = min(count, (share - _QUEUE.size) // _DESC.size)
            found = []
            for head in range(count):
                taken, _, counter = _DESC.unpack_from(memory, at + _QUEUE.size + head * _DESC.size)
                # It died after it gave the last one back, and before it had noted that.
                if taken and not (head == last and recorded != used):
                    found.append((counter, head))
        return [head for _, head in sorted(found)]

    def close(self) -> None:
        """Harmless twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def used_index(memory: GuestMemory, slot: QueueSlot) -> int:
    """How many chains a split queue has given back, modulo 2**16: what the driver sees."""
    return memory.read_u16(slot.device + 2)
