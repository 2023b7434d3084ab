"""The ring of coalesced writes (struct kvm_coalesced_mmio_ring): writes that did not exit.

A VM has one ring, mapped with each vCPU at page KVM_CHECK_EXTENSION(KVM_CAP_COALESCED_MMIO). The
kernel appends at `last` and exits instead when the ring is full; user space takes at `first`.
Whatever handles an exit must empty the ring before, or writes would overtake each other.
"""

from __future__ import annotations

import struct
from _thread import allocate_lock

from vmm.kvm import constants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.kvm.vcpu import Vcpu

_PAGE = 4096
_ENTRY = struct.Struct("<QII8s")
_HEAD = struct.Struct("<II")
RING_MAX = (_PAGE - _HEAD.size) // _ENTRY.size


class CoalescedRing:
    """Empties the ring into `sink(addr, data, pio)`, in the order of the guest's writes.

    Any thread may call `drain`, which does nothing once the ring is closed; the sink runs under
    the ring's lock.
    """

    __slots__ = ("_closed", "_heads", "_lock", "_page", "_sink")

    def __init__(self, vcpu: Vcpu, sink: Callable[[int, bytes, bool], None]) -> None:
        offset = vcpu.vm.check_extension(constants.CAP_COALESCED_MMIO) * _PAGE
        self._page = memoryview(vcpu.run_map)[offset : offset + _PAGE]
        self._heads = self._page[: _HEAD.size].cast("I")
        self._sink = sink
        self._closed = False
        self._lock = allocate_lock()

    def pending(self) -> bool:
        """Whether a write is in the ring."""
        heads = self._heads
        try:
            return heads[0] != heads[1]
        except ValueError:  # released
            return False

    def drain(self) -> None:
        """Take every write that is in the ring now; runs of bytes to one address go as one."""
        if not self.pending():
            return
        heads = self._heads
        with self._lock:
            if self._closed:
                return
            first, last = heads[0], heads[1]
            run = bytearray()
            run_key: tuple[int, int] | None = None
            while first != last:
                addr, size, pio, data = _ENTRY.unpack_from(
                    self._page, _HEAD.size + first * _ENTRY.size
                )
                first = (first + 1) % RING_MAX
                if size == 1 and run_key == (addr, pio):
                    run.append(data[0])
                    continue
                if run_key is not None:
                    self._sink(run_key[0], bytes(run), bool(run_key[1]))
                    run_key = None
                if size == 1:
                    run_key = (addr, pio)
                    run = bytearray(data[:1])
                else:
                    self._sink(addr, data[:size], bool(pio))
            if run_key is not None:
                self._sink(run_key[0], bytes(run), bool(run_key[1]))
            heads[0] = first

    def close(self) -> None:
        """Let go of the mapping."""
        with self._lock:
            self._closed = True
            self._heads.release()
            self._page.release()
