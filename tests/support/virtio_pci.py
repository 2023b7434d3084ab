"""The driver's side of virtio over PCI, for tests: all it knows it finds in configuration space."""

from __future__ import annotations

import os
import random

from tests.support.virtio_driver import Driver
from tests.support.virtio_hostile import NUMBERS, Registers, Rig
from vmm import Machine, layout
from vmm.devices.bus import AddressSpace
from vmm.machine.virtio_pci import PciDevices
from vmm.pci import spec as pci
from vmm.pci.host import PciHost
from vmm.virtio import mmio
from vmm.virtio import pci as vp
from vmm.virtio.device import VirtioDevice
from vmm.virtio.pci import PciTransport
from vmm.virtio.transport import Transport

SLOT = 1
VECTOR_BASE = 0x40
ENABLED = pci.COMMAND_MEMORY | pci.COMMAND_MASTER


class Bus:
    """A bus with `device` in slot 1 (or, as that device's bus, `machine`'s own), and what a driver
    does there.

    Attributes:
        connected: the message each vector sends, as KVM would be told.
    """

    def __init__(self, device: VirtioDevice, machine: Machine | None = None) -> None:
        self.connected: dict[int, tuple[int, int]] = {}
        if machine is not None:
            devices = machine.platform.virtio
            assert isinstance(devices, PciDevices)
            transport = devices.transports[SLOT - 1]
            assert isinstance(transport, PciTransport)
            assert transport.device is device
            self.space, self.host, self.transport = machine.platform.mmio, devices.host, transport
            return
        self.space = AddressSpace("mmio", 64)
        self.host = PciHost(self.space, 0)
        self.space.add(layout.ECAM_BASE, layout.ECAM_SIZE, self.host)
        self.transport = PciTransport(device)
        self.host.add(self.transport.function, self.transport)
        self.transport.msix.connect = self._connect

    def _connect(self, vector: int, fd: int, address: int, data: int) -> None:
        assert fd == self.transport.msix.fd(vector)
        self.connected[vector] = (address, data)

    # --- configuration space ----------------------------------------------------------------------

    def config(self, register: int, size: int = 4) -> int:
        return self.space.read(layout.ECAM_BASE + (SLOT << 15) + register, size)

    def set_config(self, register: int, size: int, value: int) -> None:
        self.space.write(layout.ECAM_BASE + (SLOT << 15) + register, size, value)

    def capabilities(self) -> list[tuple[int, int]]:
        """(id, offset) of each, in the order of the list."""
        assert self.config(pci.STATUS, 2) & pci.STATUS_CAPABILITIES
        found: list[tuple[int, int]] = []
        at = self.config(pci.CAPABILITIES_POINTER, 1)
        while at:
            assert at >= pci.HEADER_SIZE
            assert at not in [offset for _, offset in found], "a capability list that loops"
            found.append((self.config(at, 1), at))
            at = self.config(at + 1, 1)
        return found

    def capability(self, ident: int) -> int:
        return next(at for each, at in self.capabilities() if each == ident)

    def bar(self, index: int) -> int:
        """Where BAR `index` is."""
        low = self.config(pci.BAR0 + 4 * index)
        high = self.config(pci.BAR0 + 4 * index + 4) if low & pci.BAR_64 else 0
        return high << 32 | low & ~pci.BAR_FLAGS

    def structures(self) -> dict[int, tuple[int, int]]:
        """(GPA, length) of virtio's structures, by cfg_type."""
        found = {}
        for ident, at in self.capabilities():
            if ident == pci.CAP_VENDOR and self.config(at + 3, 1) != vp.CAP_PCI_CFG:
                base = self.bar(self.config(at + 4, 1)) + self.config(at + 8)
                found[self.config(at + 3, 1)] = (base, self.config(at + 12))
        return found

    # --- set-up -----------------------------------------------------------------------------------

    def enable(self, at: int = 0) -> None:
        """Memory, bus master, MSI-X (the capability at `at`), all vectors with messages."""
        self.set_config(pci.COMMAND, 2, ENABLED)
        at = at or self.capability(pci.CAP_MSIX)
        control = self.config(at + pci.MSIX_CONTROL, 2)
        self.set_config(at + pci.MSIX_CONTROL, 2, control | pci.MSIX_ENABLE)
        table = self.config(at + 4)
        base = self.bar(table & 7) + (table & ~7)
        for vector in range((control & 0x7FF) + 1):
            entry = base + pci.MSIX_ENTRY * vector
            self.space.write(entry, 8, pci.MSI_ADDRESS)
            self.space.write(entry + 8, 8, VECTOR_BASE + vector)

    def close(self) -> None:
        self.host.close()


def common(offset: int) -> tuple[int, int] | None:
    """(offset, size) in the common configuration of what the MMIO register `offset` is."""
    if offset in _COMMON:
        return _COMMON[offset]
    for first, there in _ADDRESSES.items():
        if first <= offset < first + 8:
            return there + offset - first, 4
    return None


_COMMON = {
    mmio.STATUS: (vp.DEVICE_STATUS, 1),
    mmio.DEVICE_FEATURES_SEL: (vp.DEVICE_FEATURE_SELECT, 4),
    mmio.DEVICE_FEATURES: (vp.DEVICE_FEATURE, 4),
    mmio.DRIVER_FEATURES_SEL: (vp.DRIVER_FEATURE_SELECT, 4),
    mmio.DRIVER_FEATURES: (vp.DRIVER_FEATURE, 4),
    mmio.QUEUE_SEL: (vp.QUEUE_SELECT, 2),
    mmio.QUEUE_NUM_MAX: (vp.QUEUE_SIZE, 2),
    mmio.QUEUE_NUM: (vp.QUEUE_SIZE, 2),
    mmio.QUEUE_READY: (vp.QUEUE_ENABLE, 2),
    mmio.QUEUE_RESET: (vp.QUEUE_RESET, 2),
    mmio.CONFIG_GENERATION: (vp.CONFIG_GENERATION, 1),
}
_ADDRESSES = {
    mmio.QUEUE_DESC: vp.QUEUE_DESC,
    mmio.QUEUE_DRIVER: vp.QUEUE_DRIVER,
    mmio.QUEUE_DEVICE: vp.QUEUE_DEVICE,
}


class PciDriver(Driver):
    """`Driver` over PCI, vector 0 for the configuration and 1 + n for queue n."""

    def attach(self, device: VirtioDevice) -> Transport:
        self.bus = Bus(device)
        self.find()
        return self.bus.transport

    def find(self) -> None:
        self.bus.enable()
        self.places = {kind: base for kind, (base, _) in self.bus.structures().items()}

    def __exit__(self, *exc: object) -> None:
        self.bus.close()
        super().__exit__(*exc)

    def read(self, offset: int, size: int = 4) -> int:
        if offset >= mmio.CONFIG:
            place = self.places.get(vp.CAP_DEVICE_CFG)
            return 0 if place is None else self.bus.space.read(place + offset - mmio.CONFIG, size)
        found = common(offset)
        assert found is not None, f"the PCI transport has no register for {offset:#x}"
        return self.bus.space.read(self.places[vp.CAP_COMMON_CFG] + found[0], found[1])

    def write(self, offset: int, value: int, size: int = 4) -> None:
        space = self.bus.space
        if offset >= mmio.CONFIG:
            space.write(self.places[vp.CAP_DEVICE_CFG] + offset - mmio.CONFIG, size, value)
        elif offset == mmio.QUEUE_NOTIFY:
            space.write(self.places[vp.CAP_NOTIFY_CFG] + vp.NOTIFY_MULTIPLIER * value, 2, value)
        else:
            if offset == mmio.QUEUE_READY and not value:
                offset, value = mmio.QUEUE_RESET, 1
            found = common(offset)
            assert found is not None, f"the PCI transport has no register for {offset:#x}"
            value &= (1 << 8 * found[1]) - 1
            space.write(self.places[vp.CAP_COMMON_CFG] + found[0], found[1], value)

    def negotiate(self) -> None:
        super().negotiate()
        self._set(vp.CONFIG_MSIX_VECTOR, 0)

    def enable(self, index: int) -> None:
        self.write(mmio.QUEUE_SEL, index)
        self._set(vp.QUEUE_MSIX_VECTOR, index + 1)
        super().enable(index)

    def _set(self, register: int, vector: int) -> None:
        place = self.places[vp.CAP_COMMON_CFG] + register
        self.bus.space.write(place, 2, vector)
        assert self.bus.space.read(place, 2) == vector

    def take_interrupts(self) -> int:
        """1 if a queue's message was sent, 2 if the configuration's, 3 both."""
        status = 0
        for vector in range(self.bus.transport.msix.vectors):
            fd = self.bus.transport.msix.fd(vector)
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                continue
            status |= 1 if vector else 2
        return status


class MachineDriver(PciDriver):
    """`PciDriver` for a device of `machine`, as its guest would drive it."""

    def __init__(self, machine: Machine, device: VirtioDevice, **options: bool) -> None:
        self.machine = machine
        super().__init__(device, memory=machine.memory, **options)

    def attach(self, device: VirtioDevice) -> Transport:
        self.bus = Bus(device, self.machine)
        self.find()
        return self.bus.transport

    def __exit__(self, *exc: object) -> None:
        self.machine.close()


class PciRegisters(Registers):
    """For the generator of tests.support.virtio_hostile: the registers, BARs and configuration."""

    def __init__(self, device: VirtioDevice) -> None:
        self.bus = Bus(device)
        self._express = self.bus.capability(pci.CAP_EXPRESS)
        self._msix = self.bus.capability(pci.CAP_MSIX)
        self._bars = {index: self.bus.bar(index) for index in (vp.MSIX_BAR, vp.VIRTIO_BAR)}
        self.places = {kind: base for kind, (base, _) in self.bus.structures().items()}

    def back(self) -> None:
        """After a function level reset: where a driver that has just found it leaves it."""
        bus = self.bus
        bus.set_config(self._express + pci.EXPRESS_DEVICE_CONTROL, 2, pci.DEVCTL_FLR)
        for index, base in self._bars.items():
            bus.transport.function.place_bar(index, base)
        bus.enable(self._msix)

    def _at(self, register: int, size: int, value: int) -> None:
        self.bus.space.write(self.places[vp.CAP_COMMON_CFG] + register, size, value)

    def reset(self) -> None:
        self.back()
        super().reset()

    def status(self) -> int:
        return self.bus.space.read(self.places[vp.CAP_COMMON_CFG] + vp.DEVICE_STATUS, 1)

    def set_status(self, value: int) -> None:
        self._at(vp.DEVICE_STATUS, 1, value & 0xFF)

    def set_features(self, mask: int) -> None:
        for half in (0, 1):
            self._at(vp.DRIVER_FEATURE_SELECT, 4, half)
            self._at(vp.DRIVER_FEATURE, 4, mask >> 32 * half & 0xFFFFFFFF)

    def set_queue(self, index: int, size: int, addresses: tuple[int, int, int]) -> None:
        self._at(vp.QUEUE_SELECT, 2, index & 0xFFFF)
        self._at(vp.QUEUE_SIZE, 2, size & 0xFFFF)
        self._at(vp.QUEUE_MSIX_VECTOR, 2, index + 1 & 0xFFFF)
        for register, gpa in zip(
            (vp.QUEUE_DESC, vp.QUEUE_DRIVER, vp.QUEUE_DEVICE), addresses, strict=True
        ):
            self._at(register, 4, gpa & 0xFFFFFFFF)
            self._at(register + 4, 4, gpa >> 32)

    def enable(self, index: int) -> None:
        self._at(vp.QUEUE_SELECT, 2, index & 0xFFFF)
        self._at(vp.QUEUE_ENABLE, 2, 1)

    def reset_queue(self, index: int) -> None:
        self._at(vp.QUEUE_SELECT, 2, index & 0xFFFF)
        self._at(vp.QUEUE_RESET, 2, 1)

    def notify(self, index: int) -> None:
        place = self.places[vp.CAP_NOTIFY_CFG] + vp.NOTIFY_MULTIPLIER * index
        self.bus.space.write(place, 2, index & 0xFFFF)

    def write_config(self, offset: int, size: int, value: int) -> None:
        place = self.places.get(vp.CAP_DEVICE_CFG, self.bus.bar(vp.VIRTIO_BAR) + vp.DEVICE)
        self.bus.space.write(place + offset, size, value)

    def driver(self, rig: Rig) -> Driver:
        return _Borrowed(rig, self)

    def close(self) -> None:
        self.bus.close()

    def poke(self, chance: random.Random) -> None:
        size = chance.choice((1, 2, 2, 4, 4, 4, 8))
        kind = chance.random()
        if kind < 0.4:
            base, length = self.bus.bar(vp.VIRTIO_BAR), vp.COMMON_LENGTH
        elif kind < 0.55:
            base, length = self.bus.bar(vp.VIRTIO_BAR), vp.LENGTH
        elif kind < 0.7:
            base, length = self.bus.bar(vp.MSIX_BAR), 0x1000
        else:
            base, length = layout.ECAM_BASE + (SLOT << 15), 0x120
        offset = chance.randrange(length - size + 1)
        if chance.random() < 0.7:
            offset &= ~(size - 1)
        if chance.random() < 0.5:
            value = self.bus.space.read(base + offset, size)
            assert 0 <= value < 1 << 8 * size, f"{base + offset:#x}, {size} bytes: {value:#x}"
        else:
            value = chance.choice(NUMBERS) if chance.random() < 0.5 else chance.getrandbits(64)
            self.bus.space.write(base + offset, size, value & (1 << 8 * size) - 1)


class _Borrowed(PciDriver):
    """A `PciDriver` with the bus and memory of a rig."""

    def __init__(self, rig: Rig, registers: PciRegisters) -> None:
        self.memory, self.device, self.bus = rig.memory, rig.device, registers.bus
        self.transport = self.bus.transport
        self.packed, self.event_idx = rig.packed, rig.event_idx
        self.size, self.without = 16, 0
        self.rings = []
        registers.back()
        self.find()
        self.start()
