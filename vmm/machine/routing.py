"""The VM's interrupt routing table: who owns it, and which GSIs are free for messages.

KVM takes the table as a whole, so there is one owner. The irqchip's own part is what KVM starts
with (arch/x86/kvm/irq_comm.c, `default_routing`): GSI n is pin n of the IOAPIC and, up to 15, of
the PICs too.
"""

from __future__ import annotations

from _thread import allocate_lock

from vmm import layout
from vmm.errors import UsageError
from vmm.kvm import constants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm import Vm

_PIC_PINS = 8
_KVM_GSIS = 1024
"""What every KVM allows (KVM_MAX_IRQ_ROUTES was that before it grew to 4096)."""


class Routing:
    """Routes of one VM. The table is KVM's own until the first message is routed."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = allocate_lock()
        self._limit = vm.check_extension(constants.CAP_IRQ_ROUTING) or _KVM_GSIS
        self._next = layout.IOAPIC_PINS
        self._messages: dict[int, tuple[int, int]] = {}
        self._holding = False

    def allocate(self) -> int:
        """A GSI for messages.

        Raises:
            UsageError: all of KVM's are taken.
        """
        with self._lock:
            if self._next >= self._limit:
                raise UsageError(f"more interrupt vectors than KVM can route ({self._limit})")
            self._next += 1
            return self._next - 1

    def set_message(self, gsi: int, address: int, data: int) -> None:
        """From now on `gsi` sends that message (KVM_SET_GSI_ROUTING)."""
        with self._lock:
            self._messages[gsi] = (address, data)
            if not self._holding:
                self._vm.set_gsi_routing(self.table())

    def hold(self) -> None:
        """Keep changes back until `release`: each costs KVM a grace period (0.8 ms), and a restored
        machine has dozens. What is sent by a new route meanwhile is lost."""
        with self._lock:
            self._holding = True

    def release(self) -> None:
        """The end of `hold`: all that was kept back at once."""
        with self._lock:
            self._holding = False
            if self._messages:
                self._vm.set_gsi_routing(self.table())

    def table(self) -> list[tuple[int, int, int, int]]:
        """All routes, as `Vm.set_gsi_routing` takes them."""
        return irqchip_routes() + [
            (gsi, constants.IRQ_ROUTING_MSI, address, data)
            for gsi, (address, data) in self._messages.items()
        ]


def irqchip_routes() -> list[tuple[int, int, int, int]]:
    """The part of the table that PIC and IOAPIC are."""
    routes = []
    for gsi in range(layout.IOAPIC_PINS):
        routes.append((gsi, constants.IRQ_ROUTING_IRQCHIP, constants.IRQCHIP_IOAPIC, gsi))
        if gsi < 2 * _PIC_PINS:
            chip = constants.IRQCHIP_PIC_MASTER + gsi // _PIC_PINS
            routes.append((gsi, constants.IRQ_ROUTING_IRQCHIP, chip, gsi % _PIC_PINS))
    return routes
