"""Address spaces: which device answers at which port or physical address.

One lookup is on the path of every PIO and MMIO exit, so it is one dictionary get: addresses that
were hit before (a driver uses a few dozen) lead straight to the device's bound methods; others
are found by bisection and remembered. Addresses nobody claims read all ones, as an empty bus
does, and ignore writes.
"""

from __future__ import annotations

from _bisect import bisect_right  # the C function; `bisect` is one more module to load
from _thread import allocate_lock

from vmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import Device

    Entry = tuple[int, int, Callable[[int, int], int], Callable[[int, int, int], None], int, Device]
    """base, end (exclusive), read, write, the offset of `base` within the device, the device."""

CACHE_LIMIT = 4096
"""Remembered addresses; a guest that walks the whole space must not grow the monitor."""
TRACE_LIMIT = 256
"""Unclaimed addresses told of before tracing falls silent."""


class BusError(VmmError):
    """A device was put where it cannot be."""


class AddressSpace:
    """Addresses 0 to 2**width - 1 with devices on them.

    `trace`, where set, is told once of each unclaimed address a guest touches, in one line.
    """

    def __init__(self, name: str, width: int) -> None:
        self.name = name
        self.width = width
        self.trace: Callable[[str], None] | None = None
        self._limit = 1 << width
        self._bases: list[int] = []
        self._entries: list[Entry] = []
        self._cache: dict[int, Entry] = {}
        self._seen: set[tuple[int, bool]] = set()
        self._lock = allocate_lock()

    def add(self, base: int, length: int, device: Device, offset: int = 0) -> None:
        """Let `device` answer at [base, base + length); its register `offset` is at `base`.

        Raises BusError where that is not wholly free address space.
        """
        end = base + length
        if length <= 0 or base < 0 or end > self._limit:
            raise BusError(
                f"{self.name}: {device.name} at {base:#x}+{length:#x} is outside "
                f"0..{self._limit - 1:#x}"
            )
        entry = (base, end, device.read, device.write, offset, device)
        with self._lock:
            at = bisect_right(self._bases, base)
            for other in self._entries[max(at - 1, 0) : at + 1]:
                if base < other[1] and other[0] < end:
                    raise BusError(
                        f"{self.name}: {device.name} at {base:#x}..{end - 1:#x} overlaps "
                        f"{other[5].name} at {other[0]:#x}..{other[1] - 1:#x}"
                    )
            self._bases.insert(at, base)
            self._entries.insert(at, entry)
            self._cache.clear()

    def remove(self, device: Device) -> None:
        """Take every window of `device` away; an access already under way still ends on it."""
        with self._lock:
            self._entries = [entry for entry in self._entries if entry[5] is not device]
            self._bases = [entry[0] for entry in self._entries]
            self._cache.clear()

    def devices(self) -> list[Device]:
        """Each device once, in the order of their addresses."""
        return list({id(entry[5]): entry[5] for entry in self._entries}.values())

    def windows(self) -> list[tuple[int, int, Device]]:
        """(base, length, device) of every window, in the order of addresses."""
        return [(entry[0], entry[1] - entry[0], entry[5]) for entry in self._entries]

    def lookup(self, addr: int) -> tuple[Device, int] | None:
        """The device at `addr` and the offset within it, or None."""
        entry = self._cache.get(addr) or self._find(addr)
        return None if entry is None else (entry[5], addr - entry[0] + entry[4])

    def read(self, addr: int, size: int) -> int:
        """What a guest's read of `size` bytes (1 to 8) at `addr` gives."""
        entry = self._cache.get(addr) or self._find(addr)
        if entry is not None and addr + size <= entry[1]:
            return entry[2](addr - entry[0] + entry[4], size)
        cycles = self._split(addr, size)
        if not cycles:
            if self.trace is not None:
                self._tell(addr, size, None)
            return (1 << (8 * size)) - 1
        value = 0
        for shift, length, part in cycles:
            at = addr + shift // 8
            piece = (1 << (8 * length)) - 1
            if part is not None:
                piece = part[2](at - part[0] + part[4], length)
            value |= piece << shift
        return value

    def write(self, addr: int, size: int, value: int) -> None:
        """A guest's write of `value`, `size` bytes (1 to 8) long, at `addr`."""
        entry = self._cache.get(addr) or self._find(addr)
        if entry is not None and addr + size <= entry[1]:
            entry[3](addr - entry[0] + entry[4], size, value)
            return
        cycles = self._split(addr, size)
        if not cycles and self.trace is not None:
            self._tell(addr, size, value)
        for shift, length, part in cycles:
            if part is not None:
                at = addr + shift // 8
                piece = value >> shift & (1 << (8 * length)) - 1
                part[3](at - part[0] + part[4], length, piece)

    def _find(self, addr: int) -> Entry | None:
        with self._lock:  # so that no stale entry comes back into the cache after `remove`
            entry = self._at(addr)
            if entry is not None:
                if len(self._cache) >= CACHE_LIMIT:
                    self._cache.clear()
                self._cache[addr] = entry
            return entry

    def _at(self, addr: int) -> Entry | None:
        at = bisect_right(self._bases, addr)
        if at and addr < self._entries[at - 1][1]:
            return self._entries[at - 1]
        return None

    def _split(self, addr: int, size: int) -> list[tuple[int, int, Entry | None]]:
        """The cycles (shift in bits, bytes, who answers) of an access no device was found to
        claim wholly: none if nobody claims any of it, byte cycles if it straddles an edge, as a
        bus splits it, and one if a device was plugged in just now."""
        with self._lock:
            owners = [self._at(addr + i) for i in range(size)]
        if all(owner is None for owner in owners):
            return []
        if all(owner is owners[0] for owner in owners):
            return [(0, size, owners[0])]
        return [(8 * i, 1, owner) for i, owner in enumerate(owners)]

    def _tell(self, addr: int, size: int, value: int | None) -> None:
        key = (addr, value is None)
        with self._lock:
            if key in self._seen or len(self._seen) > TRACE_LIMIT:
                return
            self._seen.add(key)
            last = len(self._seen) > TRACE_LIMIT
        trace = self.trace
        if trace is None:
            return
        if last:
            trace(f"{self.name}: more unclaimed addresses; not told of any further")
        elif value is None:
            trace(f"{self.name}: read of {size} at {addr:#x}: nobody there")
        else:
            trace(f"{self.name}: write of {size} at {addr:#x}, value {value:#x}: nobody there")
