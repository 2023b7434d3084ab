"""A socket device that the host's kernel serves (vhost-vsock): AF_VSOCK on both sides.

Host programs connect to the guest's CID with sockets of family AF_VSOCK, as the guest does to CID
2; there is no UNIX socket.
"""

from __future__ import annotations

from vmm.virtio import spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.vhost import RINGS, KernelQueues, Vhost
from vmm.virtio.vsock_packet import EVENT_TRANSPORT_RESET, F_SEQPACKET, F_STREAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DEVICE = "/dev/vhost-vsock"
EVENT = 2


class VhostVsock(VirtioDevice):
    """The socket device of guest `cid`; `vhost` has that address already, and is closed with it."""

    ID = spec.ID_VSOCK
    QUEUES = (128, 128, 16)

    def __init__(self, cid: int, vhost: Vhost, name: str = "vsock") -> None:
        self.FEATURES = 1 << F_STREAM | vhost.features & 1 << F_SEQPACKET
        super().__init__(name)
        self.features = self.FEATURES | RINGS & vhost.features
        self.cid = cid
        self.config[:] = cid.to_bytes(8, "little")
        self.vhost = vhost
        self.kernel = KernelQueues(self, [vhost])
        self.external = self.kernel.indices
        self._runs = False
        self._transport_reset = False

    def connect(self, kicks: Sequence[int]) -> None:
        self.kernel.connect(kicks)

    def started(self) -> None:
        try:
            self.kernel.begin()
        except OSError as err:
            self.needs_reset(f"{DEVICE}: {err.strerror}")
        self._run()

    def _run(self) -> None:
        with self.kernel.lock:
            state = self.status & (spec.DRIVER_OK | spec.DEVICE_NEEDS_RESET)
            wanted = not self.quiet and not self._held and state == spec.DRIVER_OK
            wanted = wanted and self.kernel.ready(0)
            if wanted is self._runs:
                return
            try:
                self.vhost.set_running(wanted)
                self._runs = wanted
            except OSError as err:
                self.needs_reset(f"{DEVICE}: {err.strerror}")

    def drain(self) -> None:
        self._run()  # `quiet` is set
        self.kernel.read_back()

    def resumed(self) -> None:
        self._run()

    def notify(self, index: int) -> None:
        if index == EVENT:
            self._send_event()
        elif self.kernel.kicks:
            self._run()  # it may have been held
            self.kernel.kick()

    def _send_event(self) -> None:
        """After a restore, the connections the guest had are gone (5.10.6.7)."""
        slot = self.slots[EVENT]
        with slot.lock:
            queue = slot.queue
            if not self._transport_reset or queue is None or self.quiet:
                return
            while not (chains := queue.pop_batch(1)):
                if not queue.rearm():
                    return
            self._transport_reset = False
            queue.push(chains[0], chains[0].write(EVENT_TRANSPORT_RESET.to_bytes(4, "little")))
            if queue.publish():
                self.interrupt(EVENT)

    def restore(self, state: dict[str, object]) -> None:
        config = bytes(self.config)
        super().restore(state)
        self._transport_reset = True
        self.config[:] = config  # a clone has a CID of its own; the guest asks for it again

    def close(self) -> None:
        self.quiet = True
        self._run()
        self.kernel.close()
