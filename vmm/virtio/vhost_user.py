"""Devices another process serves (vhost-user): it reads the rings, we only negotiate.

Notifies go from KVM straight to the back end. Its interrupts come by here, because a transport has
a status to set for them. Guest memory must be shared (`memfd`). When the back end dies, the driver
is told to reset (DEVICE_NEEDS_RESET) and the person in a line.
"""

from __future__ import annotations

import os
import select
import socket

from vmm.errors import HostError, StateError, UsageError
from vmm.virtio import spec
from vmm.virtio import vhost_user_wire as wire
from vmm.virtio.device import VirtioDevice
from vmm.virtio.vhost_user_wire import BackEndGone, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.child import Child

OFFERED = (1 << 24) - 1 | spec.bits(spec.F_INDIRECT_DESC, spec.F_EVENT_IDX, spec.F_VERSION_1)
"""Feature bits that may pass from the back end to the driver: the device's own, split rings'."""
POLLRDHUP = 0x2000


class VhostUserDevice(VirtioDevice):
    """A device whose queues a back end serves.

    Args:
        name: for messages.
        connection: to the back end; closed with the device.
        queues: the size of each queue.
        config: bytes of configuration space to get from the back end (0: it has none).
        child: the back end's process, if we started it; ended with the device.
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
    ) -> None:
        self.QUEUES = tuple(queues)
        self._connection = connection
        self._child = child
        self._kicks: list[int] = []
        self._calls: list[int] = []
        self._hung_up = False
        self._wake = -1
        offered = connection.get_u64(wire.GET_FEATURES)
        if not offered >> wire.F_PROTOCOL_FEATURES & 1:
            raise HostError(f"{connection.name} has no vhost-user protocol features")
        protocol = connection.get_u64(wire.GET_PROTOCOL_FEATURES) & spec.bits(
            wire.PROTOCOL_F_MQ, wire.PROTOCOL_F_REPLY_ACK, wire.PROTOCOL_F_CONFIG
        )
        connection.set_u64(wire.SET_PROTOCOL_FEATURES, protocol)
        connection.ack = bool(protocol >> wire.PROTOCOL_F_REPLY_ACK & 1)
        connection.set_owner()
        if len(self.QUEUES) > 1 and protocol >> wire.PROTOCOL_F_MQ & 1:
            most = connection.get_u64(wire.GET_QUEUE_NUM)
            if most < len(self.QUEUES):
                raise HostError(f"{connection.name} has {most} queues, not {len(self.QUEUES)}")
        if not offered >> spec.F_VERSION_1 & 1:
            raise HostError(f"{connection.name} serves legacy devices only (no VERSION_1)")
        super().__init__(name)
        self.features = offered & OFFERED
        if config:
            if not protocol >> wire.PROTOCOL_F_CONFIG & 1:
                raise HostError(f"{connection.name} does not tell its configuration")
            self.config[:] = connection.get_config(config)

    def connect(self, kicks: Sequence[int]) -> None:
        """The eventfds KVM writes for a notify, one a queue."""
        import threading

        self._kicks = list(kicks)
        self._calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in kicks]
        if any(region.fd < 0 for region in self.memory.regions):
            raise UsageError(f"{self.name} needs shared guest memory; backing 'memfd'")
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._watcher = threading.Thread(target=self._watch, name=f"{self.name}-calls", daemon=True)
        self._watcher.start()

    def notify(self, index: int) -> None:
        if index < len(self._kicks):
            os.eventfd_write(self._kicks[index], 1)

    def started(self) -> None:
        try:
            self._hand_over()
        except BackEndGone as err:
            self._lost(str(err))

    def _hand_over(self) -> None:
        connection, memory = self._connection, self.memory
        connection.set_u64(wire.SET_FEATURES, self.driver_features | 1 << wire.F_PROTOCOL_FEATURES)
        connection.set_mem_table(
            [(region.gpa, region.size, region.hva, region.fd) for region in memory.regions]
        )
        for index, slot in enumerate(self.slots):
            if slot.queue is None:
                continue
            connection.set_vring(wire.SET_VRING_NUM, index, slot.size)
            connection.set_vring(wire.SET_VRING_BASE, index, 0)
            # The ring's place was checked when the queue was made.
            connection.set_vring_addr(
                index, memory.hva(slot.desc), memory.hva(slot.device), memory.hva(slot.driver)
            )
            connection.set_vring_fd(wire.SET_VRING_CALL, index, self._calls[index])
            connection.set_vring_fd(wire.SET_VRING_KICK, index, self._kicks[index])
            connection.set_vring(wire.SET_VRING_ENABLE, index, 1)

    def drain(self) -> None:
        """Stop the back end's use of the rings."""
        if not self.status & spec.DRIVER_OK or self._hung_up:
            return
        try:
            for index, slot in enumerate(self.slots):
                if slot.queue is not None:
                    self._connection.get_vring_base(index)
        except BackEndGone as err:
            self._lost(str(err))

    def config_written(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data
        try:
            self._connection.set_config(offset, data)
        except BackEndGone as err:
            self._lost(str(err))

    def save(self) -> dict[str, object]:
        """StateError: what the back end knows cannot be had."""
        raise StateError(
            f"{self.name} is served by another process ({self._connection.name}), whose state "
            "cannot be saved; make snapshots of machines without it"
        )

    def restore(self, state: dict[str, object]) -> None:
        """StateError."""
        raise StateError(f"{self.name} is served by another process and cannot be restored")

    def _watch(self) -> None:
        """Pass interrupts on, until the back end or the machine ends."""
        poll = select.poll()
        poll.register(self._connection.sock, POLLRDHUP)
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
                elif fd == self._wake:
                    return
                else:
                    self._lost(f"{self._connection.name} has ended")
                    return

    def _lost(self, why: str) -> None:
        if self._hung_up:
            return
        self._hung_up = True
        said = self._child.said() if self._child is not None else ""
        self.needs_reset(why + (f" ({said})" if said else ""))

    def close(self) -> None:
        self._hung_up = True
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)
            self._watcher.join()
            for fd in (self._wake, *self._calls):
                os.close(fd)
            self._wake = -1
        self._connection.close()
        if self._child is not None:
            self._child.close()


def dial(path: str, option: str) -> Connection:
    """Connect to a back end that listens on the UNIX socket `path`. Raises UsageError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as err:
        sock.close()
        raise UsageError(f"{option}: cannot connect to {path}: {err.strerror or err}") from err
    return Connection(sock, path)


class Listener:
    """A socket for a back end that we start: it listens, and accepts us first.

    We are connected before it starts, so its path is gone again within microseconds: hardly ever
    does a monitor that is killed leave it.

    Attributes:
        sock: what the back end inherits.
    """

    def __init__(self) -> None:
        import tempfile

        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ours: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with tempfile.TemporaryDirectory(prefix="vmm-") as directory:
                path = os.path.join(directory, "vhost-user")
                self.sock.bind(path)
                self.sock.listen(1)
                self._ours.connect(path)
        except BaseException:
            self.close()
            raise

    def connect(self, name: str) -> Connection:
        """Our end; the listening one is in the back end's hands by now."""
        assert self._ours is not None
        sock, self._ours = self._ours, None
        self.close()
        return Connection(sock, name)

    def close(self) -> None:
        """Close what nobody was given; harmless twice."""
        self.sock.close()
        if self._ours is not None:
            self._ours.close()
            self._ours = None
