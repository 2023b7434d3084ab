"""Guest memory: regions around the 32-bit hole, bounds-checked access, views without copies."""

from __future__ import annotations

from vmm.memory.backing import map_backing
from vmm.memory.guest import GuestMemory
from vmm.memory.region import Region

__all__ = ["GuestMemory", "Region", "map_backing"]
