"""Frames by the C kernel, between split rings and a port that is no more than a descriptor."""

from __future__ import annotations

from vmm.virtio import kernel, spec
from vmm.virtio import net_spec as n

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.net.port import Port
    from vmm.virtio.device import QueueSlot
    from vmm.virtio.limit import Limit
    from vmm.virtio.net import Nic

NOT_HERE = -1
"""Nothing was done: this queue, port or moment is not for the kernel."""


class NetKernel:
    """Serves queues of `device`."""

    def __init__(self, device: Nic) -> None:
        self._pairs = [_Pair(device, pair) for pair in range(len(device.ports))]

    def serve(self, pair: int, receive: bool = True) -> tuple[int, int]:
        """Send, and receive, until there is nothing more, or something is not plain.

        What is next, for the sender and for the receiver: IDLE (a notify will come), WAIT (for
        frames), MORE, OTHER (one that is for Python), HELD (the receiver has it) or NOT_HERE.
        """
        return self._pairs[pair].serve(receive)


class _Pair:
    """A queue pair, and its `struct vmm_net`."""

    def __init__(self, device: Nic, pair: int) -> None:
        ffi, lib = kernel.library()
        self._device = device
        self._pair = pair
        self._receiver = device.receivers[pair]
        self._rx, self._tx = device.slots[2 * pair : 2 * pair + 2]
        self._function, self._null = lib.vmm_net_serve, ffi.NULL
        self._spill = bytearray(n.HEADER_SIZE + n.FRAME_MAX)
        self._data = ffi.from_buffer(self._spill)
        self._net = ffi.new("struct vmm_net *")
        self._net.spill = ffi.cast("uint8_t *", self._data)
        self._net.spill_size = len(self._spill)
        self._net.usual = n.HEADER_SIZE + n.FRAME_MIN

    def serve(self, receive: bool) -> tuple[int, int]:
        device, index = self._device, 2 * self._pair
        with self._rx.lock, self._tx.lock:
            port = device.ports[self._pair]
            if device.quiet or not device.link_up or not port.plain:
                return NOT_HERE, NOT_HERE
            if not device.status & spec.DRIVER_OK or self._pair >= device.pairs:
                return NOT_HERE, NOT_HERE
            limits = device.limits
            tx = self._ring(self._tx, None if limits is None else limits.tx)
            rx = None
            if receive and self._receiver.port is port:  # not what faults have put before it
                rx = self._ring(self._rx, None if limits is None else limits.rx)
            if rx is not None and not self._receiver.spare():
                rx = None
            what = self._function(
                self._null if tx is None else tx.begin(),
                self._null if rx is None else rx.begin(),
                self._prepare(port),
            )
            sent = received = NOT_HERE
            if tx is not None:
                tx.end()
                sent = self._told(index + 1, what & (1 << kernel.RECEIVED) - 1)
            if rx is not None:
                rx.end()
                received = self._told(index, what >> kernel.RECEIVED)
                self._take()
            return sent, received

    def _ring(self, slot: QueueSlot, limit: Limit | None) -> kernel.KernelRing | None:
        if slot.queue is None or slot.queue.broken or (limit is not None and limit.active):
            return None
        return kernel.ring(self._device.memory, slot)

    def _prepare(self, port: Port) -> Any:
        net, device, found = self._net, self._device, self._device.filter
        net.fd = port.fd
        net.mergeable, net.checksums = device.mergeable, device.checksums
        net.promiscuous = found.promiscuous
        net.unicast = not found.nouni
        net.mac = found.mac
        return net

    def _take(self) -> None:
        """Give the receiver the frame that was not for the kernel to judge, if any."""
        net = self._net
        self._receiver.dropped += net.dropped
        net.dropped = 0
        if net.held:
            self._receiver.hold(bytes(self._spill[: net.held]))
            net.held = 0

    def _told(self, index: int, what: int) -> int:
        if what & kernel.INTERRUPT:
            self._device.interrupt(index)
        return what & ~kernel.INTERRUPT


def make(device: Nic) -> NetKernel | None:
    """None where there is no library."""
    return NetKernel(device) if kernel.library() is not None else None
