"""What a process holds, counted: what a leak would make grow."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
FLAT = ("descriptors", "threads", "children", "files", "links")
"""What must be as at the begin whenever no machine is there; /dev/shm is everybody's."""


@dataclass
class Figures:
    """A count of everything, at one moment.

    Attributes:
        descriptors: this process's open files.
        threads: its threads, as the kernel counts them.
        children: its child processes, zombies too.
        files: entries of the scratch directory that machines' temporary files are in.
        shared: entries of /dev/shm that are named `vmm`-something.
        links: network interfaces of this namespace that are.
        rss: resident memory, bytes.
        mappings: lines of /proc/self/maps.
    """

    descriptors: int
    threads: int
    children: int
    files: int
    shared: int
    links: int
    rss: int
    mappings: int

    def flat(self) -> tuple[int, ...]:
        """The values of FLAT."""
        return tuple(getattr(self, name) for name in FLAT)

    def __str__(self) -> str:
        names = (*FLAT, "shared")
        counts = ", ".join(f"{getattr(self, name)} {name}" for name in names)
        return f"{counts}, {self.mappings} mappings, RSS {self.rss / 2**20:.1f} MiB"


def take(temporary: Path) -> Figures:
    """Count; `temporary` is the directory that TMPDIR names."""
    return Figures(
        descriptors=len(os.listdir("/proc/self/fd")) - 1,  # listdir's own
        threads=len(os.listdir("/proc/self/task")),
        children=len(children()),
        files=len(os.listdir(temporary)),
        shared=_entries("/dev/shm"),
        links=_entries("/sys/class/net"),
        rss=int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
        mappings=len(Path("/proc/self/maps").read_text().splitlines()),
    )


def children() -> dict[int, str]:
    """This process's children: their names by number."""
    found = {}
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                found[int(pid)] = Path(f"/proc/{pid}/comm").read_text().strip()
    return found


def what(temporary: Path) -> str:
    """The things counted, by name, to find which of them is too much."""
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
    names = sorted(thread.name for thread in threading.enumerate())
    names += [
        f"{frame.f_code.co_filename}:{frame.f_lineno}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return (
        f"descriptors {sorted(targets)}\nthreads {names}\nchildren {children()}\n"
        f"files {sorted(os.listdir(temporary))}"
    )


def growth(samples: list[int]) -> float:
    """By how much memory grows from the second quarter of `samples` to the last, bytes a sample.

    Medians of quarters: a sample taken while an allocator holds more than usual does not count.
    """
    quarter = len(samples) // 4
    if not quarter:
        return 0.0
    early = statistics.median(samples[quarter : 2 * quarter])
    late = statistics.median(samples[-quarter:])
    return (late - early) / (len(samples) - 1.5 * quarter - quarter / 2)


def _entries(path: str) -> int:
    """How many entries are ours by their names: other programs of the host have some too."""
    try:
        return sum(name.startswith("vmm") for name in os.listdir(path))
    except OSError:
        return 0
