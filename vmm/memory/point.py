"""What guest memory held at a moment, to share and to go back to: a base, and pages beside it."""

from __future__ import annotations

from vmm.errors import StateError
from vmm.layout import PAGE_SIZE
from vmm.memory.base import copy, give_up, map_over_base, private_runs, settle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.memory.base import Base
    from vmm.memory.guest import GuestMemory
    from vmm.memory.pagemap import Pagemap

COPY_PAGES = 4096
"""Up to so many pages are put back by copying, and stay the memory's own: who writes to them again
pays for no fault. It makes a loop ten times as quick as giving them up; but they are copied each
time, so more than that are given up at once."""
KEEP_PAGES = 1024
"""Up to so many pages are kept beside a base that has to stay as it is (a snapshot's file, or one
that others use); of more, and of all that the base holds, a new base is made."""


class Point:
    """The contents of memory at one moment.

    Attributes:
        base: a share of it.
        kept: for each region, (first byte, contents) of runs that were not as in the base.
    """

    __slots__ = ("base", "kept")

    def __init__(self, base: Base, kept: list[list[tuple[int, bytes]]]) -> None:
        self.base = base
        self.kept = kept

    def close(self) -> None:
        """Let go of the base."""
        self.base.release()

    def write_kept(self, memory: GuestMemory) -> None:
        """Make memory that is as in the base what it was."""
        for region, runs in zip(memory.regions, self.kept, strict=True):
            data = region.data
            for offset, content in runs:
                data[offset : offset + len(content)] = content

    def restore(self, memory: GuestMemory, pagemap: Pagemap, unmap: Sequence[int] = ()) -> int:
        """Undo every write since, whoever made it; the pages that were put back.

        `memory`, whose the point is, must be still. Pages that an earlier call has put back may be
        counted, and copied, again.

        Args:
            unmap: GPAs of pages that are not to stay mapped, which KVM is told of.
        """
        base = self.base
        if base.lost:
            raise StateError(
                "rollback: somebody has changed the snapshot's file that the machine was restored "
                "from; take another checkpoint"
            )
        if memory.base is not base:  # it was put over something else meanwhile
            map_over_base(memory, base.share())
        for region in memory.regions:
            inside = [
                (gpa - region.gpa, PAGE_SIZE) for gpa in unmap if region.gpa <= gpa < region.end
            ]
            if inside:
                give_up(region, sorted(inside))
        found = private_runs(memory, pagemap)
        pages = sum([size for runs in found for _, size in runs]) // PAGE_SIZE
        for number, (region, runs) in enumerate(zip(memory.regions, found, strict=True)):
            if pages > COPY_PAGES:
                give_up(region, runs)
                continue
            with base.view(number, region.size) as view:
                data = region.data
                for offset, size in runs:
                    data[offset : offset + size] = view[offset : offset + size]
        self.write_kept(memory)
        return pages


def take(
    memory: GuestMemory, pagemap: Pagemap, *, keep: int = KEEP_PAGES, remap: bool = True
) -> Point:
    """What `memory`, which must be still, holds now.

    Args:
        keep: how many pages may be kept beside a base that has to stay as it is.
        remap: put `memory` over a base, if it is over none, or a new one is made; else it stays
            as it is, and what is in use is copied.

    Raises:
        StateError: its kind of memory cannot be private page by page.
    """
    base = memory.base
    if base is not None and (base.fixed or not remap):
        found = private_runs(memory, pagemap)
        if sum([size for runs in found for _, size in runs]) <= keep * PAGE_SIZE:
            kept = [
                [(offset, region.map[offset : offset + size]) for offset, size in runs]
                for region, runs in zip(memory.regions, found, strict=True)
            ]
            return Point(base.share(), kept)
    nothing: list[list[tuple[int, bytes]]] = [[] for _ in memory.regions]
    if not remap:
        return Point(copy(memory, pagemap), nothing)
    return Point(settle(memory, pagemap).share(), nothing)
