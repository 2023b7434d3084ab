"""What every emulated device is: a window of registers, an interrupt line, a state.

A device knows its registers, its line and its back end; not the machine and not KVM. Offsets
count bytes from the device's base, sizes are 1 to 8 bytes, values are little-endian unsigned.
Whatever a guest writes is legal input: `read` and `write` never raise on it, and `read` returns
a value that fits `size`. vCPU threads call them at the same time.
"""

from __future__ import annotations

from vmm.errors import ShapeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.shapes import Shape

    IrqLine = Callable[[int], None]
    """Set an interrupt line to level 0 or 1; called on a change of level only."""


def no_irq(level: int) -> None:
    """A line that leads nowhere."""


class Device:
    """Base of all devices; its registers read all ones and ignore writes."""

    LENGTH = 1
    """Bytes of address space the device takes."""
    SAVED = True
    """Whether its state is part of the machine's; False for what a program plugs in itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, offset: int, size: int) -> int:
        """The `size` bytes at `offset`."""
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Store `value`, `size` bytes long, at `offset`."""

    def save(self) -> dict[str, object]:
        """Guest-visible state as plain data (ints, bytes, str, lists and dicts of them)."""
        return {}

    def shape(self) -> Shape:
        """What shape `save` gives its state. A state out of a file has it before it is restored."""
        from vmm.shapes import Shape

        return Shape()

    def restore(self, state: dict[str, object]) -> None:
        """Take over what `save` gave. Raises ShapeError where it is not this device's."""

    def reset(self) -> None:
        """Registers as after power-on."""

    def close(self) -> None:
        """Give back host resources; harmless when called twice."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class ByteDevice(Device):
    """A device with byte registers: wider accesses are one byte cycle each, low byte first, as
    an 8-bit device sees them on an ISA bus."""

    def read8(self, offset: int) -> int:
        """The register at `offset`, 0 to 0xff."""
        return 0xFF

    def write8(self, offset: int, value: int) -> None:
        """Store the byte `value` in the register at `offset`."""

    def read(self, offset: int, size: int) -> int:
        if size == 1:
            return self.read8(offset)
        value = 0
        for i in range(size):
            byte = self.read8(offset + i) if offset + i < self.LENGTH else 0xFF
            value |= byte << (8 * i)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 1:
            self.write8(offset, value & 0xFF)
            return
        for i in range(size):
            if offset + i < self.LENGTH:
                self.write8(offset + i, (value >> (8 * i)) & 0xFF)


def state_int(state: dict[str, object], key: str, mask: int) -> int:
    """The integer `state[key]`, cut to `mask`: a state file may hold anything."""
    value = state[key]
    if not isinstance(value, int):
        raise ShapeError(f"state of a device: {key} is {value!r}, not an integer")
    return value & mask


def state_bytes(state: dict[str, object], key: str) -> bytes:
    """The bytes `state[key]`."""
    value = state[key]
    if not isinstance(value, (bytes, bytearray)):
        raise ShapeError(f"state of a device: {key} is {value!r}, not bytes")
    return bytes(value)
