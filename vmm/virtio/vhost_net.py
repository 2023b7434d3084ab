"""A network card whose frames the host's kernel carries between rings and tap (vhost-net).

Negotiation, control queue, link and state are the `Nic`'s; what it filters, the kernel does not
(receive modes, addresses and VLANs are for the guest to look at, as in QEMU).
"""

from __future__ import annotations

from contextlib import suppress

from vmm.errors import StateError
from vmm.net.port import LinkLost
from vmm.virtio import net_spec as n
from vmm.virtio import spec
from vmm.virtio.net import Nic
from vmm.virtio.vhost import RINGS, KernelQueues, Vhost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.net.port import Port
    from vmm.net.tap import TapBackend
    from vmm.virtio.limit import Limit

DEVICE = "/dev/vhost-net"
QUEUED_MAX = 10_000
"""Frames in a tap's queue, at most; its length is 1000 unless somebody has changed it."""


class VhostNic(Nic):
    """A card on a tap, with one of `vhosts` a queue pair; it closes both."""

    FRAMES_HERE = False

    def __init__(
        self, backend: TapBackend, vhosts: Sequence[Vhost], *, mac: bytes, name: str = "net"
    ) -> None:
        self.kernel = KernelQueues(self, vhosts)
        self._runs = [False] * len(vhosts)
        super().__init__(backend, mac=mac, name=name)
        self.external = self.kernel.indices
        known = RINGS | 1 << n.F_MRG_RXBUF
        offered = self.features & ~spec.bits(spec.F_RING_PACKED, spec.F_RING_RESET)
        self.features = offered & (vhosts[0].features | ~known)

    # --- who serves the queues --------------------------------------------------------------------

    def connect(self, kicks: Sequence[int]) -> None:
        self.kernel.connect(kicks)

    def started(self) -> None:
        self._negotiated()
        self.filter.reset(self._own_mac(), vlans=self.has(n.F_CTRL_VLAN))
        try:
            self.kernel.begin()
        except OSError as err:
            self.needs_reset(f"{DEVICE}: {err.strerror}")
        self._run()
        self._tell_trouble()

    def _run(self) -> None:
        """Have the kernel serve what is to be served now, and nothing else."""
        with self.kernel.lock:
            can = self.link_up and not self.quiet and not self._held
            state = self.status & (spec.DRIVER_OK | spec.DEVICE_NEEDS_RESET)
            for pair, vhost in enumerate(self.kernel.vhosts):
                wanted = can and state == spec.DRIVER_OK and pair < self.pairs
                self._set(pair, vhost, wanted and self.kernel.ready(pair))

    def _set(self, pair: int, vhost: Vhost, wanted: bool) -> None:
        if wanted is self._runs[pair]:
            return
        if wanted:
            try:
                for ring in (0, 1):
                    vhost.set_backend(ring, self.ports[pair].fd)
                self._runs[pair] = True
                return
            except OSError as err:
                self.needs_reset(f"{DEVICE}: {err.strerror}")
        for ring in (0, 1):
            with suppress(OSError):  # one that was never set up
                vhost.set_backend(ring, -1)
        self._runs[pair] = False

    def drain(self) -> None:
        self._run()  # `quiet` is set
        self.kernel.read_back()

    def resumed(self) -> None:
        self._run()

    def notify(self, index: int) -> None:
        if index not in self.kernel.indices:
            super().notify(index)
        elif self.kernel.kicks:
            self._run()  # it may have been held
            self.kernel.kick()

    def _set_pairs(self, pairs: int) -> None:
        if pairs < self.pairs:
            self.pairs = pairs
            self._run()  # before the tap's queues go
            self.backend.set_pairs(pairs)
        elif pairs > self.pairs:
            super()._set_pairs(pairs)
            self._run()

    def _update_link(self) -> None:
        before = self.link_up
        super()._update_link()
        if self.link_up and not before:
            for port in self.ports:
                self._forget(port)
        self._run()

    @staticmethod
    def _forget(port: Port) -> None:
        """Lose what came for a card without a link."""
        spill = memoryview(bytearray(n.HEADER_SIZE + n.FRAME_MAX))
        with suppress(LinkLost):
            for _ in range(QUEUED_MAX):
                if not port.read([spill]):
                    return

    # --- what only a card of ours has -------------------------------------------------------------

    @property
    def rx_limit(self) -> Limit:
        """StateError: the kernel knows no limits."""
        raise StateError(f"{self.name}: vhost-net has no rate limits; say vhost=off")

    @property
    def tx_limit(self) -> Limit:
        """StateError: see `rx_limit`."""
        return self.rx_limit

    def close(self) -> None:
        self.quiet = True
        self._run()
        self.kernel.close()
        super().close()
