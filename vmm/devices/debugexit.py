"""The exit port (layout.PORT_EXIT): a byte a guest writes ends the machine with that status.

QEMU's isa-debug-exit is at the same port; there the status is value * 2 + 1, here the value.
"""

from __future__ import annotations

from vmm.devices.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class DebugExit(Device):
    """Four ports; `on_exit(status)` is called with the low byte of what is written to the first."""

    LENGTH = 4

    def __init__(self, on_exit: Callable[[int], None], name: str = "debug-exit") -> None:
        super().__init__(name)
        self._on_exit = on_exit

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._on_exit(value & 0xFF)
