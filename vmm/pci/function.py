"""A function's configuration space: header, BARs, capabilities (PCI 3.0, chapter 6).

Each byte has a mask of the bits a guest may write; what must happen beyond storing them is a hook
on the register (4 bytes, aligned). Nothing a guest writes is an error.
"""

from __future__ import annotations

from vmm.devices.device import state_bytes
from vmm.errors import ShapeError
from vmm.pci import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import Device
    from vmm.shapes import Shape


class Bar:
    """A memory base address register.

    Attributes:
        size: bytes, a power of two from 16.
        wide: 64 bits, over two registers.
        device: who answers in it; its offset 0 is at the base.
        base: where it is on the bus now, or None.
        moved: told of a new `base`, after it has changed.
    """

    __slots__ = ("base", "device", "index", "moved", "size", "wide")

    def __init__(self, index: int, size: int, device: Device, wide: bool) -> None:
        self.index = index
        self.size = size
        self.device = device
        self.wide = wide
        self.base: int | None = None
        self.moved: Callable[[int | None], None] = lambda base: None


class PciFunction:
    """One function; the bus it is on calls `read` and `write`, one at a time.

    Attributes:
        config: its 4096 bytes of configuration space.
        bars: its base address registers, by index.
        decode: set by the bus: called when a BAR or its enabling may have changed.
        on_command: told of a write of the command register.
        on_reset: told of a function level reset.
    """

    def __init__(
        self,
        name: str,
        vendor: int,
        device: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
    ) -> None:
        self.name = name
        self.config = bytearray(spec.EXTENDED_CONFIG_SIZE)
        self.bars: dict[int, Bar] = {}
        self.decode: Callable[[], None] = _nothing
        self.on_command: Callable[[], None] = _nothing
        self.on_reset: Callable[[], None] = _nothing
        self._mask = bytearray(spec.EXTENDED_CONFIG_SIZE)
        self._written: dict[int, Callable[[], None]] = {spec.COMMAND: self._command_written}
        self._reading: dict[int, Callable[[], None]] = {}
        self._capability_end = spec.HEADER_SIZE
        self._last_pointer = spec.CAPABILITIES_POINTER
        self._put(spec.VENDOR_ID, 2, vendor)
        self._put(spec.DEVICE_ID, 2, device)
        self._put(spec.REVISION_ID, 1, revision)
        self._put(spec.CLASS_CODE, 3, class_code)
        self._put(spec.SUBSYSTEM_VENDOR_ID, 2, subsystem[0])
        self._put(spec.SUBSYSTEM_ID, 2, subsystem[1])
        command = spec.COMMAND_MEMORY | spec.COMMAND_MASTER | spec.COMMAND_INTX_DISABLE
        self._allow(spec.COMMAND, 2, command)
        self._allow(spec.CACHE_LINE_SIZE, 1, 0xFF)
        self._allow(spec.INTERRUPT_LINE, 1, 0xFF)
        self._initial = b""

    def __repr__(self) -> str:
        return f"<PciFunction {self.name}>"

    # --- assembly ---------------------------------------------------------------------------------

    def _put(self, register: int, size: int, value: int) -> None:
        self.config[register : register + size] = value.to_bytes(size, "little")

    def _allow(self, register: int, size: int, mask: int) -> None:
        self._mask[register : register + size] = mask.to_bytes(size, "little")

    def get(self, register: int, size: int) -> int:
        """What is stored at `register`; no side effects."""
        return int.from_bytes(self.config[register : register + size], "little")

    def add_bar(self, index: int, size: int, device: Device, *, wide: bool = False) -> Bar:
        """A memory BAR of `size` bytes, rounded up to a power of two of a page at least, so that
        a guest may map it by itself. A wide one takes `index` and the next."""
        size = max(4096, 1 << (size - 1).bit_length())
        register = spec.BAR0 + 4 * index
        width = 8 if wide else 4
        self._put(register, width, spec.BAR_64 if wide else 0)
        self._allow(register, width, (1 << 8 * width) - size)
        for place in range(register, register + width, 4):
            self._written[place] = self._bar_written
        bar = self.bars[index] = Bar(index, size, device, wide)
        return bar

    def place_bar(self, index: int, base: int) -> None:
        """Program a BAR as firmware does."""
        bar = self.bars[index]
        width = 8 if bar.wide else 4
        register = spec.BAR0 + 4 * index
        self._put(register, width, base | self.get(register, 4) & spec.BAR_FLAGS)

    def add_capability(self, ident: int, body: bytes, mask: bytes = b"") -> int:
        """A capability: `body` is what follows id and next pointer, `mask` what of it is writable.

        Its offset is returned, a multiple of 4.
        """
        at = self._capability_end
        self._capability_end = at + 2 + len(body) + 3 & ~3
        if self._capability_end > spec.CONFIG_SIZE:
            raise ValueError(f"{self.name}: no room for another capability")
        self._put(spec.STATUS, 2, spec.STATUS_CAPABILITIES)
        self.config[self._last_pointer] = at
        self._last_pointer = at + 1
        self.config[at] = ident
        self.config[at + 2 : at + 2 + len(body)] = body
        self._mask[at + 2 : at + 2 + len(mask)] = mask
        return at

    def add_express(self) -> None:
        """The PCI Express capability, for function level reset."""
        body = bytearray(spec.EXPRESS_SIZE - 2)
        mask = bytearray(len(body))
        flags = spec.EXPRESS_VERSION | spec.EXPRESS_ROOT_ENDPOINT << 4
        body[0:2] = flags.to_bytes(2, "little")
        capabilities = spec.DEVCAP_ROLE_BASED_ERRORS | spec.DEVCAP_FLR
        at = spec.EXPRESS_DEVICE_CAPABILITIES - 2
        body[at : at + 4] = capabilities.to_bytes(4, "little")
        control = spec.EXPRESS_DEVICE_CONTROL - 2
        mask[control : control + 2] = (spec.DEVCTL_WRITABLE | spec.DEVCTL_FLR).to_bytes(2, "little")
        register = self.add_capability(spec.CAP_EXPRESS, bytes(body), bytes(mask))
        register += spec.EXPRESS_DEVICE_CONTROL

        def written() -> None:
            if self.get(register, 2) & spec.DEVCTL_FLR:
                self.reset()

        self.on_write(register, written)

    def on_write(self, register: int, hook: Callable[[], None]) -> None:
        """Have `hook` called after each write of some of the 4 bytes at `register`."""
        self._written[register] = hook

    def on_read(self, register: int, hook: Callable[[], None]) -> None:
        """Have `hook` called before each read of some of the 4 bytes at `register`."""
        self._reading[register] = hook

    # --- accesses ---------------------------------------------------------------------------------

    def read(self, register: int, size: int) -> int:
        """`size` bytes at `register`; they lie within an aligned 4."""
        hook = self._reading.get(register & ~3)
        if hook is not None:
            hook()
        return int.from_bytes(self.config[register : register + size], "little")

    def write(self, register: int, size: int, value: int) -> None:
        """Store what of `value` is writable; as `read`."""
        if not self._initial:
            self._initial = bytes(self.config)
        config, mask = self.config, self._mask
        for at in range(register, register + size):
            config[at] = config[at] & ~mask[at] | value & mask[at]
            value >>= 8
        hook = self._written.get(register & ~3)
        if hook is not None:
            hook()

    @property
    def command(self) -> int:
        """The command register."""
        return self.get(spec.COMMAND, 2)

    def wanted(self, bar: Bar) -> int | None:
        """Where the guest wants `bar`, or None while memory decoding is off."""
        if not self.command & spec.COMMAND_MEMORY:
            return None
        register = spec.BAR0 + 4 * bar.index
        return self.get(register, 8 if bar.wide else 4) & ~spec.BAR_FLAGS

    def _command_written(self) -> None:
        self.decode()
        self.on_command()

    def _bar_written(self) -> None:
        if self.command & spec.COMMAND_MEMORY:
            self.decode()

    def reset(self) -> None:
        """Function level reset (PCIe 4.0, section 6.6.2): as after power-on, BARs included."""
        if self._initial:
            self.config[:] = self._initial
        for bar in self.bars.values():
            self.place_bar(bar.index, 0)
        self.decode()
        self.on_command()
        self.on_reset()

    # --- state ------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """The configuration space, as plain data."""
        return {"config": bytes(self.config)}

    def shape(self) -> Shape:
        """Of what `save` gives."""
        from vmm.shapes import Data, Table

        return Table({"config": Data(len(self.config))})

    def restore(self, state: dict[str, object]) -> None:
        """Take over what `save` gave: the bits a guest may write, the rest is ours."""
        config = state_bytes(state, "config")
        if len(config) != len(self.config):
            raise ShapeError(f"state of {self.name}: {len(config)} bytes of configuration space")
        if not self._initial:
            self._initial = bytes(self.config)
        for at, (given, own, mask) in enumerate(
            zip(config, self._initial, self._mask, strict=True)
        ):
            self.config[at] = own & ~mask | given & mask
        self.decode()
        self.on_command()


def _nothing() -> None:
    pass
