"""Devices another process serves (vhost-user): it reads the rings, we only negotiate.

Notifies go from KVM straight to the back end. Its interrupts come by here, because a transport has
a status to set for them. Guest memory must be shared (`memfd`).

When the back end dies, the person is told in a line. One that somebody else runs may come back:
requests wait until it does, and those it had taken are given to its successor, if the two keep a
record of them (vmm.virtio.vhost_user_inflight) or there were none. Otherwise, where the device can
say so (`fail`) and there is such a record, requests end with an error; else the driver is told to
reset (DEVICE_NEEDS_RESET).
"""

from __future__ import annotations

import os
import select
import socket
from _thread import RLock
from contextlib import suppress

from vmm.errors import HostError, StateError, UsageError
from vmm.forked import drop_in_child
from vmm.virtio import spec, unix
from vmm.virtio import vhost_user_wire as wire
from vmm.virtio.device import VirtioDevice
from vmm.virtio.queue import QueueError
from vmm.virtio.split import SplitQueue
from vmm.virtio.vhost_user_inflight import DESCRIPTION, Inflight, used_index
from vmm.virtio.vhost_user_wire import BackEndGone, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.child import Child
    from vmm.virtio.queue import Chain

OFFERED = (1 << 24) - 1 | spec.bits(spec.F_INDIRECT_DESC, spec.F_EVENT_IDX, spec.F_VERSION_1)
"""Feature bits that may pass from the back end to the driver: the device's own, split rings'."""
PROTOCOL = spec.bits(
    wire.PROTOCOL_F_MQ,
    wire.PROTOCOL_F_REPLY_ACK,
    wire.PROTOCOL_F_CONFIG,
    wire.PROTOCOL_F_INFLIGHT_SHMFD,
)
POLLRDHUP = 0x2000
HURRY, HURRY_OURS = 0.4, 5.0
"""Seconds that a back end of somebody else's, and one of ours, has to answer while a pause waits
for it. One of ours may be waiting for a slow disk, and its end costs the guest the disk."""
RETRY = 0.25
"""Seconds between looks for a back end that has gone."""
ENDS_WITHIN = 0.5
"""Seconds that a back end of ours, which has hung up, has to end, for how it did to be told."""
SERVED, AWAY, DEAD = "served", "away", "dead"


class VhostUserDevice(VirtioDevice):
    """A device whose queues a back end serves.

    Args:
        name: for messages.
        connection: to the back end; closed with the device.
        queues: the size of each queue.
        config: bytes of configuration space to get from the back end (0: it has none).
        child: the back end's process, if we started it; ended with the device.
        redial: connects to the back end again, if it is somebody else's; raises UsageError.
        inflight: have a record of requests kept even if the back end does not offer it.

    Attributes:
        state: SERVED, AWAY (it may come back), or DEAD.
    """

    EXTERNAL = True

    def __init__(
        self,
        name: str,
        connection: Connection,
        queues: Sequence[int],
        *,
        config: int = 0,
        child: Child | None = None,
        redial: Callable[[], Connection] | None = None,
        inflight: bool = False,
    ) -> None:
        self.QUEUES = tuple(queues)
        self._connection = connection
        self._child = child
        self._redial = redial
        self._force_inflight = inflight
        self._config_bytes = config
        self._kicks: list[int] = []
        self._calls: list[int] = []
        self._inflight: Inflight | None = None
        self._records = False
        self._session = RLock()
        """Held while the connection is used; taken before slots' locks, never after."""
        self.state = SERVED
        self._closing = self._ending = self.over = False
        self._trying: Connection | None = None
        self._refused = ""
        self._wake = -1
        offered = self._introduce(connection)
        super().__init__(name)
        self.features = offered & OFFERED
        if config:
            self.config[:] = self._get_config(connection)
        self.peers = [(connection.sock.fileno(), self._begin)]

    # --- for devices to override ------------------------------------------------------------------

    def fail(self, chain: Chain) -> int | None:
        """Answer a request with an error, for want of a back end: the bytes written; None: this
        device has none to give."""
        return None

    def refuses(self, offered: int) -> str:
        """Why a back end that is back with these features is not taken; empty: it is."""
        return ""

    def differs(self, offered: int, config: bytes) -> str:
        """What a person should know of a back end that is back, as against `features` and
        `config`, which the one before had; empty: nothing."""
        return ""

    def adapt(self, config: bytearray) -> None:
        """Change what the back end says of the configuration."""

    # --- the session ------------------------------------------------------------------------------

    def _introduce(self, connection: Connection) -> int:
        """Begin a session; the features the back end offers."""
        connection.over = self._is_over
        offered = connection.get_u64(wire.GET_FEATURES)
        if not offered >> wire.F_PROTOCOL_FEATURES & 1:
            raise HostError(f"{connection.name} has no vhost-user protocol features")
        has = connection.get_u64(wire.GET_PROTOCOL_FEATURES)
        if self._force_inflight:
            has |= 1 << wire.PROTOCOL_F_INFLIGHT_SHMFD
        protocol = has & PROTOCOL
        connection.set_u64(wire.SET_PROTOCOL_FEATURES, protocol)
        connection.ack = bool(protocol >> wire.PROTOCOL_F_REPLY_ACK & 1)
        self._records = bool(protocol >> wire.PROTOCOL_F_INFLIGHT_SHMFD & 1)
        connection.set_owner()
        if len(self.QUEUES) > 1 and protocol >> wire.PROTOCOL_F_MQ & 1:
            most = connection.get_u64(wire.GET_QUEUE_NUM)
            if most < len(self.QUEUES):
                raise HostError(f"{connection.name} has {most} queues, not {len(self.QUEUES)}")
        if not offered >> spec.F_VERSION_1 & 1:
            raise HostError(f"{connection.name} serves legacy devices only (no VERSION_1)")
        if self._config_bytes and not protocol >> wire.PROTOCOL_F_CONFIG & 1:
            raise HostError(f"{connection.name} does not tell its configuration")
        return offered

    def _is_over(self) -> bool:
        return self._closing or self._ending or self.over

    def hurry(self, *, ending: bool) -> None:
        """Have the back end answer soon what a vCPU waits for, or be taken for dead."""
        within = HURRY if self._child is None else HURRY_OURS
        if ending:  # a machine with such a device is not brought back to a checkpoint
            within, self._ending = 0.0, True
        for connection in (self._connection, self._trying):
            if connection is not None:
                connection.hurry(within)

    def _get_config(self, connection: Connection) -> bytearray:
        config = bytearray(connection.get_config(self._config_bytes))
        self.adapt(config)
        return config

    def look_at_config(self) -> None:
        """Ask the back end for its configuration again, and tell the driver where it has changed.
        Raises HostError."""
        with self._session:
            if self.state != SERVED:
                raise HostError(f"{self._connection.name} has ended")
            config = self._get_config(self._connection)
        if config != self.config:
            self.config[:] = config
            self.config_changed()

    def connect(self, kicks: Sequence[int]) -> None:
        """The eventfds KVM writes for a notify, one a queue."""
        if any(region.fd < 0 for region in self.memory.regions):
            raise UsageError(f"{self.name} needs shared guest memory; backing 'memfd'")
        self._kicks = list(kicks)
        self._begin()
        os.eventfd_write(self._wake, 1)  # there are kicks to look at now

    def _begin(self) -> None:
        """Start the thread, if it is not there: for the first driver, or because the back end has
        gone before that."""
        import threading

        with self._session:
            if self._wake >= 0 or self._closing:
                return
            self._calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in self.QUEUES]
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._watcher = threading.Thread(
                target=self._main, name=f"{self.name}-calls", daemon=True
            )
            self._watcher.start()

    def notify(self, index: int) -> None:
        if index < len(self._kicks):
            os.eventfd_write(self._kicks[index], 1)

    def started(self) -> None:
        with self._session:
            self._drop_record()
            if self.state == SERVED:
                try:
                    self._new_record()
                    self._hand_over([0] * len(self.slots))
                except HostError as err:
                    self._lost(str(err))
            elif self.state == DEAD and not self._can_fail():
                self.needs_reset(f"{self._connection.name} has ended")

    def _hand_over(self, bases: Sequence[int]) -> None:
        """Give the back end memory and rings, each to go on at its base."""
        connection, memory = self._connection, self.memory
        connection.set_u64(wire.SET_FEATURES, self.driver_features | 1 << wire.F_PROTOCOL_FEATURES)
        connection.set_mem_table(
            [(region.gpa, region.size, region.hva, region.fd) for region in memory.regions]
        )
        if self._inflight is not None:
            connection.set_inflight(self._inflight.fd, self._inflight.description)
        for index, slot in enumerate(self.slots):
            if slot.queue is None:
                continue
            connection.set_vring(wire.SET_VRING_NUM, index, slot.size)
            connection.set_vring(wire.SET_VRING_BASE, index, bases[index])
            # The ring's place was checked when the queue was made.
            connection.set_vring_addr(
                index, memory.hva(slot.desc), memory.hva(slot.device), memory.hva(slot.driver)
            )
            connection.set_vring_fd(wire.SET_VRING_CALL, index, self._calls[index])
            connection.set_vring_fd(wire.SET_VRING_KICK, index, self._kicks[index])
            connection.set_vring(wire.SET_VRING_ENABLE, index, 1)

    def drain(self) -> None:
        """Stop the back end's use of the rings."""
        with self._session:
            if not self.status & spec.DRIVER_OK or self.state != SERVED:
                return
            try:
                for index, slot in enumerate(self.slots):
                    if slot.queue is not None:
                        self._connection.get_vring_base(index)
            except BackEndGone as err:
                self._lost(str(err))

    def config_written(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data
        with self._session:
            try:
                if self.state == SERVED:
                    self._connection.set_config(offset, data)
            except BackEndGone as err:
                self._lost(str(err))

    def hold(self) -> None:
        """StateError: what the back end knows cannot be had, so it is not stopped either."""
        raise self._not_ours()

    def save(self) -> dict[str, object]:
        """StateError."""
        raise self._not_ours()

    def _not_ours(self) -> StateError:
        return StateError(
            f"{self.name} is served by another process ({self._connection.name}), whose state "
            "cannot be saved; make snapshots of machines without it"
        )

    def restore(self, state: dict[str, object]) -> None:
        """StateError."""
        raise StateError(f"{self.name} is served by another process and cannot be restored")

    # --- the thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while not self._closing:
                if self.state == SERVED:
                    self._pass_calls()
                elif self.state == AWAY:
                    select.select([self._wake], [], [], RETRY)
                    if not self._closing:
                        self._look_again()
                else:
                    self._answer()
        except BaseException as err:  # a bug of ours: the machine ends, the process does not
            self.on_bug(err)

    def _pass_calls(self) -> None:
        """Pass interrupts on, until the back end or the machine ends."""
        connection = self._connection
        poll = select.poll()
        poll.register(connection.sock, POLLRDHUP)
        poll.register(self._wake, select.POLLIN)
        indices = {fd: index for index, fd in enumerate(self._calls)}
        for fd in self._calls:
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                index = indices.get(fd)
                if index is not None:
                    os.eventfd_read(fd)
                    self.interrupt(index)
                elif fd == self._wake:  # the end, or somebody else found it gone
                    os.eventfd_read(fd)
                    return
                else:
                    with self._session:
                        if connection is self._connection:
                            self._lost(f"{connection.name} {self._how()}")
                    return

    def _how(self) -> str:
        """How the back end has ended."""
        if self._child is None or not self._child.wait(ENDS_WITHIN):
            return "has ended"
        return self._child.how()

    def _answer(self) -> None:
        """Answer requests with errors, until the machine ends or a driver comes."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        indices = {fd: index for index, fd in enumerate(self._kicks)}
        for fd in self._kicks:
            poll.register(fd, select.POLLIN)
        while not self._closing:
            for fd, _ in poll.poll():
                index = indices.get(fd)
                with suppress(BlockingIOError):  # the back end was quicker, before it died
                    os.eventfd_read(fd)
                if index is None:
                    return
                if self._can_fail():
                    super().notify(index)

    # --- when it is gone --------------------------------------------------------------------------

    def _lost(self, why: str) -> None:
        """The back end is gone; with the session's lock."""
        if self.state != SERVED or self._is_over():
            return
        said = self._child.said() if self._child is not None else ""
        why += f" ({said})" if said else ""
        running = bool(self.status & spec.DRIVER_OK) and not self.status & spec.DEVICE_NEEDS_RESET
        # What it had taken is known: from its record, or because there is nothing.
        known = self._inflight is not None or not running or self._idle()
        self.state = AWAY if self._redial is not None else DEAD
        if self.state == DEAD and self._can_fail() and known:
            self.complain(f"{why}; the guest gets I/O errors from now on")
            if running:
                self._take_over()
        elif self.state == AWAY and known:
            self.complain(f"{why}; requests wait until it is back")
        elif running:
            self.needs_reset(why)
        else:
            self.complain(why)
        self._connection.close()
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _can_fail(self) -> bool:
        return type(self).fail is not VhostUserDevice.fail

    def _idle(self) -> bool:
        """Whether the back end has given back all the driver has made available."""
        return all(
            self.memory.read_u16(slot.driver + 2) == used_index(self.memory, slot)
            for slot in self.slots
            if slot.queue is not None
        )

    def _heads(self, index: int) -> list[int]:
        """What the back end had taken of a queue."""
        if self._inflight is None:
            return []
        return self._inflight.heads(index, used_index(self.memory, self.slots[index]))

    def _take_over(self) -> None:
        """Fail what the back end had taken, and serve the rings ourselves."""
        if self._child is not None:
            # It may only have hung up, and must not touch the rings from now on.
            self._child.close(patience=ENDS_WITHIN, grace=ENDS_WITHIN)
        for index, slot in enumerate(self.slots):
            with slot.lock:
                queue = slot.queue
                if not isinstance(queue, SplitQueue):
                    continue
                try:
                    for chain in queue.take_over(self._heads(index)):
                        queue.push(chain, self.request(index, chain))
                except QueueError as err:
                    self.needs_reset(f"queue {index}: {err}")
                queue.publish()
            self.interrupt(index)
            os.eventfd_write(self._kicks[index], 1)

    def request(self, index: int, chain: Chain) -> int:
        return self.fail(chain) or 0

    def _look_again(self) -> None:
        """Try to find the back end again, and go on."""
        assert self._redial is not None
        try:
            connection = self._redial()
        except UsageError:
            return
        with self._session:
            self._trying = connection
            try:
                self._resume(connection)
            except HostError as err:
                connection.close()
                self.state = AWAY
                gone = isinstance(err, BackEndGone)
                if not gone and str(err) != self._refused:  # not four times a second
                    self._refused = str(err)
                    self.complain(f"{err}; requests wait until one is back that fits")
            finally:
                self._trying = None

    def _resume(self, connection: Connection) -> None:
        offered = self._introduce(connection)
        why = self.refuses(offered)
        if why:
            raise HostError(f"{connection.name} is back, {why}")
        config = self._get_config(connection) if self._config_bytes else self.config
        differs = self.differs(offered, bytes(config))
        missing = self.driver_features & ~offered & OFFERED
        running = bool(self.status & spec.DRIVER_OK) and not self.status & spec.DEVICE_NEEDS_RESET
        if running and missing:
            self.needs_reset(f"{connection.name} is back without features {missing:#x}")
            running = False
        self.features = offered & OFFERED
        self._connection, self.state = connection, SERVED
        self._refused = ""
        if running:
            if self._inflight is None:  # nothing is under way: see `_lost`
                self._new_record()
            self._hand_over([used_index(self.memory, slot) for slot in self.slots])
            for index in range(len(self.slots)):
                os.eventfd_write(self._kicks[index], 1)
                self.interrupt(index)  # the last one's may have been lost
        if config != self.config:
            self.config[:] = config
            self.config_changed()
        self.complain(f"{connection.name} is back" + (f", {differs}" if differs else ""))

    def _new_record(self) -> None:
        if self._records:
            asked = DESCRIPTION.pack(0, 0, len(self.slots), max(self.QUEUES))
            self._inflight = Inflight(*self._connection.get_inflight(asked))

    def _drop_record(self) -> None:
        record, self._inflight = self._inflight, None
        if record is not None:
            record.close()

    def close(self) -> None:
        self._closing = True
        trying = self._trying
        if trying is not None:  # it may not answer
            with suppress(OSError):
                trying.sock.shutdown(socket.SHUT_RDWR)
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)
            self._watcher.join()
            for fd in (self._wake, *self._calls):
                os.close(fd)
            self._wake = -1
        self._connection.close()
        self._drop_record()
        if self._child is not None:
            self._child.close()


def dial(path: str, option: str) -> Connection:
    """Connect to a back end that listens on the UNIX socket `path`. Raises UsageError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    drop_in_child(sock)
    try:
        sock.settimeout(wire.TIMEOUT)  # a full backlog is an error then
        unix.connect(sock, path)
    except OSError as err:
        sock.close()
        raise UsageError(f"{option}: cannot connect to {path}: {err.strerror or err}") from err
    return Connection(sock, path)


class Listener:
    """A socket for a back end that we start: it listens, and accepts us first.

    We are connected before it starts, so its path is gone again within microseconds: hardly ever
    does a monitor that is killed leave it.

    Args:
        count: how many connections to it are made.

    Attributes:
        sock: what the back end inherits.
    """

    def __init__(self, count: int = 1) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        drop_in_child(self.sock)
        self._ours: list[socket.socket] = []
        try:
            with unix.bound_for_now(self.sock) as path:
                self.sock.listen(count)
                for _ in range(count):
                    self._ours.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                    drop_in_child(self._ours[-1])
                    unix.connect(self._ours[-1], path)
        except BaseException:
            self.close()
            raise

    def take(self) -> list[socket.socket]:
        """Our ends; the listening one is in the back end's hands by now."""
        socks, self._ours = self._ours, []
        self.close()
        return socks

    def connect(self, name: str) -> Connection:
        """The one end of ours."""
        (sock,) = self.take()
        return Connection(sock, name)

    def close(self) -> None:
        """Close what nobody was given; harmless twice."""
        self.sock.close()
        for sock in self._ours:
            sock.close()
        self._ours = []
