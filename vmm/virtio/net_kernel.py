"""Frames by the C kernel, between a split ring and a port that is no more than a descriptor."""

from __future__ import annotations

from vmm.virtio import kernel
from vmm.virtio import net_spec as n

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.net.port import Port
    from vmm.virtio.net import Nic
    from vmm.virtio.queue import VirtQueue

NOT_HERE = -1
"""Nothing was done: this queue, port or moment is not for the kernel."""


class NetKernel:
    """Serves queues of `device`; under their locks."""

    def __init__(self, device: Nic) -> None:
        ffi, lib = kernel.library()
        self._device = device
        self._send, self._receive = lib.vmm_net_send, lib.vmm_net_receive
        self._receivers = [_Receive(ffi) for _ in device.ports]

    def _ring(self, index: int, queue: VirtQueue, port: Port) -> kernel.KernelRing | None:
        device = self._device
        if not port.plain or queue.broken or not device.link_up or index >> 1 >= device.pairs:
            return None
        return kernel.ring(device.memory, device.slots[index])

    def send(self, index: int, queue: VirtQueue) -> int:
        """IDLE, MORE, OTHER (the next chain is for Python) or NOT_HERE."""
        device = self._device
        port, limits = device.ports[index >> 1], device.limits
        ring = self._ring(index, queue, port)
        if ring is None or (limits is not None and limits.tx.active):
            return NOT_HERE
        return self._told(index, ring.serve(self._send, port.fd))

    def receive(self, index: int, queue: VirtQueue, port: Port) -> int:
        """WAIT, MORE, OTHER, HELD (see `held`) or NOT_HERE."""
        device = self._device
        limits = device.limits
        ring = self._ring(index, queue, port)
        if ring is None or (limits is not None and limits.rx.active):
            return NOT_HERE
        what = self._receivers[index >> 1].prepare(device, port)
        return self._told(index, ring.serve(self._receive, what))

    def held(self, index: int) -> tuple[bytes, int]:
        """The frame that was not for the kernel to judge, if any, and how many were dropped."""
        return self._receivers[index >> 1].take()

    def _told(self, index: int, what: int) -> int:
        if what & kernel.INTERRUPT:
            self._device.interrupt(index)
        return what & ~kernel.INTERRUPT


class _Receive:
    """A queue pair's `struct vmm_receive`."""

    def __init__(self, ffi: Any) -> None:
        self._spill = bytearray(n.HEADER_SIZE + n.FRAME_MAX)
        self._data = ffi.from_buffer(self._spill)
        self._what = ffi.new("struct vmm_receive *")
        self._what.spill = ffi.cast("uint8_t *", self._data)
        self._what.spill_size = len(self._spill)

    def prepare(self, device: Nic, port: Port) -> Any:
        what, found = self._what, device.filter
        what.fd = port.fd
        what.mergeable, what.checksums = device.mergeable, device.checksums
        what.need = device.receive_size
        what.everything, what.promiscuous = found.everything, found.promiscuous
        what.unicast = not found.nouni
        what.mac = found.mac
        return what

    def take(self) -> tuple[bytes, int]:
        what = self._what
        frame, dropped = bytes(self._spill[: what.held]), what.dropped
        what.held = what.dropped = 0
        return frame, dropped


def make(device: Nic) -> NetKernel | None:
    """None where there is no library."""
    return NetKernel(device) if kernel.library() is not None else None
