"""The PCI configuration ports (0xcf8 to 0xcff; PCI 3.0, section 3.2.2.3.2) of an empty bus.

Linux with CONFIG_PCI complains at KERN_ERR of a machine without any configuration mechanism, also
when told `pci=off`. A latch for the address is enough to be one: every function then reads as
absent.
"""

from __future__ import annotations

from vmm.devices.device import Device, state_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.shapes import Shape


class NoPci(Device):
    """CONFIG_ADDRESS keeps what is written to it, CONFIG_DATA reads all ones."""

    LENGTH = 8

    def __init__(self, name: str = "no-pci") -> None:
        super().__init__(name)
        self._address = 0

    def read(self, offset: int, size: int) -> int:
        if offset == 0 and size == 4:
            return self._address
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 4:  # any other access is not for the bridge (Linux tries 0xcfb)
            self._address = value & 0x80FFFFFC

    def save(self) -> dict[str, object]:
        return {"address": self._address}

    def shape(self) -> Shape:
        from vmm.shapes import U32, Table, Whole

        return Table({"address": Whole(0, U32)})

    def restore(self, state: dict[str, object]) -> None:
        self._address = state_int(state, "address", 0xFFFFFFFF)

    def reset(self) -> None:
        self._address = 0
