"""A machine's PCI bus and the virtio devices on it: BARs, ioeventfds and MSI-X reach KVM here."""

from __future__ import annotations

from vmm import layout
from vmm.kvm import constants
from vmm.machine.routing import Routing
from vmm.machine.virtio import VirtioDevices
from vmm.pci.host import PORTS, PciHost
from vmm.virtio.pci import NOTIFY_MULTIPLIER, PciTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.bus import AddressSpace
    from vmm.machine.machine import Machine
    from vmm.virtio.device import VirtioDevice

NOTIFY_SIZE = 2
"""Bytes of a notify (virtio 1.2, section 4.1.5.2), where KVM must be told."""


class PciDevices(VirtioDevices):
    """Over PCI; the bus is there without devices too.

    Attributes:
        host: the bridge.
        routing: where MSI-X messages go.
    """

    def __init__(self, machine: Machine, space: AddressSpace, ports: AddressSpace) -> None:
        super().__init__(machine, space)
        self.host = PciHost(space, machine.memory.regions[-1].end)
        self.routing = Routing(machine.vm)
        any_length = machine.kvm.check_extension(constants.CAP_IOEVENTFD_ANY_LENGTH)
        self._notify_size = 0 if any_length else NOTIFY_SIZE  # 0 is KVM's quickest way on VT-x
        space.add(layout.ECAM_BASE, layout.ECAM_SIZE, self.host)
        ports.add(layout.PORT_PCI, PORTS, self.host.ports)

    def _place(self, device: VirtioDevice) -> PciTransport:
        transport = PciTransport(device)
        try:
            self.host.add(transport.function, transport)
        except BaseException:
            transport.close()
            raise
        transport.msix.connect = self._vectors(transport.msix.vectors)
        transport.on_driver_ok = lambda: self._connect(transport)
        return transport

    def place_of(self, number: int) -> str:
        return f"at PCI 00:{number + 1:02x}.0, MSI-X"  # 0 is the host bridge

    def _connect(self, transport: PciTransport) -> None:
        placed: int | None = None

        def move(base: int | None) -> None:
            nonlocal placed
            if placed is not None:
                self._ioeventfds(transport, placed, deassign=True)
            if base is not None:
                self._ioeventfds(transport, base, deassign=False)
            placed = base

        transport.follow(move)
        self._serve(transport)

    def _ioeventfds(self, transport: PciTransport, base: int, *, deassign: bool) -> None:
        for index, fd in enumerate(transport.notify_fds):
            place = base + NOTIFY_MULTIPLIER * index
            self._machine.vm.ioeventfd(fd, place, self._notify_size, deassign=deassign)

    def _vectors(self, count: int) -> Callable[[int, int, int, int], None]:
        """What connects the vectors of one device: each gets a GSI when it first opens."""
        gsis = [-1] * count

        def connect(vector: int, fd: int, address: int, data: int) -> None:
            gsi = gsis[vector]
            if gsi >= 0:
                self.routing.set_message(gsi, address, data)
                return
            gsi = gsis[vector] = self.routing.allocate()
            self.routing.set_message(gsi, address, data)
            self._machine.vm.irqfd(fd, gsi)

        return connect
