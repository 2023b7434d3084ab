"""What a forked child must not keep: descriptors of machines, which are its parent's.

A child that `os.fork` makes (as multiprocessing does on Linux up to Python 3.13) has every
descriptor of its parent, close-on-exec or not: as long as it lives, an image stays locked, a tap
taken, a client of a socket waits for an end that never comes. So in the child each of them becomes
/dev/null at once, and each machine a closed one. The parent's machines do not notice.

Processes that are started as programs (subprocess) do not inherit them.
"""

from __future__ import annotations

import os
from _weakrefset import WeakSet
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_owners: WeakSet[Any] = WeakSet()
_registered = False


def drop_in_child(owner: Any) -> None:
    """Have a forked child drop `owner`: a socket, an object with a descriptor `fd` (negative once
    it is closed), or one that has a method `forked`, which is called in the child."""
    global _registered
    if not _registered:
        _registered = True
        os.register_at_fork(after_in_child=_in_child)
    _owners.add(owner)


def _in_child() -> None:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for owner in list(_owners):
        forked = getattr(owner, "forked", None)
        if forked is not None:
            forked()
            continue
        fd = owner.fd if hasattr(owner, "fd") else owner.fileno()
        if fd >= 0:
            with suppress(OSError):
                os.dup2(null, fd, inheritable=False)
    os.close(null)
