"""The PCI transport (virtio 1.2, section 4.1): a modern device, without the legacy interface.

BAR 4 (64 bits) has the structures, BAR 1 MSI-X: a vector a queue and one for the configuration.
Each queue has a notify address of its own, so an ioeventfd needs no data match. There is no INTx
line (interrupt pin 0): drivers without MSI-X poll, or read ISR.
"""

from __future__ import annotations

import struct
from _thread import allocate_lock

from vmm.devices.device import state_int
from vmm.errors import ShapeError
from vmm.pci import spec as pci
from vmm.pci.function import PciFunction
from vmm.pci.msix import Msix
from vmm.virtio import spec
from vmm.virtio.transport import HIGH, LOW, Transport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.shapes import Table
    from vmm.virtio.device import QueueSlot, VirtioDevice

VENDOR = 0x1AF4
DEVICE_BASE = 0x1040
REVISION = 1

CLASSES = {
    spec.ID_NET: pci.CLASS_NETWORK,
    spec.ID_BLOCK: pci.CLASS_MASS_STORAGE,
    spec.ID_CONSOLE: pci.CLASS_COMMUNICATION,
    spec.ID_VSOCK: pci.CLASS_COMMUNICATION,
    spec.ID_FS: pci.CLASS_MASS_STORAGE,
}

MSIX_BAR = 1
VIRTIO_BAR = 4
COMMON, ISR, DEVICE, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
"""Where each structure is in BAR 4, with 4 KiB of room."""
NOTIFY_MULTIPLIER = 4
LENGTH = 0x4000
QUEUES_MAX = (LENGTH - NOTIFY) // NOTIFY_MULTIPLIER

# --- virtio_pci_cap.cfg_type (4.1.4) --------------------------------------------------------------
CAP_COMMON_CFG = 1
CAP_NOTIFY_CFG = 2
CAP_ISR_CFG = 3
CAP_DEVICE_CFG = 4
CAP_PCI_CFG = 5
_CAP = struct.Struct("<BBBBHII")
"""After id and next: cap_len, cfg_type, bar, id, padding, offset, length."""
_CAP_BAR, _CAP_OFFSET, _CAP_LENGTH, _CAP_DATA = 4, 8, 12, 16

# --- virtio_pci_common_cfg (4.1.4.3): offsets -----------------------------------------------------
DEVICE_FEATURE_SELECT = 0x00
DEVICE_FEATURE = 0x04
DRIVER_FEATURE_SELECT = 0x08
DRIVER_FEATURE = 0x0C
CONFIG_MSIX_VECTOR = 0x10
NUM_QUEUES = 0x12
DEVICE_STATUS = 0x14
CONFIG_GENERATION = 0x15
QUEUE_SELECT = 0x16
QUEUE_SIZE = 0x18
QUEUE_MSIX_VECTOR = 0x1A
QUEUE_ENABLE = 0x1C
QUEUE_NOTIFY_OFF = 0x1E
QUEUE_DESC = 0x20
QUEUE_DRIVER = 0x28
QUEUE_DEVICE = 0x30
QUEUE_RESET = 0x3A
COMMON_LENGTH = 0x3C
NO_VECTOR = 0xFFFF

_SIZES = {
    DEVICE_FEATURE_SELECT: 4, DEVICE_FEATURE: 4, DRIVER_FEATURE_SELECT: 4, DRIVER_FEATURE: 4,
    CONFIG_MSIX_VECTOR: 2, NUM_QUEUES: 2, DEVICE_STATUS: 1, CONFIG_GENERATION: 1, QUEUE_SELECT: 2,
    QUEUE_SIZE: 2, QUEUE_MSIX_VECTOR: 2, QUEUE_ENABLE: 2, QUEUE_NOTIFY_OFF: 2, QUEUE_DESC: 4,
    QUEUE_DESC + 4: 4, QUEUE_DRIVER: 4, QUEUE_DRIVER + 4: 4, QUEUE_DEVICE: 4, QUEUE_DEVICE + 4: 4,
    QUEUE_RESET: 2,
}  # fmt: skip
"""4.1.3.1: each is accessed by its own width, 64-bit fields by their halves."""
_ADDRESSES = {QUEUE_DESC: "desc", QUEUE_DRIVER: "driver", QUEUE_DEVICE: "device"}


class PciTransport(Transport):
    """`device` as a PCI function; as a device on the bus, it is what answers in BAR 4.

    Attributes:
        function: for the host bridge.
        msix: its vectors.
        on_place: told where the queues' notify addresses are now, or None: the ioeventfds follow.
    """

    LENGTH = LENGTH

    def __init__(self, device: VirtioDevice) -> None:
        if len(device.slots) > QUEUES_MAX:
            raise ValueError(f"{device.name}: more than {QUEUES_MAX} queues")
        super().__init__(device)
        self._vectors = [NO_VECTOR] * len(device.slots)
        self._config_vector = NO_VECTOR
        self.on_place: Callable[[int | None], None] | None = None
        self._base: int | None = None
        self._place_lock = allocate_lock()
        function = self.function = PciFunction(
            device.name,
            VENDOR,
            DEVICE_BASE + device.ID,
            CLASSES.get(device.ID, pci.CLASS_OTHER),
            revision=REVISION,
            subsystem=(VENDOR, DEVICE_BASE + device.ID),
        )
        self.msix = Msix(function, MSIX_BAR, len(device.slots) + 1)
        function.add_bar(VIRTIO_BAR, LENGTH, self, wide=True).moved = self._moved
        function.add_express()
        self._capability(CAP_COMMON_CFG, COMMON, COMMON_LENGTH)
        multiplier = struct.pack("<I", NOTIFY_MULTIPLIER)
        self._capability(CAP_NOTIFY_CFG, NOTIFY, NOTIFY_MULTIPLIER * len(device.slots), multiplier)
        self._capability(CAP_ISR_CFG, ISR, 1)
        if device.config:
            self._capability(CAP_DEVICE_CFG, DEVICE, len(device.config))
        window = self._window = self._capability(CAP_PCI_CFG, 0, 0, bytes(4))
        function.on_read(window + _CAP_DATA, self._window_read)
        function.on_write(window + _CAP_DATA, self._window_written)
        function.on_command = self.msix.update
        function.on_reset = self.reset

    def _capability(self, kind: int, offset: int, length: int, more: bytes = b"") -> int:
        bar, mask = VIRTIO_BAR, b""
        if kind == CAP_PCI_CFG:
            bar, mask = 0, _CAP.pack(0, 0, 0xFF, 0, 0, LOW, LOW) + b"\xff" * len(more)
        size = 2 + _CAP.size + len(more)
        body = _CAP.pack(size, kind, bar, 0, 0, offset, length) + more
        return self.function.add_capability(pci.CAP_VENDOR, body, mask)

    def close(self) -> None:
        super().close()
        self.msix.close()

    # --- interrupts -----------------------------------------------------------------------------

    def _interrupt(self, index: int) -> None:
        if self.msix.enabled:
            self.msix.raise_vector(self._vectors[index])
        else:
            self._used = True

    def _config_interrupt(self) -> None:
        self._config = True
        self.msix.raise_vector(self._config_vector)

    def _interrupt_again(self) -> None:
        for vector in {*self._vectors, *([self._config_vector] if self._config else [])}:
            self.msix.raise_vector(vector)

    # --- where it is ------------------------------------------------------------------------------

    def _moved(self, base: int | None) -> None:
        with self._place_lock:
            self._base = None if base is None else base + NOTIFY
            if self.on_place is not None:
                self.on_place(self._base)

    def follow(self, on_place: Callable[[int | None], None]) -> None:
        """Have `on_place` told where the notify addresses are, now and after each move."""
        with self._place_lock:
            self.on_place = on_place
            on_place(self._base)

    # --- BAR 4 ------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset < ISR:
            return self._common(offset) if _SIZES.get(offset) == size else 0
        if DEVICE <= offset < NOTIFY:
            return self.device.read_config(offset - DEVICE, size)
        if offset == ISR:
            return self._take_isr()
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= NOTIFY:
            self.notify((offset - NOTIFY) // NOTIFY_MULTIPLIER)
        elif offset >= DEVICE:
            self.device.write_config(offset - DEVICE, size, value)
        elif _SIZES.get(offset) == size:
            with self.device.control:
                self._control(offset, value)

    def _take_isr(self) -> int:
        """Reading clears; only what was seen, for device threads set the flags meanwhile."""
        status = 0
        if self._used:
            self._used = False
            status = 1
        if self._config:
            self._config = False
            status |= 2
        return status

    def _common(self, offset: int) -> int:
        device = self.device
        if offset == DEVICE_STATUS:
            return device.status
        if offset == CONFIG_GENERATION:
            return device.config_generation
        if offset == DEVICE_FEATURE_SELECT:
            return self._features_sel
        if offset == DEVICE_FEATURE:
            return self._offered()
        if offset == DRIVER_FEATURE_SELECT:
            return self._driver_sel
        if offset == DRIVER_FEATURE:
            return self._accepted()
        if offset == CONFIG_MSIX_VECTOR:
            return self._config_vector
        if offset == NUM_QUEUES:
            return len(device.slots)
        if offset == QUEUE_SELECT:
            return self._queue_sel
        slot = self._slot()
        if slot is None:
            return NO_VECTOR if offset == QUEUE_MSIX_VECTOR else 0
        if offset == QUEUE_SIZE:
            return slot.size
        if offset == QUEUE_MSIX_VECTOR:
            return self._vectors[self._queue_sel]
        if offset == QUEUE_ENABLE:
            return int(slot.queue is not None)
        if offset == QUEUE_NOTIFY_OFF:
            return self._queue_sel
        if offset == QUEUE_RESET:
            return 0  # done when the write of 1 returns
        address: int = getattr(slot, _ADDRESSES[offset & ~7])
        return address >> 32 if offset & 4 else address & LOW

    def _control(self, offset: int, value: int) -> None:
        """Registers that two vCPUs must not write at the same time."""
        if offset == DEVICE_STATUS:
            self._set_status(value)
        elif offset == DEVICE_FEATURE_SELECT:
            self._features_sel = value
        elif offset == DRIVER_FEATURE_SELECT:
            self._driver_sel = value
        elif offset == DRIVER_FEATURE:
            self._accept(value)
        elif offset == CONFIG_MSIX_VECTOR:
            self._config_vector = self._vector(value)
        elif offset == QUEUE_SELECT:
            self._queue_sel = value
        else:
            slot = self._slot()
            if slot is not None:
                self._configure(slot, offset, value)

    def _configure(self, slot: QueueSlot, offset: int, value: int) -> None:
        if offset == QUEUE_MSIX_VECTOR:
            self._vectors[self._queue_sel] = self._vector(value)
        elif offset == QUEUE_RESET:
            if value == 1 and self.device.has(spec.F_RING_RESET):
                self._reset_queue()
                self._vectors[self._queue_sel] = NO_VECTOR
        elif slot.queue is not None:
            pass  # 4.1.4.3.2: fixed while the queue is enabled
        elif offset == QUEUE_ENABLE:
            if value == 1:
                self.device.enable_queue(self._queue_sel)
        elif offset == QUEUE_SIZE:
            slot.size = value
        else:
            name = _ADDRESSES.get(offset & ~7)
            if name is not None:
                old = getattr(slot, name)
                setattr(slot, name, old & LOW | value << 32 if offset & 4 else old & HIGH | value)

    def _vector(self, value: int) -> int:
        """4.1.5.1.2: what cannot be mapped reads back as no vector."""
        return value if value < self.msix.vectors else NO_VECTOR

    def _forget(self) -> None:
        self._config_vector = NO_VECTOR
        self._vectors = [NO_VECTOR] * len(self._vectors)

    def reset(self) -> None:
        """Function level reset."""
        with self.device.control:
            self._set_status(0)
        self.msix.reset()

    # --- virtio_pci_cfg_cap (4.1.4.9): BARs by way of configuration space -------------------------

    def _target(self) -> tuple[Transport | Msix, int, int] | None:
        function, at = self.function, self._window
        bar = function.bars.get(function.get(at + _CAP_BAR, 1))
        offset = function.get(at + _CAP_OFFSET, 4)
        length = function.get(at + _CAP_LENGTH, 4)
        if bar is None or length not in (1, 2, 4) or offset % length:
            return None
        if offset + length > bar.size:
            return None
        return (self.msix if bar.index == MSIX_BAR else self), offset, length

    def _window_read(self) -> None:
        target = self._target()
        if target is not None:
            device, offset, length = target
            at = self._window + _CAP_DATA
            value = device.read(offset, length)
            self.function.config[at : at + length] = value.to_bytes(length, "little")

    def _window_written(self) -> None:
        target = self._target()
        if target is not None:
            device, offset, length = target
            device.write(offset, length, self.function.get(self._window + _CAP_DATA, length))

    # --- state ------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {
            **super().save(),
            "msix": self.msix.save(),
            "config_vector": self._config_vector,
            "vectors": list(self._vectors),
        }

    def shape(self) -> Table:
        from vmm.shapes import Items, Whole

        vector = Whole(0, NO_VECTOR)
        return (
            super()
            .shape()
            .with_more(
                msix=self.msix.shape(),
                config_vector=vector,
                vectors=Items(vector, len(self._vectors)),
            )
        )

    def restore(self, state: dict[str, object]) -> None:
        """After the bus, whose configuration spaces say which vectors are open."""
        vectors, msix = state["vectors"], state["msix"]
        if not isinstance(vectors, list) or len(vectors) != len(self._vectors):
            raise ShapeError(f"state of {self.name}: not {len(self._vectors)} queues' vectors")
        if not isinstance(msix, dict):
            raise ShapeError(f"state of {self.name}: no MSI-X in it")
        super().restore(state)
        self.msix.restore(msix)
        self._config_vector = self._vector(state_int(state, "config_vector", NO_VECTOR))
        self._vectors = [self._vector(int(vector) & NO_VECTOR) for vector in vectors]
