"""CPUID tables as KVM takes and gives them (struct kvm_cpuid2)."""

from __future__ import annotations

from vmm.kvm import constants
from vmm.kvm.ffi import new

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = constants.CPUID_FLAG_SIGNIFCANT_INDEX
MAX_ENTRIES = 256
"""KVM_MAX_CPUID_ENTRIES (arch/x86/include/asm/kvm_host.h)."""


class CpuidEntry:
    """What CPUID leaf `function`, subleaf `index` returns (32-bit registers).

    `flags` has KVM_CPUID_FLAG_SIGNIFCANT_INDEX where the subleaf matters.
    """

    __slots__ = ("eax", "ebx", "ecx", "edx", "flags", "function", "index")

    def __init__(
        self,
        function: int,
        index: int = 0,
        flags: int = 0,
        eax: int = 0,
        ebx: int = 0,
        ecx: int = 0,
        edx: int = 0,
    ) -> None:
        self.function = function
        self.index = index
        self.flags = flags
        self.eax = eax
        self.ebx = ebx
        self.ecx = ecx
        self.edx = edx

    def copy(self) -> CpuidEntry:
        """An entry of its own with the same values."""
        return CpuidEntry(
            self.function, self.index, self.flags, self.eax, self.ebx, self.ecx, self.edx
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CpuidEntry):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"CpuidEntry({self.function:#x}, {self.index}, {self.flags}, {self.eax:#x}, "
            f"{self.ebx:#x}, {self.ecx:#x}, {self.edx:#x})"
        )


def to_struct(entries: Sequence[CpuidEntry]) -> Any:
    """A `struct kvm_cpuid2` that holds `entries`."""
    table = new("kvm_cpuid2", len(entries))
    table.nent = len(entries)
    slots = table.entries
    for position, entry in enumerate(entries):
        slots[position] = (
            entry.function,
            entry.index,
            entry.flags,
            entry.eax,
            entry.ebx,
            entry.ecx,
            entry.edx,
        )
    return table


def from_struct(table: Any) -> list[CpuidEntry]:
    """The entries of a `struct kvm_cpuid2`.

    KVM_GET_CPUID2 up to Linux 6.1 leaves `nent` as it was given: empty entries at the end are
    not the guest's.
    """
    slots = table.entries
    entries = []
    last = 0
    for position in range(table.nent):
        e = slots[position]
        entries.append(CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx))
        if e.function or e.eax or e.ebx:
            last = position + 1
    return entries[:last]
