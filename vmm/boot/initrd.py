"""Initial RAM disks: concatenated, placed as high as the kernel allows."""

from __future__ import annotations

from vmm import layout
from vmm.boot.file import InputFile
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from vmm.boot.file import FilePart
    from vmm.memory import GuestMemory


QUICK = (b"070701", b"070702", b"\x28\xb5\x2f\xfd")
"""What cpio archives and zstd data begin with: nothing more is looked at."""


class Blob:
    """An initrd in memory, used as an InputFile is."""

    __slots__ = ("_data", "size")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset` on."""
        view[:] = memoryview(self._data)[offset : offset + len(view)]

    def close(self) -> None:
        """Nothing to give back."""


class Initrds:
    """Initrds: open files, and archives in memory (bytes). A context manager.

    Each starts on a 4-byte boundary, as the kernel's cpio reader expects of concatenated archives
    (Documentation/driver-api/early-userspace/buffer-format.rst).

    Attributes:
        size: bytes they take in guest memory, padding included.
    """

    __slots__ = ("_files", "size")

    def __init__(self, given: Sequence[str | bytes]) -> None:
        self._files: list[InputFile | FilePart | Blob] = []
        try:
            for one in given:
                made = Blob(one) if isinstance(one, bytes) else InputFile(one, "--initrd")
                self._files.append(made)
        except BaseException:
            self.close()
            raise
        self.size = sum(_padded(file.size) for file in self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def put_first(self, parts: Sequence[FilePart]) -> None:
        """Have `parts` come before the others."""
        self._files[:0] = parts
        self.size = sum(_padded(file.size) for file in self._files)

    def check(self) -> None:
        """Refuse what Linux can make nothing of.

        Raises:
            BootError: one is another kind of file, or cut short; says which and what would work.
        """
        for file in self._files:
            if not isinstance(file, Blob) and not file.read(0, 6).startswith(QUICK):
                from vmm.boot import initrd_check

                initrd_check.check(file)

    def place(self, memory: GuestMemory, lowest: int, highest: int) -> tuple[int, int]:
        """Where they go: as high as possible from `lowest` on, up to the byte at `highest`.

        Args:
            lowest: GPA after all the kernel needs.
            highest: initrd_addr_max.

        Returns:
            GPA, page-aligned, and size; (0, 0) if there are none.

        Raises:
            BootError: kernel and initrd do not fit; tells the least memory that would do.
        """
        low_end = memory.regions[0].size
        need = _pages(lowest) + _pages(self.size)
        if need > layout.HOLE_START or (self.size and need > highest + 1):
            if not self.size:
                raise BootError(f"the kernel needs RAM up to {need:#x}, where there is never any")
            end = min(highest + 1, layout.HOLE_START)
            raise BootError(
                f"--initrd: {self.size} bytes do not fit between the kernel, which ends at "
                f"{lowest:#x}, and {end:#x}, up to where it can use them; make it smaller"
            )
        if need > low_end:
            what = "the kernel and the initrd" if self.size else "the kernel"
            least = (need + layout.MIB - 1) // layout.MIB
            raise BootError(
                f"--memory {memory.size // layout.MIB}M is too little for {what}: "
                f"at least --memory {least}M"
            )
        if not self.size:
            return 0, 0
        return min(low_end, highest + 1) - self.size & -layout.PAGE_SIZE, self.size

    def load(self, memory: GuestMemory, gpa: int) -> None:
        """Read them into guest memory at `gpa`."""
        for file in self._files:
            file.read_into(0, memory.view(gpa, file.size))
            gpa += _padded(file.size)


def _padded(size: int) -> int:
    return size + 3 & -4


def _pages(size: int) -> int:
    return size + layout.PAGE_SIZE - 1 & -layout.PAGE_SIZE
