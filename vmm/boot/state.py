"""What a loader leaves behind: where the boot processor starts, and what was loaded."""

from __future__ import annotations


class BootState:
    """The boot processor's first instruction and the registers the boot protocol names.

    Attributes:
        kind: `long64` (64-bit boot protocol) or `pvh32` (PVH).
        rip, rsi, rbx, rsp: register values; rsi is the zero page, rbx the PVH start info.
        cr3: GPA of the PML4; 0 for PVH, which starts without paging.
        is_linux: the kernel is known to be Linux.
        description: lines that say what was loaded where, for `-v`.
    """

    __slots__ = ("cr3", "description", "is_linux", "kind", "rbx", "rip", "rsi", "rsp")

    def __init__(
        self,
        kind: str,
        rip: int,
        *,
        rsi: int = 0,
        rbx: int = 0,
        rsp: int = 0,
        cr3: int = 0,
        is_linux: bool = False,
        description: list[str] | None = None,
    ) -> None:
        self.kind = kind
        self.rip = rip
        self.rsi = rsi
        self.rbx = rbx
        self.rsp = rsp
        self.cr3 = cr3
        self.is_linux = is_linux
        self.description = description or []
