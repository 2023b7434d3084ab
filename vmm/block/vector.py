"""Transfers between files and lists of buffers, whole or not at all."""

from __future__ import annotations

import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Call = Callable[[int, Sequence[memoryview], int], int]


def whole(call: Call, fd: int, views: Sequence[memoryview], offset: int) -> None:
    """preadv(2) or pwritev(2), as often as it takes; OSError EIO where the file ends before."""
    want = sum(map(len, views))
    while True:
        done = call(fd, views, offset)
        if done == want:
            return
        if done <= 0:
            raise OSError(errno.EIO, "short transfer")  # the file has been cut short
        want -= done
        offset += done
        _, views = cut(views, done)


def cut(views: Sequence[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `size` bytes of `views`, and the rest."""
    head: list[memoryview] = []
    for number, view in enumerate(views):
        if len(view) > size:
            return [*head, view[:size]] if size else head, [view[size:], *views[number + 1 :]]
        head.append(view)
        size -= len(view)
    return head, []
