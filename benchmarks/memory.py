"""Row e: the monitor's memory beyond its guest's, first machine and each further one.

Every guest here halts with interrupts off, so all processes sit still while they are read. What is
counted is /proc/PID/smaps less the mappings that are guest RAM; the kernel's own memory for a VM
is the same for every monitor and is not in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import guests, native
from benchmarks.series import Progress, Series, interleave
from benchmarks.start import QEMU
from vmm.errors import HostError
from vmm.layout import MIB

REPETITIONS = 5
FURTHER = 8
"""Machines after the first, in one Python process."""
RAM = 256 * MIB
SETTLE = 0.2
"""Seconds from the guest's first touch of its RAM to reading: all monitors are asleep by then."""
TIME_LIMIT = 20.0


def measure(progress: Progress) -> list[Series]:
    """One process each of `vmm run`, QEMU and C; and many machines in one Python process."""
    with tempfile.TemporaryDirectory(prefix="vmm-bench-") as scratch:
        kernel = os.path.join(scratch, "halt.elf")
        Path(kernel).write_bytes(guests.pvh_elf(guests.HALT))
        command = os.path.join(os.path.dirname(sys.executable), "vmm")
        child = [sys.executable, "-m", "benchmarks.memory_child", kernel]
        contenders: dict[str, Callable[[], Sequence[float]]] = {
            "vmm run": lambda: _two([command, "run", kernel]),
            "Machine in one process": lambda: _in_one(child),
            "QEMU microvm": lambda: _two([*QEMU, kernel, "-m", "256M"]),
            "floor: the ioctls in C": lambda: _two([native.program(), "idle"]),
        }
        results = interleave(contenders, REPETITIONS, progress, "memory", warm_up=0)
    names = ("first machine, RSS", "first machine, PSS", "each further machine, added")
    return [
        Series("e", name, who, "MiB", who == "QEMU microvm", "", [row[index] for row in samples])
        for index, name in enumerate(names)
        for who, samples in results.items()
    ]


def _two(command: list[str]) -> Sequence[float]:
    """A process a machine: the first's memory, and what is a second one's alone."""
    with ExitStack() as stack:
        first = stack.enter_context(_running(command))
        rss, pss, _ = beyond_ram(first)
        second = stack.enter_context(_running(command))
        return rss / MIB, pss / MIB, beyond_ram(second)[2] / MIB


def _in_one(command: list[str]) -> Sequence[float]:
    """A process with many machines: its memory with one, and what each further one adds."""
    with _process(command) as process:
        assert process.stdin is not None and process.stdout is not None
        sizes = []
        for number in range(1 + FURTHER):
            process.stdin.write(b"\n")
            process.stdin.flush()
            if process.stdout.readline() != b"ready\n":
                raise HostError(f"{' '.join(command)} ended early")
            _settle(process, (number + 1) * 4096)
            sizes.append(beyond_ram(process.pid))
    added = (sizes[-1][0] - sizes[0][0]) / FURTHER
    return sizes[0][0] / MIB, sizes[0][1] / MIB, added / MIB


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _running(command: list[str]) -> Iterator[int]:
    """`command` with its guest halted; its process id."""
    with _process(command) as process:
        _settle(process, 1)
        yield process.pid


def _settle(process: subprocess.Popen[bytes], ram: int) -> None:
    """Wait until at least `ram` bytes of guest RAM are in use, and a little."""
    end = time.monotonic() + TIME_LIMIT
    while True:
        if sum(rss for size, rss, _, _ in mappings(process.pid) if size >= RAM) >= ram:
            time.sleep(SETTLE)
            return
        if process.poll() is not None or time.monotonic() > end:
            raise HostError(f"{process.args!r} did not start its guest")
        time.sleep(0.01)


def beyond_ram(pid: int) -> tuple[int, int, int]:
    """Resident, proportional and private bytes of a process without its guests' RAM."""
    rows = [row for row in mappings(pid) if row[0] < RAM]
    return sum(row[1] for row in rows), sum(row[2] for row in rows), sum(row[3] for row in rows)


def mappings(pid: int) -> list[tuple[int, int, int, int]]:
    """(size, Rss, Pss, private) of each mapping, bytes (Documentation/filesystems/proc.rst)."""
    rows = []
    values: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            values[key] = int(rest[:-3]) * 1024
        elif key == "VmFlags":
            private = values["Private_Clean"] + values["Private_Dirty"]
            rows.append((values["Size"], values["Rss"], values["Pss"], private))
    return rows
