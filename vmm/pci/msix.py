"""MSI-X (PCI 3.0, section 6.8.2): a table of messages in a BAR, one eventfd a vector.

A vector is open while MSI-X is enabled, the function is a bus master, and neither the function nor
the vector is masked. What is raised on a closed one is pending, and sent when it opens. Whoever
connects the eventfds to KVM is told of a message when its vector opens, not at each of the writes
that lead to it.
"""

from __future__ import annotations

import os
import struct
from _thread import allocate_lock

from vmm.devices.device import Device, state_bytes, state_int
from vmm.errors import ShapeError
from vmm.pci import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.pci.function import PciFunction
    from vmm.shapes import Shape

LOW = 0xFFFFFFFF
_ENTRY = struct.Struct("<QII")
_MASKED = _ENTRY.pack(0, 0, spec.MSIX_VECTOR_MASK)


class Msix(Device):
    """The table and, behind it, the pending bits; the device of a BAR.

    Args:
        function: its capabilities and the BAR `index` get what belongs there.
        vectors: how many, 1 to 2048.

    Attributes:
        connect: `connect(vector, fd, address, data)`: from now on a write to eventfd `fd` sends
            that message. Called in vCPU threads, with a lock held.
    """

    def __init__(self, function: PciFunction, index: int, vectors: int) -> None:
        if not 1 <= vectors <= spec.MSIX_VECTORS_MAX:
            raise ValueError(f"{function.name}: {vectors} vectors, not 1 to 2048")
        super().__init__(f"{function.name} MSI-X")
        self.vectors = vectors
        self.connect: Callable[[int, int, int, int], None] | None = None
        self._function = function
        self._lock = allocate_lock()
        self._table = bytearray(_MASKED * vectors)
        self._pba = spec.MSIX_ENTRY * vectors + 2047 & ~2047
        self._fds = [-1] * vectors
        self._sent: list[tuple[int, int] | None] = [None] * vectors
        """The messages the eventfds are connected to."""
        self._open = [False] * vectors
        self._pending = 0
        self._enabled = False
        body = struct.pack("<HII", vectors - 1, index, self._pba | index)
        mask = (spec.MSIX_ENABLE | spec.MSIX_FUNCTION_MASK).to_bytes(2, "little")
        self._capability = function.add_capability(spec.CAP_MSIX, body, mask)
        function.on_write(self._capability, self.update)
        function.add_bar(index, self._pba + (vectors + 63) // 64 * 8, self)

    @property
    def enabled(self) -> bool:
        """Whether the driver uses MSI-X, masked or not."""
        return self._enabled

    def raise_vector(self, vector: int) -> None:
        """Send the message of `vector` (any number), or remember it; from any thread."""
        if vector >= self.vectors:
            return
        with self._lock:
            if self._open[vector]:
                os.eventfd_write(self._fds[vector], 1)
            elif self._enabled:
                self._pending |= 1 << vector

    def update(self) -> None:
        """The capability or the command register was written."""
        with self._lock:
            control = self._function.get(self._capability + spec.MSIX_CONTROL, 2)
            self._enabled = bool(control & spec.MSIX_ENABLE)
            if not self._enabled:
                self._pending = 0
            for vector in range(self.vectors):
                self._set(vector)

    def reset(self) -> None:
        """The table as after power-on; MSI-X is disabled already."""
        with self._lock:
            self._table[:] = _MASKED * self.vectors
            self._pending = 0
            for vector in range(self.vectors):
                self._set(vector)

    def _set(self, vector: int) -> None:
        """Open or close one vector as the registers say; the lock is held."""
        address, data, control = _ENTRY.unpack_from(self._table, spec.MSIX_ENTRY * vector)
        function = self._function
        closed = function.get(self._capability + spec.MSIX_CONTROL, 2) & spec.MSIX_FUNCTION_MASK
        if (
            not self._enabled
            or closed
            or control & spec.MSIX_VECTOR_MASK
            or not function.command & spec.COMMAND_MASTER
            or address & LOW & spec.MSI_ADDRESS_MASK != spec.MSI_ADDRESS
            or address > LOW
        ):
            # A message to anywhere else would be a write to memory, which no driver wants.
            self._open[vector] = False
            return
        if self._fds[vector] < 0:
            self._fds[vector] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if self._sent[vector] != (address, data):
            if self.connect is not None:
                self.connect(vector, self._fds[vector], address, data)
            self._sent[vector] = (address, data)
        self._open[vector] = True
        if self._pending >> vector & 1:
            self._pending &= ~(1 << vector)
            os.eventfd_write(self._fds[vector], 1)

    # --- the BAR ----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset < len(self._table):
            return int.from_bytes(self._table[offset : offset + size], "little")
        if offset >= self._pba:
            return self._pending >> 8 * (offset - self._pba) & (1 << 8 * size) - 1
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if size not in (4, 8) or offset % size or offset + size > len(self._table):
            return  # other accesses are undefined
        with self._lock:
            vector = offset // spec.MSIX_ENTRY
            self._table[offset : offset + size] = value.to_bytes(size, "little")
            self._trim(vector)
            self._set(vector)

    def _trim(self, vector: int) -> None:
        """Of vector control one bit is there, and messages are of whole 4 bytes."""
        at = spec.MSIX_ENTRY * vector
        self._table[at] &= 0xFC
        self._table[at + 12 : at + 16] = bytes((self._table[at + 12] & 1, 0, 0, 0))

    # --- life -------------------------------------------------------------------------------------

    def fd(self, vector: int) -> int:
        """The eventfd of `vector`; -1 while it was never open."""
        return self._fds[vector]

    def close(self) -> None:
        with self._lock:
            fds, self._fds = self._fds, [-1] * self.vectors
            self._open = [False] * self.vectors
            self._sent = [None] * self.vectors
            self._enabled = False
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def save(self) -> dict[str, object]:
        return {"table": bytes(self._table), "pending": self._pending}

    def shape(self) -> Shape:
        from vmm.shapes import Data, Table, Whole

        pending = Whole(0, (1 << self.vectors) - 1)
        return Table({"table": Data(len(self._table)), "pending": pending})

    def restore(self, state: dict[str, object]) -> None:
        """After the function's, whose registers say what is open."""
        table = state_bytes(state, "table")
        if len(table) != len(self._table):
            raise ShapeError(f"state of {self.name}: not {self.vectors} vectors")
        with self._lock:
            self._table[:] = table
            for vector in range(self.vectors):
                self._trim(vector)
            self._pending = state_int(state, "pending", (1 << self.vectors) - 1)
        self.update()
