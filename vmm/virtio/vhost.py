"""Rings that the host's kernel serves (vhost): /dev/vhost-net, /dev/vhost-vsock.

Notifies go from KVM straight to the kernel's worker. Its interrupts come by here, because a
transport has a status to set for them. Unlike another process's, its position in a ring can be had:
a device it serves is saved and restored as one of ours, and into one of ours.

Source: Linux, include/uapi/linux/vhost.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from _thread import RLock

from vmm.errors import HostError, UsageError
from vmm.virtio import spec
from vmm.virtio.vhost_user_inflight import used_index

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.memory import GuestMemory
    from vmm.virtio.device import QueueSlot, VirtioDevice

GET_FEATURES, SET_FEATURES = 0x8008AF00, 0x4008AF00
SET_OWNER = 0xAF01
SET_MEM_TABLE = 0x4008AF03
SET_VRING_NUM, SET_VRING_ADDR = 0x4008AF10, 0x4028AF11
SET_VRING_BASE, GET_VRING_BASE = 0x4008AF12, 0xC008AF12
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 0x4008AF20, 0x4008AF21, 0x4008AF22
NET_SET_BACKEND = 0x4008AF30
VSOCK_SET_GUEST_CID, VSOCK_SET_RUNNING = 0x4008AF60, 0x4004AF61

RINGS = spec.bits(spec.F_VERSION_1, spec.F_INDIRECT_DESC, spec.F_EVENT_IDX)
"""The features of rings that a vhost may have; no packed ones, and no reset of one queue."""
_STATE = struct.Struct("<II")
_ADDR = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")


class Vhost:
    """An open vhost descriptor, whose owner is this process.

    Args:
        path: the device node.
        option: for messages.

    Attributes:
        features: what it can do, as feature bits.

    Raises:
        HostError: there is none, or no permission; one line says what to do.
    """

    def __init__(self, path: str, option: str) -> None:
        module = os.path.basename(path).replace("-", "_")
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as err:
            from vmm.kvm.access import device_mend

            hint = device_mend(path, module, err.errno or 0)
            what = f"{option}: {path}: {err.strerror}"
            raise HostError(f"{what}; {hint}, or leave vhost out") from err
        try:
            answer = fcntl.ioctl(self.fd, GET_FEATURES, bytes(8))
            self.features = int.from_bytes(answer, "little")
            fcntl.ioctl(self.fd, SET_OWNER)
            if not self.features >> spec.F_VERSION_1 & 1:
                raise HostError(f"{option}: {path} serves legacy devices only (no VERSION_1)")
        except OSError as err:
            self.close()
            raise HostError(f"{option}: {path}: {err.strerror}") from err
        except BaseException:
            self.close()
            raise

    def set_features(self, features: int) -> None:
        """What of the driver's choice is for it to know."""
        fcntl.ioctl(self.fd, SET_FEATURES, (features & self.features).to_bytes(8, "little"))

    def set_memory(self, memory: GuestMemory) -> None:
        """Where guest memory is in this process."""
        table = struct.pack("<II", len(memory.regions), 0)
        for region in memory.regions:
            table += _REGION.pack(region.gpa, region.size, region.hva, 0)
        fcntl.ioctl(self.fd, SET_MEM_TABLE, table)

    def set_ring(
        self, index: int, slot: QueueSlot, memory: GuestMemory, base: int, fds: tuple[int, int, int]
    ) -> None:
        """Ring `index`, to go on at `base`; `fds`: kick, call, error. While it does not run."""
        fd = self.fd
        fcntl.ioctl(fd, SET_VRING_NUM, _STATE.pack(index, slot.size))
        fcntl.ioctl(fd, SET_VRING_BASE, _STATE.pack(index, base))
        addresses = [memory.hva(gpa) for gpa in (slot.desc, slot.device, slot.driver)]
        fcntl.ioctl(fd, SET_VRING_ADDR, _ADDR.pack(index, 0, *addresses, 0))
        for request, each in zip((SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR), fds, strict=True):
            fcntl.ioctl(fd, request, _STATE.pack(index, each))

    def base(self, index: int) -> int:
        """The next chain of ring `index` it would take; while it does not run."""
        return _STATE.unpack(fcntl.ioctl(self.fd, GET_VRING_BASE, _STATE.pack(index, 0)))[1]  # type: ignore[no-any-return]

    def set_backend(self, index: int, fd: int) -> None:
        """/dev/vhost-net: run ring `index` on the tap `fd`; -1: stop, nothing is under way then."""
        fcntl.ioctl(self.fd, NET_SET_BACKEND, struct.pack("<Ii", index, fd))

    def set_cid(self, cid: int, option: str) -> None:
        """/dev/vhost-vsock: the guest's address. Raises UsageError."""
        try:
            fcntl.ioctl(self.fd, VSOCK_SET_GUEST_CID, cid.to_bytes(8, "little"))
        except OSError as err:
            if err.errno == errno.EADDRINUSE:
                raise UsageError(f"{option}: another machine of this host has this cid") from err
            raise UsageError(f"{option}: {err.strerror}") from err

    def set_running(self, running: bool) -> None:
        """/dev/vhost-vsock: run its rings, or stop."""
        fcntl.ioctl(self.fd, VSOCK_SET_RUNNING, struct.pack("<i", running))

    def close(self) -> None:
        """Stop, and give it back; harmless twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class KernelQueues:
    """The first queues of `device`, two of each of `vhosts`, and the thread that passes interrupts.

    Used under the device's `control` lock. `lock` is for who runs and stops them, from any thread;
    no other lock is taken while it is held.
    """

    def __init__(self, device: VirtioDevice, vhosts: Sequence[Vhost]) -> None:
        self._device = device
        self.lock = RLock()
        self.vhosts = list(vhosts)
        self.indices = range(2 * len(vhosts))
        self.kicks: list[int] = []
        self._calls: list[int] = []
        self._errors: list[int] = []
        self._wake = -1

    def connect(self, kicks: Sequence[int]) -> None:
        """The eventfds KVM writes for a notify, one a queue."""
        import threading

        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.kicks = list(kicks)
        self._calls = [os.eventfd(0, flags) for _ in self.indices]
        self._errors = [os.eventfd(0, flags) for _ in self.indices]
        self._wake = os.eventfd(0, flags)
        self._thread = threading.Thread(
            target=self._main, name=f"{self._device.name}-calls", daemon=True
        )
        self._thread.start()

    def ready(self, number: int) -> bool:
        """Whether both queues of vhost `number` are enabled."""
        slots = self._device.slots[2 * number : 2 * number + 2]
        return all(slot.queue is not None for slot in slots)

    def begin(self) -> None:
        """Give the kernel what the driver has negotiated, and the rings. Raises OSError."""
        device = self._device
        for number, vhost in enumerate(self.vhosts):
            if not self.ready(number):
                continue
            vhost.set_features(device.driver_features)
            vhost.set_memory(device.memory)
            for ring in (0, 1):
                index = 2 * number + ring
                slot = device.slots[index]
                assert slot.queue is not None
                base = slot.queue.save()["last_avail"]
                fds = (self.kicks[index], self._calls[index], self._errors[index])
                vhost.set_ring(ring, slot, device.memory, int(base), fds)  # type: ignore[call-overload]

    def read_back(self) -> None:
        """Note in our rings how far the kernel has come; none of them runs."""
        for number, vhost in enumerate(self.vhosts):
            if self.ready(number):
                for ring in (0, 1):
                    slot = self._device.slots[2 * number + ring]
                    assert slot.queue is not None
                    used = used_index(self._device.memory, slot)
                    slot.queue.restore({"last_avail": vhost.base(ring), "next_used": used})

    def kick(self) -> None:
        """Have the kernel look at every ring."""
        for index in self.indices:
            os.eventfd_write(self.kicks[index], 1)

    def _main(self) -> None:
        """Pass interrupts on."""
        device = self._device
        poll = select.poll()
        indices = {fd: index for index, fd in enumerate(self._calls)}
        errors = {fd: index for index, fd in enumerate(self._errors)}
        for fd in (*indices, *errors, self._wake):
            poll.register(fd, select.POLLIN)
        try:
            while True:
                for fd, _ in poll.poll():
                    if fd == self._wake:
                        return
                    os.eventfd_read(fd)
                    index = indices.get(fd)
                    if index is not None:
                        device.interrupt(index)
                    else:
                        device.needs_reset(f"queue {errors[fd]}: the kernel finds it broken")
        except BaseException as err:  # a bug of ours: the machine ends, the process does not
            device.on_bug(err)

    def close(self) -> None:
        """Give everything back; harmless twice."""
        for vhost in self.vhosts:
            vhost.close()
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            for fd in (self._wake, *self._calls, *self._errors):
                os.close(fd)
            self._wake = -1
