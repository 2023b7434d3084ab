"""Base of the virtio devices: negotiation, queues, configuration space. No transport, no KVM.

A device says what it is (ID, FEATURES, QUEUES), fills `config`, and answers requests:

    class Entropy(VirtioDevice):
        ID, QUEUES = spec.ID_ENTROPY, (64,)

        def request(self, index, chain):
            return chain.write(os.urandom(chain.writable_size()))

Threads: a transport calls from vCPU threads, whoever serves a queue calls `notify` from his own.
A queue's `lock` is held while its requests are handled; a reset waits for what is under way
(`drain`) and takes them all, so nothing of a former life writes into guest memory. A snapshot
(`hold`) waits and takes them in the same way, and nothing is lost.
"""

from __future__ import annotations

from _thread import RLock, allocate_lock

from vmm import priority
from vmm.errors import ShapeError
from vmm.virtio import spec
from vmm.virtio.queue import Chain, QueueError, VirtQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from typing import Any

    from vmm.memory import GuestMemory
    from vmm.shapes import Table
    from vmm.virtio.kernel import KernelRing

RING_FEATURES = spec.bits(
    spec.F_VERSION_1, spec.F_INDIRECT_DESC, spec.F_EVENT_IDX, spec.F_RING_PACKED, spec.F_RING_RESET
)
"""What every device offers besides its own."""


COMPLAINTS = 10
CONFIG_MAX = 4096
"""Bytes of a configuration space, in a state."""


class Interrupted(Exception):
    """A request is not carried out, or not wholly, and goes back into its queue: `quiet` was set
    meanwhile, or enough is under way. Raised by `request`, which can carry it out once more."""


class GivesWay(Interrupted):
    """The rest of a batch is in the queue again, because somebody goes first (vmm.priority)."""


class QueueSlot:
    """A queue as the driver configures it.

    Attributes:
        size_max: the most entries; 0 would mean that there is no such queue.
        size, desc, driver, device: entries and GPAs, as the driver wrote them.
        queue: the ring once it is enabled, else None.
        kernel: the same ring as the C kernel sees it, once it has had it (vmm.virtio.kernel).
        lock: held while its requests are handled.
    """

    __slots__ = ("desc", "device", "driver", "kernel", "lock", "queue", "size", "size_max")

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self.lock = RLock()
        self.clear()

    def clear(self) -> None:
        """As after a reset."""
        self.size = self.size_max
        self.desc = self.driver = self.device = 0
        self.queue: VirtQueue | None = None
        self.kernel: KernelRing | None = None


class VirtioDevice:
    """One device.

    Attributes:
        config: the device's configuration space, as the driver reads it.
        config_generation: counts changes of it, modulo 256.
        slots: its queues.
        status: the device status field (2.1).
        driver_features: what the driver accepted.
        interrupt: set by the transport: `interrupt(index)` tells of used buffers.
        kick: set by the transport: what the driver's notify of a queue does; see `wake`.
        config_interrupt: set by the transport.
        on_error: told in one line of what the driver did wrong, or the host; see `complain`.
        complaints: how many lines more it is told: a guest must not fill a person's terminal.
        on_bug: told of an exception that escaped in a thread of the device's.
        on_stop: told in one line why the machine should be paused, before its `resumed`.
        peers: of each program that the device depends on, a socket to it, and what to call from
            any thread when it has hung up: the guest may have no driver yet.
        quiet: no new requests are taken (a reset is under way, or it was restored and the machine
            has not gone on yet).
        over: the machine ends: `quiet` stays set.
        control: held by what changes status, features or queues; transports hold it where a
            register write is more than one step. Taken before a slot's lock, never after.
    """

    ID = 0
    FEATURES = 0
    """The device's own feature bits, a mask."""
    QUEUES: tuple[int, ...] = ()
    """The largest size of each queue."""
    EXTERNAL = False
    """Another process serves the queues: a `VhostUserDevice`, whose `connect` gets the eventfds."""
    CONFIG_STATE: tuple[tuple[int, int], ...] | None = None
    """The parts of `config` (first byte, end) that a restored device has as they were: what the
    driver or a person writes. The rest is the device's own. None: all of it is as it was."""
    external: Sequence[int] = ()
    """The queues somebody else serves, if not all: the host's kernel (vmm.virtio.vhost)."""
    ON_LOOP = False
    """Queues are served on the machine's event loop, not each by a thread; see `loop_running`."""

    memory: GuestMemory
    """The guest's; there once the device is part of a machine."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.features = self.FEATURES | RING_FEATURES
        self.config = bytearray()
        self.config_generation = 0
        self.slots = [QueueSlot(size) for size in self.QUEUES]
        self.status = 0
        self.driver_features = 0
        self.interrupt: Callable[[int], None] = _nobody
        self.kick: Callable[[int], None] = self.notify
        self.config_interrupt: Callable[[], None] = _nothing
        self.on_error: Callable[[str], None] | None = None
        self.complaints = COMPLAINTS
        self.on_bug: Callable[[BaseException], object] = _raise
        self.on_stop: Callable[[str], None] = _nobody
        self.peers: list[tuple[int, Callable[[], object]]] = []
        self.quiet = self.over = False
        self.control = RLock()
        self._lock = allocate_lock()
        self._restored = False
        self._held = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # --- for devices to override ------------------------------------------------------------------

    def request(self, index: int, chain: Chain) -> int | None:
        """Answer a request of queue `index`: the bytes written; None keeps it, see `finish`.

        It takes a fraction of a second at most: one that may take longer looks at `quiet` now and
        then, and raises `Interrupted`.
        """
        return 0

    def requests(self, index: int, queue: VirtQueue, chains: list[Chain]) -> None:
        """Answer a batch; a device overrides this where a batch is cheaper than its parts.

        Raises Interrupted: the rest of it is in the queue again.
        """
        done = 0
        try:
            for chain in chains:
                if self.quiet:  # who waits for us has waited long enough
                    raise Interrupted
                if done and priority.wanted:
                    raise GivesWay
                written = self.request(index, chain)
                done += 1
                if written is not None:
                    queue.push(chain, written)
        except Interrupted:
            for later in reversed(chains[done:]):
                queue.unpop(later)
            raise

    def started(self) -> None:
        """DRIVER_OK: features and queues are final."""

    def loop_running(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called once, on the machine's event loop, before the first `started` (ON_LOOP only)."""

    def connect(self, kicks: Sequence[int]) -> None:
        """The eventfds KVM writes for a notify, one a queue (EXTERNAL and `external` only)."""

    def take_kick(self, index: int, fd: int) -> bool:
        """Before `started`: whether a thread of the device's own will serve queue `index` when
        eventfd `fd` is written, not one that is made for it (vmm.virtio.serve)."""
        return False

    def stopped(self) -> None:
        """Reset: no queue is there any more; forget what was under way."""

    def drain(self) -> None:
        """Wait until no kept request is under way; called with `quiet` set and no lock held."""

    def give_back(self) -> None:
        """Put requests that are kept back into their queues (`unpop`), for `save`; under `hold`."""

    def resumed(self) -> None:
        """The machine goes on after a pause."""

    def config_written(self, offset: int, data: bytes) -> None:
        """The driver wrote to the configuration space; most devices have nothing writable."""

    def hurry(self, *, ending: bool) -> None:
        """Somebody waits for the vCPUs, for longer than one should: whoever has a vCPU wait for
        another process gives that up soon, at once where the machine is `ending`. From any thread,
        again and again."""

    def ended(self, until: float | None) -> bool:
        """Whether the device's own threads have ended by `until`, of time.monotonic; they are told
        to. At the end, once no queue is served."""
        return True

    def close(self) -> None:
        """Give back host resources; harmless twice."""

    # --- queues -----------------------------------------------------------------------------------

    def notify(self, index: int) -> None:
        """Serve queue `index`: all that is there, then ask for the next notify."""
        while self._serve(index):
            priority.give_way()

    def _serve(self, index: int) -> bool:
        """Serve queue `index`; True: it is left for a moment, because somebody goes first."""
        slot = self.slots[index]
        with slot.lock:
            queue = slot.queue
            if queue is None or self.quiet or not self.status & spec.DRIVER_OK:
                return False
            try:
                while not self.quiet:
                    chains = queue.pop_batch()
                    if chains:
                        self.requests(index, queue, chains)
                        if queue.publish():
                            self.interrupt(index)
                        if priority.wanted:
                            return True
                    elif not queue.rearm():
                        return False
            except Interrupted as err:
                if queue.publish():
                    self.interrupt(index)
                return isinstance(err, GivesWay)
            except QueueError as err:
                if queue.publish():
                    self.interrupt(index)
                self.needs_reset(f"queue {index}: {err}")
        return False

    def wake(self, index: int) -> None:
        """Have queue `index` looked at by the thread that serves it; from any thread, which does
        not serve the queue itself: a guest could keep it busy for ever."""
        if self.ON_LOOP or self.EXTERNAL or index in self.external:
            self.notify(index)
        else:
            self.kick(index)

    def finish(self, index: int, queue: VirtQueue, chain: Chain, written: int) -> None:
        """Give back a chain that `request` kept; from any thread."""
        slot = self.slots[index]
        with slot.lock:
            if slot.queue is queue and not queue.broken:
                queue.push(chain, written)
                if queue.publish():
                    self.interrupt(index)

    def needs_reset(self, why: str) -> None:
        """The driver broke the protocol: stop, and let it know (2.1.2)."""
        with self._lock:
            if self.status & spec.DEVICE_NEEDS_RESET:
                return
            self.status |= spec.DEVICE_NEEDS_RESET
        for slot in self.slots:
            queue = slot.queue
            if queue is not None:
                queue.broken = True
        self.complain(f"{why}; the driver must reset the device")
        if self.status & spec.DRIVER_OK:
            self.config_interrupt()

    def complain(self, line: str) -> None:
        """Tell a person, once in a while."""
        self.complaints -= 1
        if self.on_error is None or self.complaints < 0:
            return
        last = "" if self.complaints else " (no more is said of this device)"
        self.on_error(f"{self.name}: {line}{last}")

    def config_changed(self) -> None:
        """`config` has changed: tell the driver."""
        self.config_generation = (self.config_generation + 1) & 0xFF
        if self.status & spec.DRIVER_OK:
            self.config_interrupt()

    # --- for transports ---------------------------------------------------------------------------

    def offered(self) -> int:
        """What a driver is shown of `features`; all of those it may accept."""
        return self.features

    def accept_features(self, mask: int) -> None:
        """The driver's choice; kept until FEATURES_OK (later writes are not looked at)."""
        if not self.status & spec.FEATURES_OK:
            self.driver_features = mask

    def set_status(self, status: int) -> None:
        """The driver wrote the status field; 0 resets, and is all that clears bits (2.1.1)."""
        if not status:
            self.reset()
            return
        with self.control:
            self._add_status(status & ~spec.DEVICE_NEEDS_RESET)

    def _add_status(self, status: int) -> None:
        added = status & ~self.status
        if added & spec.FEATURES_OK and not self._features_ok():
            status &= ~spec.FEATURES_OK
            added &= ~spec.FEATURES_OK
        if added & spec.DRIVER_OK and not (status | self.status) & spec.FEATURES_OK:
            status &= ~spec.DRIVER_OK  # the legacy sequence, which version 2 devices do not have
            added &= ~spec.DRIVER_OK
        with self._lock:
            self.status |= status
        if added & spec.DRIVER_OK:
            self.started()

    def _features_ok(self) -> bool:
        chosen = self.driver_features
        return not chosen & ~self.features and bool(chosen >> spec.F_VERSION_1 & 1)

    def has(self, feature: int) -> bool:
        """Whether feature bit `feature` was negotiated."""
        return bool(self.driver_features >> feature & 1)

    def enable_queue(self, index: int) -> bool:
        """The driver enables queue `index` with the addresses in its slot; whether it could be."""
        slot = self.slots[index]
        with self.control:
            if not self.status & spec.FEATURES_OK:
                return False
            if slot.queue is not None:  # its lock may be held for as long as the driver likes
                return True
            try:
                slot.queue = self._ring(slot)
            except QueueError as err:
                self.needs_reset(f"queue {index}: {err}")
                return False
        return True

    def _ring(self, slot: QueueSlot) -> VirtQueue:
        if not 0 < slot.size <= slot.size_max:
            raise QueueError(f"{slot.size} entries, not 1 to {slot.size_max}")
        if self.has(spec.F_RING_PACKED):
            from vmm.virtio.packed import PackedQueue as Ring
        else:
            from vmm.virtio.split import SplitQueue as Ring  # type: ignore[assignment]
        return Ring(
            self.memory,
            slot.size,
            slot.desc,
            slot.driver,
            slot.device,
            indirect=self.has(spec.F_INDIRECT_DESC),
            event_idx=self.has(spec.F_EVENT_IDX),
        )

    def reset_queue(self, index: int) -> None:
        """VIRTIO_F_RING_RESET: stop one queue (2.6.1)."""
        slot = self.slots[index]
        with self.control:
            self._silence()
            with slot.lock:
                slot.clear()
                self.queue_stopped(index)
            self.quiet = self.over
        for other in range(len(self.slots)):  # what they were notified of meanwhile
            self.wake(other)

    def queue_stopped(self, index: int) -> None:
        """Queue `index` was reset by itself; forget what was under way in it."""

    def reset(self) -> None:
        """Registers as after power-on; returns when no request is under way."""
        with self.control:
            self._silence()
            for slot in self.slots:
                slot.lock.acquire()
            try:
                for slot in self.slots:
                    slot.clear()
                with self._lock:
                    self.status = 0
                self.driver_features = 0
                self.stopped()
            finally:
                self.quiet, self._restored = self.over, False
                for slot in self.slots:
                    slot.lock.release()

    def _silence(self) -> None:
        """Take no new requests, and wait until none is under way."""
        self.quiet = True
        for slot in self.slots:
            with slot.lock:  # whoever serves it now sees `quiet` before he lets go of it
                pass
        self.drain()

    def settle(self) -> None:
        """Wait until nobody serves a queue by what was in force before. With no lock held."""
        for slot in self.slots:
            with slot.lock:
                pass

    def read_config(self, offset: int, size: int) -> int:
        """`size` bytes of the configuration space at `offset`; what lies beyond reads 0."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver writes the configuration space; out of range is ignored."""
        if offset + size <= len(self.config):
            self.config_written(offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    # --- state ------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Keep everybody from the queues, and from guest memory, once what is under way is done.

        Until `release`, in the same thread; others wait, so nothing is lost. Nests. While vCPUs are
        parked: with it, memory and devices are of one moment.
        """
        self.control.acquire()
        self._held += 1
        if self._held > 1:
            return
        quiet = self.quiet
        if not self.ON_LOOP:  # there nothing is under way that does not hold the lock
            self._silence()
        for slot in self.slots:
            slot.lock.acquire()
        self.quiet = quiet or self.over

    def release(self) -> None:
        """The end of `hold`."""
        self._held -= 1
        if not self._held:
            for slot in self.slots:
                slot.lock.release()
        self.control.release()
        if not self._held:  # who was turned away is served, and what was given back
            for index in range(len(self.slots)):
                self.wake(index)

    def save(self) -> dict[str, object]:
        """Negotiation and queues as plain data; while vCPUs are parked. The device goes on."""
        self.hold()
        try:
            self.give_back()
            return self._state()
        finally:
            self.release()

    def _state(self) -> dict[str, object]:
        queues: list[dict[str, object]] = []
        for slot in self.slots:
            state: dict[str, object] = {
                "size": slot.size,
                "desc": slot.desc,
                "driver": slot.driver,
                "device": slot.device,
            }
            if slot.queue is not None:
                state["ring"] = slot.queue.save()
            queues.append(state)
        return {
            "status": self.status,
            "features": self.driver_features,
            "config": bytes(self.config),
            "generation": self.config_generation,
            "queues": queues,
        }

    def shape(self) -> Table:
        """What shape `save` gives the state; see `vmm.devices.device.Device.shape`."""
        from vmm.shapes import U8, U16, U32, U64, Data, Items, Table, Whole

        word, index = Whole(0, U64), Whole(0, U16)
        queue = {"size": Whole(0, U32), "desc": word, "driver": word, "device": word}
        ring = Table({"next_used": index}, {"last_avail": index, "next_avail": index})
        return Table(
            {
                "status": Whole(0, U8),
                "features": word,
                "config": Data(0, CONFIG_MAX),
                "generation": Whole(0, U8),
                "queues": Items(Table(queue, {"ring": ring}), len(self.slots)),
            },
            rule=self._impossible,
        )

    def _impossible(self, state: dict[str, Any]) -> str:
        """How no driver can have brought `state` about; empty: one can."""
        status, features = state["status"], state["features"]
        if status & spec.FEATURES_OK and not features >> spec.F_VERSION_1 & 1:
            return "its driver has no features of this version"
        if status & spec.DRIVER_OK and not status & spec.FEATURES_OK:
            return "its driver is at work before its features are"
        kind = "next_avail" if features >> spec.F_RING_PACKED & 1 else "last_avail"
        for number, queue in enumerate(state["queues"]):
            if "ring" in queue and (not status & spec.FEATURES_OK or kind not in queue["ring"]):
                return f"queue {number} is not of what was negotiated"
        return ""

    def restore(self, state: dict[str, object]) -> None:
        """Take over what `save` gave; raises ShapeError where it is not this device's.

        Nothing is served until `resume`.
        """
        queues = state["queues"]
        if not isinstance(queues, list) or len(queues) != len(self.slots):
            raise ShapeError(f"state of {self.name}: not {len(self.slots)} queues")
        features = _int(state, "features")
        if features & ~self.features and _int(state, "status") & spec.FEATURES_OK:
            raise ShapeError(
                f"state of {self.name}: its driver has features {features & ~self.features:#x}, "
                "which are not to be had here"
            )
        self.reset()
        self.quiet = self._restored = True
        self.driver_features = features
        self.status = _int(state, "status") & 0xFF
        self.config_generation = _int(state, "generation") & 0xFF
        config = state["config"]
        if isinstance(config, bytes) and len(config) == len(self.config):
            for start, end in self._config_state():
                self.config[start:end] = config[start:end]
        for slot, given in zip(self.slots, queues, strict=True):
            slot.size = _int(given, "size")
            slot.desc, slot.driver = _int(given, "desc"), _int(given, "driver")
            slot.device = _int(given, "device")
            if "ring" in given:
                try:
                    slot.queue = self._ring(slot)
                except QueueError as err:
                    raise ShapeError(f"state of {self.name}: {err}") from None
                slot.queue.restore(given["ring"])
                slot.queue.broken = bool(self.status & spec.DEVICE_NEEDS_RESET)
        if self.status & spec.DRIVER_OK and not self.ON_LOOP:
            self.started()

    def _config_state(self) -> tuple[tuple[int, int], ...]:
        return ((0, len(self.config)),) if self.CONFIG_STATE is None else self.CONFIG_STATE

    def resume(self) -> None:
        """The machine goes on: after a pause, or for the first time after `restore`."""
        if self._restored:
            self._restored, self.quiet = False, self.over
            if self.ON_LOOP and self.status & spec.DRIVER_OK:
                self.started()
        self.resumed()


def _raise(err: BaseException) -> None:
    raise err


def _nobody(what: object) -> None:
    pass


def _nothing() -> None:
    pass


def _int(state: dict[str, object], key: str) -> int:
    value = state[key]
    if not isinstance(value, int):
        raise ShapeError(f"state of a device: {key} is {value!r}, not an integer")
    return value
