"""ACPI power block: sleep and reset registers, and the power button by a generic event device.

The registers of hardware-reduced ACPI (ACPI 6.5, sections 4.8.3.6 reset, 4.8.3.7 sleep control
and status) and the selector the DSDT's ACPI0013 device reads (section 5.6.9; its bits are ours):

    0  sleep control (8 bits)   SLP_EN bit 5, SLP_TYPx bits 2 to 4
    1  sleep status  (8 bits)   WAK_STS bit 7, written 1 to clear; the machine never wakes, so 0
    2  reset         (8 bits)   write RESET_VALUE
    4  GED selector  (32 bits)  pending events; the bits read are cleared
"""

from __future__ import annotations

from _thread import allocate_lock

from vmm.devices.device import ByteDevice, no_irq, state_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import IrqLine
    from vmm.shapes import Shape

SLEEP_CONTROL = 0
SLEEP_STATUS = 1
RESET = 2
GED_SELECTOR = 4

SLP_EN = 1 << 5
SLP_TYP_SHIFT = 2
SLP_TYP_MASK = 7
S5 = 5
"""SLP_TYPx that turns the machine off; the DSDT's \\_S5 says the same."""
RESET_VALUE = 1
GED_POWER_BUTTON = 1 << 0
GED_GENERATION = 1 << 1
"""The VM generation ID has changed."""


class AcpiPower(ByteDevice):
    """Calls `on_poweroff` and `on_reset` (from a vCPU thread) when the guest asks for them."""

    LENGTH = 8

    def __init__(
        self,
        on_poweroff: Callable[[], None],
        on_reset: Callable[[], None],
        irq: IrqLine = no_irq,
        name: str = "acpi-power",
    ) -> None:
        super().__init__(name)
        self._on_poweroff = on_poweroff
        self._on_reset = on_reset
        self._irq = irq
        self._lock = allocate_lock()
        self._slp_typ = 0
        self._pending = 0
        self.watched = False
        """The guest has read the selector since its reset, so it knows of the device."""

    def press_power_button(self) -> None:
        """Tell the guest to shut down; from any thread. A guest without a handler ignores it."""
        self._tell(GED_POWER_BUTTON)

    def generation_changed(self) -> None:
        """Tell the guest that its VM generation ID has changed."""
        self._tell(GED_GENERATION)

    def _tell(self, event: int) -> None:
        with self._lock:
            self._pending |= event
            # The GED's interrupt is edge-triggered: a pulse is one event.
            self._irq(1)
            self._irq(0)

    def read8(self, offset: int) -> int:
        if offset == SLEEP_CONTROL:
            return self._slp_typ << SLP_TYP_SHIFT  # SLP_EN is write-only
        if GED_SELECTOR <= offset < GED_SELECTOR + 4:
            shift = 8 * (offset - GED_SELECTOR)
            self.watched = True
            with self._lock:
                bits = (self._pending >> shift) & 0xFF
                self._pending &= ~(0xFF << shift)
            return bits
        return 0

    def write8(self, offset: int, value: int) -> None:
        if offset == SLEEP_CONTROL:
            self._slp_typ = (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK
            if value & SLP_EN and self._slp_typ == S5:
                self._on_poweroff()
        elif offset == RESET and value == RESET_VALUE:
            self._on_reset()

    def save(self) -> dict[str, object]:
        return {"slp_typ": self._slp_typ, "pending": self._pending}

    def shape(self) -> Shape:
        from vmm.shapes import U32, Table, Whole

        return Table({"slp_typ": Whole(0, SLP_TYP_MASK), "pending": Whole(0, U32)})

    def restore(self, state: dict[str, object]) -> None:
        self._slp_typ = state_int(state, "slp_typ", SLP_TYP_MASK)
        self._pending = state_int(state, "pending", 0xFFFFFFFF)

    def reset(self) -> None:
        self._slp_typ = 0
        self.watched = False
        self._pending = 0
