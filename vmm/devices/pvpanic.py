"""pvpanic: the port a guest reports its panic at (QEMU docs/specs/pvpanic.rst).

A read tells the events it takes, a write reports one. Linux's pvpanic driver finds it as the
ACPI device QEMU0001.
"""

from __future__ import annotations

from vmm.devices.device import ByteDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PANICKED = 1 << 0
"""The guest panicked."""
CRASH_LOADED = 1 << 1
"""The guest panicked and goes on in a crash kernel."""
EVENTS = ((PANICKED, "panicked"), (CRASH_LOADED, "crash-loaded"))


class PvPanic(ByteDevice):
    """One port; `on_panic(event)` gets "panicked" or "crash-loaded", from a vCPU thread."""

    def __init__(self, on_panic: Callable[[str], None], name: str = "pvpanic") -> None:
        super().__init__(name)
        self._on_panic = on_panic

    def read8(self, offset: int) -> int:
        return PANICKED | CRASH_LOADED

    def write8(self, offset: int, value: int) -> None:
        for bit, event in EVENTS:
            if value & bit:
                self._on_panic(event)
