"""A snapshot taken once and used by many tests, in this process and others."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmm import Machine


def shared_snapshot(base: Path, what: Iterable[object], boot: Callable[[], Machine]) -> Path:
    """The directory under `base` with a snapshot of `what`, taken of `boot()`'s machine if new.

    `what` names the state: things whose repr() is the same in each process that should share it.
    One process boots while the others wait for it.
    """
    names = [part if isinstance(part, bytes) else _name(part).encode() for part in what]
    key = hashlib.sha256(b"".join(hashlib.sha256(name).digest() for name in names)).hexdigest()
    directory = base / key[:32]
    base.mkdir(parents=True, exist_ok=True)
    with open(base / f"{key[:32]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the descriptor, however this process ends
        if not directory.is_dir():
            machine = boot()
            machine.snapshot(os.fspath(directory))
            machine.close()
    return directory


def _name(part: object) -> str:
    # A function's repr has its address in it, which differs from process to process.
    if callable(part):
        return f"{getattr(part, '__module__', '')}.{getattr(part, '__qualname__', part)}"
    return repr(part)
