"""What is left of the keyboard controller: its reset line (ports 0x60 and 0x64).

There is no keyboard, and guests should find that out at once. The status reads with the output
buffer always full and the input buffer always empty: Linux's i8042 driver gives up when it has
read 16 bytes and there are still more (i8042_flush: "No controller found"), within a
millisecond, where a controller that does not answer costs it seconds of time-outs; and its
reboot code (kb_wait), which only waits for an empty input buffer, goes on at once, where all
ones would make it poll 65,536 times. With ACPI, the FADT says there is no controller and Linux
does not look.
"""

from __future__ import annotations

from vmm.devices.device import ByteDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DATA = 0
STATUS = COMMAND = 4
STATUS_VALUE = 0xFD
"""All ones but bit 1, input buffer full."""
PULSE_OUTPUT = 0xF0
"""Commands 0xf0 to 0xff pulse those of output lines 0 to 3 whose bit is 0; line 0 is reset."""


class I8042(ByteDevice):
    """Put it at 0x60, and again at 0x64 with offset 4: 0x61 between them is the PIT's."""

    LENGTH = 5

    def __init__(self, on_reset: Callable[[], None], name: str = "i8042") -> None:
        super().__init__(name)
        self._on_reset = on_reset

    def read8(self, offset: int) -> int:
        return STATUS_VALUE if offset == STATUS else 0xFF

    def write8(self, offset: int, value: int) -> None:
        if offset == COMMAND and value & 0xF1 == PULSE_OUTPUT:
            self._on_reset()
