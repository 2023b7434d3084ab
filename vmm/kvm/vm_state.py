"""State of a VM's in-kernel devices, saved as plain data and restored: irqchips, PIT, clock."""

from __future__ import annotations

from vmm.kvm import constants
from vmm.kvm.ffi import ffi, new

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.kvm.vm import Vm

CHIPS = (constants.IRQCHIP_PIC_MASTER, constants.IRQCHIP_PIC_SLAVE, constants.IRQCHIP_IOAPIC)


def save(vm: Vm) -> dict[str, Any]:
    """PICs, IOAPIC, PIT and kvmclock of a VM whose vCPUs are parked."""
    return {
        "irqchips": [bytes(ffi.buffer(vm.get_irqchip(chip))) for chip in CHIPS],
        "pit": bytes(ffi.buffer(vm.get_pit2())),
        "clock": int(vm.get_clock().clock),
    }


def restore(vm: Vm, state: dict[str, Any]) -> None:
    """Put it back into a VM that has an irqchip and a PIT. The clock goes on from where it was
    saved: time the VM was not there does not pass for it."""
    for data in state["irqchips"]:
        chip = new("kvm_irqchip")
        ffi.buffer(chip)[:] = data
        vm.set_irqchip(chip)
    pit = new("kvm_pit_state2")
    ffi.buffer(pit)[:] = state["pit"]
    vm.set_pit2(pit)
    clock = new("kvm_clock_data")
    clock.clock = state["clock"]
    vm.set_clock(clock)
