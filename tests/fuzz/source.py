"""What a fuzz target makes of its input: numbers, choices, edits of structured data.

The bytes decide everything, so that an input is the same each time and a small change of it is a
small change of what it means; past its end there are zeros.
"""

from __future__ import annotations

import copy
import random
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")
NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 511, 512, 513, 4095, 4096, 0x7FFF, 0x8000, 0xFFFF, 0x10000,
    1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
ODD: tuple[object, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, 1 << 64,
    10**40, 1.5, float("nan"), float("inf"), "", "x", "auto", "none", "\0", "a\0b", "\udc80",
    "\ud800", "-", ".", "..", "../x", "/", "/etc/passwd", "a" * 300, "a" * 5000, "1G", "0", "é",
    "=", ",", "a=b", "a,b=c", "%s", [], {}, [None], [[]], {"": None}, {"path": 1}, ["a"] * 100,
)  # fmt: skip


class Source:
    """Reads an input from its beginning."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that have not been read."""
        return max(len(self._data) - self._at, 0)

    def take(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        found = self._data[self._at : self._at + size]
        self._at += size
        return found

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def number(self, size: int) -> int:
        """An integer of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def below(self, end: int) -> int:
        """An integer from 0 to `end` - 1."""
        return self.number(1 if end <= 256 else 2 if end <= 1 << 16 else 4) % end

    def choice(self, among: Sequence[T]) -> T:
        """One of them."""
        return among[self.below(len(among))]

    def integer(self, bits: int = 64) -> int:
        """One of the numbers at which code goes wrong, or any."""
        kind = self.number(1)
        if kind < 128:
            return self.choice(NUMBERS) & (1 << bits) - 1
        if kind < 192:
            return self.number(1)
        return self.number(bits // 8)

    def text(self) -> str:
        """A short text of any characters."""
        return self.take(self.below(24)).decode("utf-8", "surrogateescape")

    def pieces(self) -> list[bytes]:
        """What is left, cut up as a stream may deliver it."""
        data, cuts = self.rest(), []
        step = 1 + data[0] % 64 if data else 1
        for at in range(0, len(data), step):
            cuts.append(data[at : at + step])
        return cuts

    def odd(self) -> Any:
        """A value that does not belong where it is put."""
        if self.number(1) < 32:
            return self.integer() if self.number(1) & 1 else self.text()
        return copy.deepcopy(self.choice(ODD))

    def edited(self, tree: Any) -> Any:
        """A copy of plain data with some places changed, as many as the input has bytes for."""
        tree = copy.deepcopy(tree)
        for _ in range(1 + self.below(4)):
            tree = self._edit(tree)
        return tree

    def _edit(self, tree: Any) -> Any:
        places: list[tuple[Any, Any]] = []
        level = [tree] if isinstance(tree, (dict, list)) else []
        for _ in range(8):
            below: list[Any] = []
            for each in level:
                items = each.items() if isinstance(each, dict) else enumerate(each)
                for key, value in items:
                    places.append((each, key))
                    if isinstance(value, (dict, list)):
                        below.append(value)
            level = below
        if not places:
            return self.odd()
        parent, key = places[self.number(2) % len(places)]
        what = self.below(8)
        value = parent[key]
        if what == 0:
            del parent[key]
        elif what == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(value))
        elif what == 1:
            parent[self.text()] = copy.deepcopy(value)
        elif what == 2 and isinstance(value, int):
            parent[key] = value + self.choice((-1, 1, 8, 4096, -4096, 1 << 32))
        elif what == 3:
            other, its = places[self.number(2) % len(places)]
            # What holds it would hold itself: no parser makes such data.
            parent[key] = copy.deepcopy(other[its]) if its in _keys(other) else None
        elif what == 4 and isinstance(value, str):
            at = self.below(len(value) + 1)
            parent[key] = value[:at] + self.text() + value[at + self.below(3) :]
        elif what == 5 and isinstance(value, bytes):
            parent[key] = value[: self.below(len(value) + 1)] + self.take(self.below(8))
        else:
            parent[key] = self.odd()
        return tree


def _keys(of: Any) -> Any:
    return of.keys() if isinstance(of, dict) else range(len(of))


class Chance(random.Random):
    """A random.Random that an input decides; after its end it goes on from the input's checksum."""

    def __init__(self, data: bytes) -> None:
        super().__init__(zlib.crc32(data))
        self._source = Source(data)

    def random(self) -> float:
        """As of random.Random."""
        if self._source.left < 2:
            return super().random()
        return self._source.number(2) / 65536

    def getrandbits(self, k: int, /) -> int:
        """As of random.Random."""
        if not self._source.left:
            return super().getrandbits(k)
        return self._source.number((k + 7) // 8) >> (-k % 8)
