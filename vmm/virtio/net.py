"""The network device (virtio 1.2, section 5.1): frames between a guest and a back end's ports.

A frame crosses Python as views of guest memory, with its virtio-net header before it; where the
back end carries offloads that is up to 64 KiB at once. Each pair of queues has a port and a thread
that serves both directions (vmm.virtio.net_pump).
"""

from __future__ import annotations

from _thread import allocate_lock

from vmm.errors import ShapeError
from vmm.net.filter import Filter
from vmm.net.port import GONE, LinkLost
from vmm.virtio import kernel, net_kernel, spec
from vmm.virtio import net_spec as n
from vmm.virtio.device import VirtioDevice
from vmm.virtio.net_pump import Pump
from vmm.virtio.net_rx import Receiver
from vmm.virtio.net_tx import Sender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.net.port import Backend, Port
    from vmm.shapes import Table
    from vmm.virtio.limit import Limit
    from vmm.virtio.net_kernel import NetKernel
    from vmm.virtio.net_limit import NicLimits
    from vmm.virtio.queue import Chain

QUEUE_SIZE = 256
CONTROL_SIZE = 64


class Nic(VirtioDevice):
    """A network card connected to `backend`, which it closes.

    Attributes:
        ports: of each queue pair; faults put theirs in their places.
        receivers, senders: the two sides of each pair.
        filter: what the driver wants to receive.
        pairs: queue pairs in use.
        fast: serves queues in C, where there is a library and the first driver has started.
        link_up: frames pass; see `set_link`.
        mergeable, checksums, receive_size: what was negotiated: MRG_RXBUF, GUEST_CSUM, and the
            bytes the largest frame needs, with its header.
    """

    FRAMES_HERE = True
    """They pass through `ports`, where faults, captures and limits meet them."""
    ID = spec.ID_NET
    FEATURES = spec.bits(
        n.F_MAC, n.F_MRG_RXBUF, n.F_STATUS, n.F_CTRL_VQ, n.F_CTRL_RX, n.F_CTRL_VLAN,
        n.F_CTRL_RX_EXTRA, n.F_GUEST_ANNOUNCE, n.F_CTRL_MAC_ADDR,
    )  # fmt: skip

    def __init__(
        self,
        backend: Backend,
        *,
        mac: bytes,
        name: str = "net",
        wrap: Callable[[Port], Port] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.backend = backend
        self.ports = [wrap(port) for port in backend.ports] if wrap else list(backend.ports)
        self._on_close = on_close
        self._max_pairs = len(self.ports)
        self.QUEUES = (QUEUE_SIZE,) * (2 * self._max_pairs) + (CONTROL_SIZE,)
        self.FEATURES = type(self).FEATURES | backend.features
        if self._max_pairs > 1:
            self.FEATURES |= spec.bits(n.F_MQ)
        if backend.mtu:
            self.FEATURES |= spec.bits(n.F_MTU)
        super().__init__(name)
        self._mac = mac
        self._link_lock = allocate_lock()
        self._connected = True
        self._told_gone = False
        self._plugged = True
        self.link_up = True
        self.limits: NicLimits | None = None
        self.fast: NetKernel | None = None
        self.config += n.CONFIG.pack(mac, n.S_LINK_UP, self._max_pairs, backend.mtu)
        self.filter = Filter(mac)
        self.pairs = 1
        self.receivers = [Receiver(self, pair, port) for pair, port in enumerate(self.ports)]
        self.senders = [Sender(self, pair) for pair in range(self._max_pairs)]
        self._kicks: list[list[int]] = [[] for _ in self.ports]
        self._pumps: list[Pump] = []
        self._offloads = 0
        self._negotiated()
        backend.on_link = self._peer
        if backend.peer_fd >= 0:
            self.peers = [(backend.peer_fd, self._hung_up)]

    # --- life -------------------------------------------------------------------------------------

    def _negotiated(self) -> None:
        self.mergeable = self.has(n.F_MRG_RXBUF)
        self.checksums = self.has(n.F_GUEST_CSUM)
        self._control = 2 * self._max_pairs if self.has(n.F_MQ) else 2
        self._apply_offloads(self.driver_features & n.GUEST_OFFLOADS)

    def _apply_offloads(self, offloads: int) -> None:
        self._offloads = offloads
        self.checksums = bool(offloads >> n.F_GUEST_CSUM & 1)
        if self.checksums and offloads & n.GUEST_GSO:
            largest = n.FRAME_MAX
        else:
            largest = (self.backend.mtu or n.MTU_DEFAULT) + 18
        self.receive_size = n.HEADER_SIZE + largest
        self.backend.set_offloads(offloads)

    def started(self) -> None:
        self._negotiated()
        self.filter.reset(self._own_mac(), vlans=self.has(n.F_CTRL_VLAN))
        if self.fast is None:
            self.fast = net_kernel.make(self)
        if not self._pumps:
            self._pumps = [Pump(self, pair, kicks) for pair, kicks in enumerate(self._kicks)]
        for pump in self._pumps:
            pump.wake()
        self._tell_trouble()

    def _tell_trouble(self) -> None:
        trouble = self.backend.trouble()
        if trouble:
            self.complain(trouble)

    def stopped(self) -> None:
        for receiver in self.receivers:
            receiver.forget()
        self.config[:6] = self._mac
        self.filter.reset(self._mac, vlans=False)
        with self._link_lock:
            self.config[n.CONFIG_STATUS] &= ~n.S_ANNOUNCE
        self._set_pairs(1)

    def queue_stopped(self, index: int) -> None:
        if not index & 1 and index < 2 * self._max_pairs:
            self.receivers[index >> 1].forget()

    def close(self) -> None:
        self.quiet = True
        if self.limits is not None:
            self.limits.alarm.close()
        pumps, self._pumps = self._pumps, []
        for pump in pumps:
            pump.close()
        for receiver in self.receivers:
            receiver.forget()
        self.backend.close()
        if self._on_close is not None:
            self._on_close()

    def _own_mac(self) -> bytes:
        return bytes(self.config[:6])

    def offered(self) -> int:
        plain = all(port.plain for port in self.ports)
        return kernel.only_split(self.features) if plain else self.features

    # --- queues -----------------------------------------------------------------------------------

    def take_kick(self, index: int, fd: int) -> bool:
        if index >= 2 * self._max_pairs:
            return False
        self._kicks[index >> 1].append(fd)
        return True

    def notify(self, index: int) -> None:
        if index == self._control:
            super().notify(index)
        elif index >= 2 * self._max_pairs:
            pass
        elif index & 1:
            pair = index >> 1
            while self._send(pair):
                pass
            if self.ports[pair].blocked:  # its thread goes on when there is room
                self.look(pair)
        elif self._pumps:
            self._pumps[index >> 1].wake()

    def _send(self, pair: int) -> bool:
        """Send some of what is there; whether there is more to do."""
        what = net_kernel.NOT_HERE if self.fast is None else self.fast.serve(pair, False)[0]
        if what in (kernel.IDLE, kernel.MORE):
            return what == kernel.MORE
        return self.senders[pair].serve()

    def request(self, index: int, chain: Chain) -> int:
        from vmm.virtio.net_control import answer

        written = answer(self, chain)
        for receive in self.slots[: 2 * self._max_pairs : 2]:  # nobody goes on by what was before
            with receive.lock:
                pass
        return written

    # --- limits -----------------------------------------------------------------------------------

    @property
    def rx_limit(self) -> Limit:
        """Bytes and frames to the guest a second; `change(bytes=..., ops=...)` at any time."""
        return self._limits().rx

    @property
    def tx_limit(self) -> Limit:
        """Bytes and frames from the guest a second."""
        return self._limits().tx

    def _limits(self) -> NicLimits:
        with self.control:
            if self.limits is None:
                from vmm.virtio.net_limit import NicLimits

                self.limits = NicLimits(self)
            return self.limits

    def look(self, pair: int) -> None:
        """Have the thread of queue pair `pair` look again; from any thread."""
        pumps = self._pumps
        if pumps:
            pumps[pair].wake()

    # --- the link ---------------------------------------------------------------------------------

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it; the driver is told. From any thread."""
        self._plugged = up
        self._update_link()
        self.settle()

    def lost(self, pair: int, err: LinkLost) -> bool:
        """The back end is gone; whether it is (a queue that was switched off only seems so)."""
        if pair >= self.pairs:
            return False
        self._tell_gone(self.backend.why_gone() if str(err) == GONE else str(err))
        if self._connected:
            self._peer(False)
        return True

    def _hung_up(self) -> None:
        """The peer has gone. A driver that runs receives what came before that first."""
        self._tell_gone(self.backend.why_gone())
        if not self.status & spec.DRIVER_OK:
            self._peer(False)

    def _tell_gone(self, why: str) -> None:
        with self._link_lock:
            if self._told_gone:
                return
            self._told_gone = True
        if self.on_error is not None:
            self.on_error(f"{self.name}: {self.backend.peer}: {why}; the guest's link is down")

    def _peer(self, connected: bool) -> None:
        self._connected = connected
        if connected:
            self._told_gone = False
        self._update_link()

    def _update_link(self) -> None:
        with self._link_lock:
            up = self._plugged and self._connected
            if up == self.link_up:
                return
            self.link_up = up
            status = self.config[n.CONFIG_STATUS] & ~n.S_LINK_UP
            self.config[n.CONFIG_STATUS] = status | (n.S_LINK_UP if up else 0)
        self.config_changed()
        for pump in self._pumps:
            pump.wake()

    def announce(self) -> None:
        """Have the driver tell its neighbours where it is (5.1.6.5.4), as after a migration."""
        if self.has(n.F_GUEST_ANNOUNCE):
            with self._link_lock:
                self.config[n.CONFIG_STATUS] |= n.S_ANNOUNCE
            self.config_changed()

    # --- for the control queue --------------------------------------------------------------------

    def announced(self) -> None:
        """The driver has."""
        with self._link_lock:
            self.config[n.CONFIG_STATUS] &= ~n.S_ANNOUNCE

    def set_mac(self, mac: bytes) -> None:
        """The driver chose an address, until the next reset."""
        self.config[:6] = mac
        self.filter.mac = mac

    def show_own_mac(self) -> None:
        """Offer this card's own address to a driver that was restored with another's. One that is
        at work keeps, and gets frames for, the other until it is told, or starts anew."""
        self.config[:6] = self._mac

    def set_pairs(self, pairs: int) -> bool:
        """Use the first `pairs` queue pairs; whether there are that many."""
        if not 1 <= pairs <= self._max_pairs:
            return False
        self._set_pairs(pairs)
        for pump in self._pumps:
            pump.wake()
        return True

    def _set_pairs(self, pairs: int) -> None:
        if pairs > self.pairs:
            self.backend.set_pairs(pairs)
            self.pairs = pairs
        elif pairs < self.pairs:
            self.pairs = pairs  # first: who finds a queue switched off looks at it
            self.backend.set_pairs(pairs)

    def set_offloads(self, offloads: int) -> bool:
        """What the driver takes from now on; whether it negotiated that."""
        if offloads & ~(self.driver_features & n.GUEST_OFFLOADS):
            return False
        self._apply_offloads(offloads)
        return True

    # --- state ------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """While paused. Frames on their way are lost, as on a wire."""
        self.hold()
        try:
            return {
                **super().save(),
                "filter": self.filter.save(),
                "pairs": self.pairs,
                "offloads": self._offloads,
                "plugged": self._plugged,
            }
        finally:
            self.release()

    def give_back(self) -> None:
        for receiver in self.receivers:
            receiver.give_back()

    CONFIG_STATE = ((0, n.CONFIG_STATUS + 2),)

    def shape(self) -> Table:
        from vmm.shapes import U64, Flag, Whole

        return (
            super()
            .shape()
            .with_more(
                filter=self.filter.shape(),
                pairs=Whole(1, self._max_pairs),
                offloads=Whole(0, U64),
                plugged=Flag(),
            )
        )

    def restore(self, state: dict[str, object]) -> None:
        found, pairs, offloads = state["filter"], state["pairs"], state["offloads"]
        if not isinstance(found, dict) or not isinstance(pairs, int):
            raise ShapeError(f"state of {self.name}: no filter, or no pairs")
        if not 1 <= pairs <= self._max_pairs or not isinstance(offloads, int):
            raise ShapeError(f"state of {self.name}: {pairs} queue pairs, not {self._max_pairs}")
        own = bytes(self.config)
        super().restore(state)
        told = self.config[n.CONFIG_STATUS]
        self.config[n.CONFIG_STATUS :] = own[n.CONFIG_STATUS :]  # what is plugged in here
        self.filter.restore(found)
        self.set_link(bool(state["plugged"]))
        if self.status & spec.DRIVER_OK:
            self.set_pairs(pairs)
            self._apply_offloads(offloads & self.driver_features & n.GUEST_OFFLOADS)
            if (told ^ self.config[n.CONFIG_STATUS]) & n.S_LINK_UP:
                self.config_changed()
            self.announce()
