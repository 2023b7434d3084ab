"""A machine that comes from a snapshot: its memory, mapped privately, and its state."""

from __future__ import annotations

from vmm.machine.origin import Origin
from vmm.snapshot.memory import is_layered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory
    from vmm.memory.base import Base
    from vmm.snapshot.store import Snapshot


class Restored(Origin):
    """Memory that is the private mapping of a snapshot's, until somebody maps something else.

    Args:
        checksum: the snapshot's.
        memory: what is mapped, if it is already.
    """

    def __init__(self, checksum: str, memory: GuestMemory | None = None) -> None:
        self.checksum = checksum
        self._memory = memory
        self._base: Base | None = None if memory is None else memory.base

    def mapped(self, memory: GuestMemory) -> None:
        """`memory` is what was mapped."""
        self._memory, self._base = memory, memory.base

    def is_over(self, memory: GuestMemory, snapshot: Snapshot) -> bool:
        """Whether `memory` is that of `snapshot` but for the pages that are its own."""
        if snapshot.checksum != self.checksum or memory is not self._memory:
            return False
        if self._base is None:
            return is_layered(memory)
        return memory.base is self._base
