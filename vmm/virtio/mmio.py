"""The MMIO transport (virtio 1.2, section 4.2): a device behind 512 bytes of registers.

Notifies come by ioeventfd and interrupts go by irqfd, both made when the driver first says
DRIVER_OK: a device no driver takes costs nothing. Until a queue has somebody who serves its
descriptor, a notify is served in the thread it comes from.
"""

from __future__ import annotations

import os

from vmm.devices.device import Device
from vmm.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.virtio.device import QueueSlot, VirtioDevice

LENGTH = 0x200
MAGIC = 0x74726976
VERSION = 2
VENDOR = 0x4D4D56
"""`VMM`."""

MAGIC_VALUE = 0x000
VERSION_ = 0x004
DEVICE_ID = 0x008
VENDOR_ID = 0x00C
DEVICE_FEATURES = 0x010
DEVICE_FEATURES_SEL = 0x014
DRIVER_FEATURES = 0x020
DRIVER_FEATURES_SEL = 0x024
QUEUE_SEL = 0x030
QUEUE_NUM_MAX = 0x034
QUEUE_NUM = 0x038
QUEUE_READY = 0x044
QUEUE_NOTIFY = 0x050
INTERRUPT_STATUS = 0x060
INTERRUPT_ACK = 0x064
STATUS = 0x070
QUEUE_DESC = 0x080
QUEUE_DRIVER = 0x090
QUEUE_DEVICE = 0x0A0
SHM_LEN_LOW = 0x0B0
SHM_BASE_HIGH = 0x0BC
QUEUE_RESET = 0x0C0
CONFIG_GENERATION = 0x0FC
CONFIG = 0x100

_ADDRESSES = {QUEUE_DESC: "desc", QUEUE_DRIVER: "driver", QUEUE_DEVICE: "device"}
_LOW, _HIGH = 0xFFFFFFFF, 0xFFFFFFFF << 32


class MmioTransport(Device):
    """Registers of `device`.

    Attributes:
        irq_fd: the eventfd that raises the device's interrupt.
        notify_fds: an eventfd a queue; whoever serves the queue reads it.
        on_driver_ok: called once, before the first DRIVER_OK takes effect: connects the
            descriptors to KVM.
        served: somebody reads `notify_fds`.
    """

    LENGTH = LENGTH

    def __init__(self, device: VirtioDevice) -> None:
        super().__init__(device.name)
        self.device = device
        self.irq_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.notify_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in device.slots]
        self.on_driver_ok: Callable[[], None] | None = None
        self.served = False
        # Two flags, not one word: device threads set the first while the driver clears it.
        self._used = False
        self._config = False
        self._features_sel = self._driver_sel = self._queue_sel = 0
        self._driver_features = 0
        device.interrupt = self._interrupt
        device.config_interrupt = self._config_interrupt

    def close(self) -> None:
        self.device.close()
        fds, self.notify_fds = [*self.notify_fds, self.irq_fd], []
        self.irq_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    # --- interrupts -----------------------------------------------------------------------------

    def _interrupt(self, index: int) -> None:
        self._used = True
        os.eventfd_write(self.irq_fd, 1)

    def _config_interrupt(self) -> None:
        self._config = True
        os.eventfd_write(self.irq_fd, 1)

    # --- registers ------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        device = self.device
        if offset >= CONFIG:
            return device.read_config(offset - CONFIG, size)
        if size != 4 or offset & 3:
            return 0  # 4.2.2.2: 32-bit aligned accesses only
        if offset == INTERRUPT_STATUS:
            return self._used | self._config << 1
        if offset == STATUS:
            return device.status
        if offset == DEVICE_FEATURES:
            return device.features >> 32 * min(self._features_sel, 2) & _LOW
        if offset == CONFIG_GENERATION:
            return device.config_generation
        if SHM_LEN_LOW <= offset <= SHM_BASE_HIGH:
            return _LOW  # no shared memory regions
        slot = self._slot()
        if offset == QUEUE_NUM_MAX:
            return slot.size_max if slot is not None else 0
        if offset == QUEUE_READY:
            return int(slot is not None and slot.queue is not None)
        return _CONSTANT.get(offset, 0) if offset != DEVICE_ID else device.ID

    def write(self, offset: int, size: int, value: int) -> None:
        device = self.device
        if offset >= CONFIG:
            device.write_config(offset - CONFIG, size, value)
            return
        if size != 4 or offset & 3:
            return
        if offset == QUEUE_NOTIFY:
            self.notify(value)
        elif offset == INTERRUPT_ACK:
            if value & 1:
                self._used = False
            if value & 2:
                self._config = False
        else:
            with device.control:
                self._control(offset, value)

    def _control(self, offset: int, value: int) -> None:
        """Registers that two vCPUs must not write at the same time."""
        device = self.device
        if offset == STATUS:
            self._set_status(value & 0xFF)
        elif offset == DEVICE_FEATURES_SEL:
            self._features_sel = value
        elif offset == DRIVER_FEATURES_SEL:
            self._driver_sel = value
        elif offset == DRIVER_FEATURES:
            if self._driver_sel < 2:
                shift = 32 * self._driver_sel
                self._driver_features &= ~(_LOW << shift)
                self._driver_features |= value << shift
                device.accept_features(self._driver_features)
        elif offset == QUEUE_SEL:
            self._queue_sel = value
        else:
            slot = self._slot()
            if slot is not None:
                self._configure(slot, offset, value)

    def _configure(self, slot: QueueSlot, offset: int, value: int) -> None:
        if offset == QUEUE_READY:
            if value & 1:
                self.device.enable_queue(self._queue_sel)
            else:
                self.device.reset_queue(self._queue_sel)
        elif offset == QUEUE_RESET:
            if value & 1 and self.device.has(spec.F_RING_RESET):
                self.device.reset_queue(self._queue_sel)
        elif slot.queue is not None:
            pass  # 4.2.3.2: fixed while the queue is ready
        elif offset == QUEUE_NUM:
            slot.size = value
        else:
            name = _ADDRESSES.get(offset & ~7)
            if name is not None and offset < QUEUE_DEVICE + 8:
                old = getattr(slot, name)
                new = old & _LOW | value << 32 if offset & 4 else old & _HIGH | value
                setattr(slot, name, new)

    def _slot(self) -> QueueSlot | None:
        slots = self.device.slots
        return slots[self._queue_sel] if self._queue_sel < len(slots) else None

    def _set_status(self, status: int) -> None:
        device = self.device
        if not status:
            device.set_status(0)
            self._used = self._config = False
            self._driver_features = self._driver_sel = self._features_sel = self._queue_sel = 0
            return
        before = device.status
        if status & spec.DRIVER_OK and self.on_driver_ok is not None:
            connect, self.on_driver_ok = self.on_driver_ok, None
            connect()
        device.set_status(status)
        if device.status & ~before & spec.DRIVER_OK:
            for index in range(len(device.slots)):  # buffers made available before DRIVER_OK
                self.notify(index)

    def notify(self, index: int) -> None:
        """The driver's notify of queue `index`, where no ioeventfd took it."""
        if index < len(self.notify_fds):
            if self.served:
                os.eventfd_write(self.notify_fds[index], 1)
            else:
                self.device.notify(index)

    # --- state ------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {
            "device": self.device.save(),
            "interrupt": self._used | self._config << 1,
            "features_sel": self._features_sel,
            "driver_sel": self._driver_sel,
            "queue_sel": self._queue_sel,
            "driver_features": self._driver_features,
        }

    def restore(self, state: dict[str, object]) -> None:
        from vmm.devices.device import state_int

        device = state["device"]
        if not isinstance(device, dict):
            raise TypeError(f"state of {self.name}: no device in it")
        self.device.restore(device)
        pending = state_int(state, "interrupt", 3)
        self._used, self._config = bool(pending & 1), bool(pending & 2)
        self._features_sel = state_int(state, "features_sel", _LOW)
        self._driver_sel = state_int(state, "driver_sel", _LOW)
        self._queue_sel = state_int(state, "queue_sel", _LOW)
        self._driver_features = state_int(state, "driver_features", (1 << 64) - 1)

    def reset(self) -> None:
        self._set_status(0)


_CONSTANT = {MAGIC_VALUE: MAGIC, VERSION_: VERSION, VENDOR_ID: VENDOR}
