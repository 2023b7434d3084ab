"""The MMIO transport (virtio 1.2, section 4.2): a device behind 512 bytes of registers.

Interrupts go by one irqfd, bound like the notifies' ioeventfds at the first DRIVER_OK.
"""

from __future__ import annotations

import os

from vmm.virtio import spec
from vmm.virtio.transport import HIGH, LOW, Transport

TYPE_CHECKING = False
if TYPE_CHECKING:
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


class MmioTransport(Transport):
    """Registers of `device`.

    Attributes:
        irq_fd: the eventfd that raises the device's interrupt.
    """

    LENGTH = LENGTH

    def __init__(self, device: VirtioDevice) -> None:
        super().__init__(device)
        self.irq_fd = -1
        try:
            self.irq_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        fd, self.irq_fd = self.irq_fd, -1
        if fd >= 0:
            os.close(fd)

    # --- interrupts -----------------------------------------------------------------------------

    def _interrupt(self, index: int) -> None:
        self._used = True
        os.eventfd_write(self.irq_fd, 1)

    def _config_interrupt(self) -> None:
        self._config = True
        os.eventfd_write(self.irq_fd, 1)

    def _interrupt_again(self) -> None:
        if self._used or self._config:
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
            return self._offered()
        if offset == CONFIG_GENERATION:
            return device.config_generation
        if SHM_LEN_LOW <= offset <= SHM_BASE_HIGH:
            return LOW  # no shared memory regions
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
        if offset == STATUS:
            self._set_status(value & 0xFF)
        elif offset == DEVICE_FEATURES_SEL:
            self._features_sel = value
        elif offset == DRIVER_FEATURES_SEL:
            self._driver_sel = value
        elif offset == DRIVER_FEATURES:
            self._accept(value)
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
                self._reset_queue()
        elif offset == QUEUE_RESET:
            if value & 1 and self.device.has(spec.F_RING_RESET):
                self._reset_queue()
        elif slot.queue is not None:
            pass  # 4.2.3.2: fixed while the queue is ready
        elif offset == QUEUE_NUM:
            slot.size = value
        else:
            name = _ADDRESSES.get(offset & ~7)
            if name is not None and offset < QUEUE_DEVICE + 8:
                old = getattr(slot, name)
                new = old & LOW | value << 32 if offset & 4 else old & HIGH | value
                setattr(slot, name, new)


_CONSTANT = {MAGIC_VALUE: MAGIC, VERSION_: VERSION, VENDOR_ID: VENDOR}
