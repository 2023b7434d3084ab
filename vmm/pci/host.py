"""The host bridge and bus 0: configuration accesses by ECAM and by ports, windows for BARs.

ECAM is PCI Express Base 4.0, section 7.2.2; ports 0xcf8 and 0xcfc are PCI 3.0, section 3.2.2.3.2,
for guests without ACPI. A BAR answers wherever the guest puts it, as long as devices may be there
and nobody else is: of two that overlap, the one that was there first; the other one follows when
it can.
"""

from __future__ import annotations

from _thread import RLock

from vmm import layout
from vmm.devices.bus import BusError
from vmm.devices.device import Device, state_int
from vmm.errors import ShapeError, UsageError
from vmm.pci import spec
from vmm.pci.function import PciFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.devices.bus import AddressSpace
    from vmm.pci.function import Bar
    from vmm.shapes import Shape

VENDOR_REDHAT = 0x1B36
HOST_BRIDGE = 0x0008
"""What QEMU's PCI Express bridge says it is: known to every system, with no quirks anywhere."""
SLOTS = 32
PORTS = 8
_ENABLE = 1 << 31


class PciHost(Device):
    """The bridge; as a device it is the ECAM window.

    Args:
        space: where BARs appear.
        ram_end: the GPA after the last of the guest's RAM.

    Attributes:
        functions: by device number; 0 is the bridge itself.
        ports: the device for ports 0xcf8 to 0xcff.
    """

    LENGTH = layout.ECAM_SIZE

    def __init__(self, space: AddressSpace, ram_end: int) -> None:
        super().__init__("pci")
        self.functions: dict[int, PciFunction] = {}
        self.ports = ConfigPorts(self)
        self._devices: list[Device] = []
        self._space = space
        self._lock = RLock()
        self._next = layout.PCI_MMIO32_BASE
        self._allowed = (
            (layout.HOLE_START, layout.ECAM_BASE),
            (layout.ECAM_BASE + layout.ECAM_SIZE, layout.IOAPIC),
            (max(layout.HOLE_END, ram_end), 1 << 52),
        )
        self.add(PciFunction("host bridge", VENDOR_REDHAT, HOST_BRIDGE, spec.CLASS_HOST_BRIDGE))

    def add(self, function: PciFunction, *devices: Device) -> int:
        """Put `function` on the bus, its BARs where firmware would; its device number.

        `devices` are closed with the bridge.

        Raises:
            UsageError: there is no room.
        """
        number = len(self.functions)
        if number >= SLOTS:
            raise UsageError(f"more than {SLOTS - 1} devices on the PCI bus")
        for bar in function.bars.values():
            base = -(-self._next // bar.size) * bar.size
            if base + bar.size > layout.PCI_MMIO32_BASE + layout.PCI_MMIO32_SIZE:
                raise UsageError(f"{function.name}: no room for {bar.size} bytes of PCI memory")
            self._next = base + bar.size
            function.place_bar(bar.index, base)
        self._devices += devices
        self.functions[number] = function
        function.decode = self.decode
        return number

    # --- configuration space --------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        value = 0
        for function, register, count, shift in self._pieces(offset, size):
            piece = (1 << 8 * count) - 1
            if function is not None:
                with self._lock:
                    piece = function.read(register, count)
            value |= piece << shift
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        for function, register, count, shift in self._pieces(offset, size):
            if function is not None:
                with self._lock:
                    function.write(register, count, value >> shift & (1 << 8 * count) - 1)

    def _pieces(self, offset: int, size: int) -> Iterator[tuple[PciFunction | None, int, int, int]]:
        """(function, register, bytes, shift in bits) of an access, by aligned 4 bytes."""
        shift = 0
        while size:
            count = min(size, 4 - (offset & 3))
            # Bus, device and function numbers; ours are bus 0, function 0.
            number = -1 if offset >> 12 & 7 else offset >> 15
            yield self.functions.get(number), offset & 0xFFF, count, shift
            offset, size, shift = offset + count, size - count, shift + 8 * count

    # --- BARs -------------------------------------------------------------------------------------

    def decode(self) -> None:
        """Have every BAR answer where its function wants it."""
        with self._lock:
            wanted = [
                (bar, function.wanted(bar))
                for function in self.functions.values()
                for bar in function.bars.values()
            ]
            for bar, base in wanted:
                if bar.base is not None and bar.base != base:
                    self._space.remove(bar.device)
                    bar.base = None
                    bar.moved(None)
            for bar, base in wanted:
                if bar.base is None and base is not None and self._add(bar, base):
                    bar.base = base
                    bar.moved(base)

    def _add(self, bar: Bar, base: int) -> bool:
        end = base + bar.size
        if not any(start <= base and end <= limit for start, limit in self._allowed):
            return False
        try:
            self._space.add(base, bar.size, bar.device)
        except BusError:
            return False
        return True

    # --- life -------------------------------------------------------------------------------------

    def close(self) -> None:
        devices, self._devices = self._devices, []
        for device in devices:
            device.close()

    def save(self) -> dict[str, object]:
        """Configuration spaces; what answers in the BARs is saved by itself."""
        functions = [function.save() for function in self.functions.values()]
        return {"functions": functions, "address": self.ports.address}

    def shape(self) -> Shape:
        from vmm.shapes import U32, Each, Table, Whole

        functions = Each([function.shape() for function in self.functions.values()])
        return Table({"functions": functions, "address": Whole(0, U32)})

    def restore(self, state: dict[str, object]) -> None:
        given = state["functions"]
        if not isinstance(given, list) or len(given) != len(self.functions):
            raise ShapeError(f"state of the PCI bus: not {len(self.functions)} functions")
        with self._lock:
            for function, each in zip(self.functions.values(), given, strict=True):
                function.restore(each)
            self.ports.address = state_int(state, "address", 0xFFFFFFFF)


class ConfigPorts(Device):
    """CONFIG_ADDRESS and CONFIG_DATA.

    Attributes:
        address: the former: enable, bus (8 bits), device (5), function (3), register (8).
    """

    LENGTH = PORTS

    def __init__(self, host: PciHost) -> None:
        super().__init__("pci ports")
        self.address = 0
        self._host = host

    def read(self, offset: int, size: int) -> int:
        if offset >= 4:
            at = self._ecam(offset)
            if at is not None and offset + size <= PORTS:
                return self._host.read(at, size)
        elif not offset and size == 4:
            return self.address
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= 4:
            at = self._ecam(offset)
            if at is not None and offset + size <= PORTS:
                self._host.write(at, size, value)
        elif not offset and size == 4:  # anything else is not the bridge's (Linux tries 0xcfb)
            self.address = value & 0x80FFFFFC

    def _ecam(self, offset: int) -> int | None:
        """What the address register names, as an offset in the ECAM window."""
        address = self.address
        if not address & _ENABLE:
            return None
        return (address & 0xFFFF00) << 4 | address & 0xFC | offset & 3
