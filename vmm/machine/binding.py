"""Functions of the program as devices: at ports and at physical addresses.

A guest's access calls the function on the vCPU's thread, with the Python that this takes: some ten
microseconds. Functions of two vCPUs may run at the same time.
"""

from __future__ import annotations

from vmm import layout
from vmm.devices.bus import BusError
from vmm.devices.device import Device
from vmm.errors import StateError, UsageError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.bus import AddressSpace
    from vmm.machine.machine import Machine

    Read = Callable[[int, int], int]
    """(offset, size) -> what the guest reads."""
    Write = Callable[[int, int, int], object]
    """(offset, size, value)."""

KERNELS_PORTS = ((0x20, 2, "KVM's PIC"), (0xA0, 2, "KVM's PIC"), (0x4D0, 2, "KVM's PIC"))
KERNELS_MMIO = (
    (layout.IOAPIC, 0x1000, "KVM's IOAPIC"),
    (layout.LAPIC, 0x100000, "KVM's local APICs"),
    (layout.IDENTITY_MAP, 0x4000, "KVM's own pages"),
)
"""(base, length, name) of what KVM answers itself: no access there would come out."""
BARS = (layout.PCI_MMIO32_BASE, layout.PCI_MMIO32_SIZE, "the guest's window for PCI BARs")


class Bound(Device):
    """`read` and `write` at a range; where one is None, all ones are read, or writes ignored."""

    SAVED = False

    def __init__(self, name: str, read: Read | None, write: Write | None) -> None:
        super().__init__(name)
        self._read = read
        self._write = write

    def read(self, offset: int, size: int) -> int:
        if self._read is None:
            return (1 << 8 * size) - 1
        try:
            value = self._read(offset, size)
        except Exception as err:
            self._tell(err, f"read({offset}, {size})")
            raise
        if not isinstance(value, int) or not 0 <= value < 1 << 8 * size:
            raise VmmError(
                f"the function bound to {self.name}: read({offset}, {size}) returned {value!r}, "
                f"not a number of {8 * size} bits"
            )
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if self._write is not None:
            try:
                self._write(offset, size, value)
            except Exception as err:
                self._tell(err, f"write({offset}, {size}, {value:#x})")
                raise

    def _tell(self, err: Exception, call: str) -> None:
        err.add_note(f"in the function bound to {self.name}, called as {call}")


def bind(
    machine: Machine, kind: str, base: int, size: int, read: Read | None, write: Write | None
) -> Callable[[], None]:
    """See `Machine.bind_port` and `bind_mmio`; `kind` is `port` or `mmio`."""
    call = f"bind_{kind}"
    quiescent(machine, call)
    if read is None and write is None:
        raise UsageError(f"{call} {base:#x}: give it read=, write= or both")
    space = machine.platform.pio if kind == "port" else machine.platform.mmio
    if size <= 0 or not 0 <= base <= base + size <= 1 << space.width:
        raise UsageError(
            f"{call} {base:#x}: {size} from there is not within 0 to {(1 << space.width) - 1:#x}"
        )
    _check_free(machine, kind, base, size)
    device = Bound(f"{kind} {base:#x}..{base + size - 1:#x}", read, write)
    try:
        space.add(base, size, device)
    except BusError as err:
        raise UsageError(f"{call}: {err}") from None
    return lambda: _unbind(machine, space, device)


def quiescent(machine: Machine, call: str) -> None:
    """StateError, in the name of `call`, while vCPUs may run or nothing is there any more."""
    if machine.state not in ("created", "paused"):
        raise StateError(f"{call}: the machine is {machine.state}, not created or paused")


def _unbind(machine: Machine, space: AddressSpace, device: Device) -> None:
    if machine.state not in ("stopped", "closed"):
        quiescent(machine, f"unbinding {device.name}")
    space.remove(device)


def _check_free(machine: Machine, kind: str, base: int, size: int) -> None:
    """UsageError where the guest's accesses would not come to a device."""
    pci = machine.config.transport == "pci"
    if kind == "port":
        taken = list(KERNELS_PORTS)
    else:
        taken = [*KERNELS_MMIO, *([BARS] if pci else [])]
        taken += [(region.gpa, region.size, "the guest's RAM") for region in machine.memory.regions]
    for start, length, name in taken:
        if start < base + size and base < start + length:
            raise UsageError(
                f"bind_{kind}: {base:#x}..{base + size - 1:#x} overlaps {name} at "
                f"{start:#x}..{start + length - 1:#x}"
            )
