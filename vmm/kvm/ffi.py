"""The one place that touches cffi: allocate a KVM structure, get an address."""

from __future__ import annotations

from vmm.kvm._abi import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from typing_extensions import Buffer

__all__ = ["address_of", "ffi", "new", "sizeof"]

sizeof = ffi.sizeof


def new(struct: str, count: int | None = None) -> Any:
    """A zeroed `struct NAME`; `count` elements for one that ends in a flexible array."""
    if count is None:
        return ffi.new(f"struct {struct} *")
    return ffi.new(f"struct {struct} *", {_flexible[struct]: count})


_flexible = {
    "kvm_cpuid2": "entries",
    "kvm_msrs": "entries",
    "kvm_msr_list": "indices",
    "kvm_irq_routing": "entries",
}


def address_of(buffer: Buffer) -> int:
    """Host virtual address of a writable buffer's first byte; the caller keeps it alive."""
    with ffi.from_buffer(buffer) as data:
        return int(ffi.cast("uintptr_t", data))
