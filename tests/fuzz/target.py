"""A fuzz target: a function of bytes that returns, or raises what is a finding.

What a parser may raise on purpose it raises to the target, which passes over it: everything else
that leaves `run` is a finding, and so is an input that takes longer than ENDLESS or more memory
than GROWTH_MAX.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ENDLESS = 10.0
"""Seconds."""
GROWTH_MAX = 1 << 30
"""Bytes by which a target's process may grow for an input."""


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: as `--target` has it.
        start: makes what its inputs need, and returns the function of an input.
        seeds: inputs to begin with.
        covers: the modules it is about, for coverage.
    """

    name: str
    start: Callable[[], Callable[[bytes], None]]
    seeds: Callable[[], list[bytes]]
    covers: tuple[str, ...]


def scratch() -> str:
    """A new directory for files that an input makes; in memory, where there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = tempfile.mkdtemp(prefix="vmm-fuzz-", dir=place)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@contextmanager
def as_file(data: bytes) -> Iterator[str]:
    """The path of a file with `data` in it."""
    fd = os.memfd_create("input")
    try:
        os.write(fd, data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
