"""A disk's new size, checked before anything changes."""

from __future__ import annotations

from vmm.errors import UsageError

SIZE_MAX = 1 << 62
"""Bytes."""


def check(name: str, size: int, present: int, block: int) -> None:
    """UsageError where disk `name` of `present` bytes cannot become one of `size`, which must be
    whole blocks of `block` bytes."""
    if not isinstance(size, int) or not 0 < size <= SIZE_MAX:
        raise UsageError(f"{name}: {size} is no size in bytes")
    if size < present:
        raise UsageError(
            f"{name}: {size} bytes are less than the {present} that the disk has; a disk only "
            "grows, as the guest would lose what is at its end"
        )
    if size % block:
        raise UsageError(
            f"{name}: {size} bytes are not whole blocks of {block}; "
            f"{size + block - size % block} are"
        )
