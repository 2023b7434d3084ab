"""State of a VM's in-kernel devices, saved as plain data and restored: irqchips, PIT, clock."""

from __future__ import annotations

import time

from vmm.kvm import constants
from vmm.kvm.ffi import ffi, new

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.kvm.vm import Vm
    from vmm.shapes import Table

TIME_MAX = 1 << 62
"""Nanoseconds, 146 years."""
CHIPS = (constants.IRQCHIP_PIC_MASTER, constants.IRQCHIP_PIC_SLAVE, constants.IRQCHIP_IOAPIC)


def save(vm: Vm, *, pit: bool = True) -> dict[str, Any]:
    """PICs, IOAPIC, PIT (if the VM has one) and kvmclock of a VM whose vCPUs are parked.

    `clock` is kvmclock, `realtime` the host's time then, nanoseconds since 1970.
    """
    clock = vm.get_clock()
    realtime = clock.realtime if clock.flags & constants.CLOCK_REALTIME else time.time_ns()
    state = {
        "irqchips": [bytes(ffi.buffer(vm.get_irqchip(chip))) for chip in CHIPS],
        "clock": int(clock.clock),
        "realtime": int(realtime),
    }
    if pit:
        state["pit"] = bytes(ffi.buffer(vm.get_pit2()))
    return state


def shape() -> Table:
    """What shape `save` gives a state (`vmm.shapes`)."""
    from vmm.shapes import Data, Items, Table, Whole

    time = Whole(0, TIME_MAX)
    chip = Data(ffi.sizeof("struct kvm_irqchip"))
    return Table(
        {"irqchips": Items(chip, len(CHIPS)), "clock": time, "realtime": time},
        {"pit": Data(ffi.sizeof("struct kvm_pit_state2"))},
    )


def restore(vm: Vm, state: dict[str, Any], *, elapse: bool = False) -> None:
    """Put it back into a VM that has an irqchip, and a PIT if there is one in `state`.

    The clock goes on from where it was saved: time the VM was not there does not pass for it. With
    `elapse` it does (KVM_CLOCK_REALTIME): the guest's clocks agree with the host's again.
    """
    for number, data in zip(CHIPS, state["irqchips"], strict=True):
        chip = new("kvm_irqchip")
        ffi.buffer(chip)[:] = data
        chip.chip_id = number
        vm.set_irqchip(chip)
    if "pit" in state:
        pit = new("kvm_pit_state2")
        ffi.buffer(pit)[:] = state["pit"]
        vm.set_pit2(pit)
    clock = new("kvm_clock_data")
    clock.clock = state["clock"]
    if elapse:
        if vm.kvm.check_extension(constants.CAP_ADJUST_CLOCK) & constants.CLOCK_REALTIME:
            clock.flags = constants.CLOCK_REALTIME
            clock.realtime = state["realtime"]
        else:
            clock.clock += max(time.time_ns() - state["realtime"], 0)
    vm.set_clock(clock)
