"""Where an ELF kernel's bytes come from: a file, or a payload that is unpacked as it is loaded.

Both fill guest memory directly: from a file by preadv(2), from a payload one unpacked block at a
time, so the kernel is never whole in the monitor's memory.
"""

from __future__ import annotations

from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmm.boot.file import FilePart, InputFile

    Target = tuple[int, memoryview]
    """An offset in the ELF file, and the memory its bytes there go to."""

PAYLOAD_MAX = 1 << 30
"""No kernel is larger; what claims to be is not unpacked to see."""


def close(blocks: Iterator[bytes]) -> None:
    """Tell a generator that nobody reads on; what it unpacked may be worth keeping."""
    end = getattr(blocks, "close", None)
    if end is not None:
        end()


class FileSource:
    """An ELF file."""

    __slots__ = ("_file", "name", "size")

    def __init__(self, file: InputFile | FilePart) -> None:
        self._file = file
        self.name = file.name
        self.size = file.size

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at `offset`; fewer where the file ends."""
        return self._file.read(offset, size) if offset < self.size else b""

    def fill(self, targets: Sequence[Target]) -> None:
        """Copy each range of the file to its memory."""
        for offset, view in targets:
            self._file.read_into(offset, view)


class PayloadSource:
    """An unpacked payload, given as an iterator over its blocks; `fill` works once.

    `size` is not known before it is unpacked: it is PAYLOAD_MAX.
    """

    __slots__ = ("_blocks", "_first", "name", "size")

    def __init__(self, blocks: Iterator[bytes], name: str) -> None:
        self.name = name
        self.size = PAYLOAD_MAX
        self._blocks = blocks
        self._first = next(blocks, b"")

    def close(self) -> None:
        """Unpack no further; harmless twice."""
        close(self._blocks)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the first block only, where an ELF file has its headers."""
        return self._first[offset : offset + size]

    def fill(self, targets: Sequence[Target]) -> None:
        """Unpack, and copy each range to its memory; stops when the last is there."""
        end = max((offset + len(view) for offset, view in targets), default=0)
        block, start = self._first, 0
        self._first = b""
        while True:
            data = memoryview(block)
            stop = start + len(block)
            for offset, view in targets:
                low, high = max(offset, start), min(offset + len(view), stop)
                if low < high:
                    view[low - offset : high - offset] = data[low - start : high - start]
            if stop >= end:
                close(self._blocks)
                return
            block, start = next(self._blocks, b""), stop
            if not block:
                raise BootError(f"{self.name} is truncated: it has {stop} bytes of {end}")
