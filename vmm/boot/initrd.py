"""Initial RAM disks: concatenated, placed as high as the kernel allows."""

from __future__ import annotations

import os

from vmm import layout
from vmm.boot.formats import open_file
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.memory import GuestMemory


class Initrds:
    """Open initrd files. Each starts on a 4-byte boundary, as the kernel's cpio reader expects
    of concatenated archives (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._files: list[tuple[str, int, int]] = []
        self.size = 0
        """Bytes they take in guest memory, padding included."""
        try:
            for path in paths:
                fd = open_file(path, "--initrd")
                size = os.fstat(fd).st_size
                self._files.append((path, fd, size))
                if not size:
                    raise BootError(f"--initrd {path} is empty")
                self.size += size + 3 & ~3
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        for _, fd, _ in self._files:
            os.close(fd)
        self._files = []

    def load(self, memory: GuestMemory, lowest: int, highest: int) -> tuple[int, int]:
        """Read them into guest memory as high as possible in [lowest, highest] (last byte).

        Returns:
            GPA, page-aligned, and size; (0, 0) if there are none.

        Raises:
            BootError: they do not fit; tells the least memory that would do.
        """
        if not self.size:
            return 0, 0
        top = min(memory.regions[0].size, highest + 1)
        gpa = (top - self.size) & ~(layout.PAGE_SIZE - 1)
        if gpa < lowest:
            need = lowest + self.size + layout.PAGE_SIZE
            if need > min(highest + 1, layout.HOLE_START):
                raise BootError(
                    f"--initrd: {self.size >> 20} MiB cannot lie below {highest + 1:#x}, where this "
                    "kernel looks for it; make it smaller"
                )
            raise too_little_memory(memory.size, need, "the initrd")
        at = gpa
        for path, fd, size in self._files:
            view = memory.view(at, size)
            while view:
                count = os.readv(fd, [view])
                if not count:
                    raise BootError(f"--initrd {path} became shorter while it was read")
                view = view[count:]
            at += size + 3 & ~3
        return gpa, self.size


def too_little_memory(size: int, need: int, what: str) -> BootError:
    """The error that tells the least `--memory` that would do; `need` bytes are the minimum."""
    # The kernel's own structures and the unpacked initrd come on top; round up to 16 MiB.
    least = (need + 16 * layout.MIB - 1) // (16 * layout.MIB) * 16
    return BootError(
        f"--memory {size // layout.MIB}M is too little for the kernel and {what}: "
        f"at least --memory {least}M"
    )
