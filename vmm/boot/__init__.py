"""Kernel loaders: bzImage by the 64-bit boot protocol, ELF at its 64-bit entry, PVH."""

from __future__ import annotations

from vmm.boot.loader import extract_vmlinux, load
from vmm.boot.state import BootState

__all__ = ["BootState", "extract_vmlinux", "load"]
