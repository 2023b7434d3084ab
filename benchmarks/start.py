"""Row a: from process start over the guest's first instruction to the process's end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import guests, native
from benchmarks.series import Progress, Series, interleave
from vmm.errors import HostError

REPETITIONS = 40
TIME_LIMIT = 60.0
QEMU = [
    *("qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-nodefaults", "-nographic"),
    *("-cpu", "host,-arch-capabilities", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    "-kernel",
]
QEMU_STATUS = 1
"""isa-debug-exit ends QEMU with 2 * value + 1."""


def measure(progress: Progress) -> list[Series]:
    """Wall time and peak memory of `vmm run`, QEMU, and what lies under both."""
    with tempfile.TemporaryDirectory(prefix="vmm-bench-") as scratch:
        kernel = os.path.join(scratch, "exit.elf")
        Path(kernel).write_bytes(guests.pvh_elf(guests.EXIT_0))
        python = sys.executable
        command = os.path.join(os.path.dirname(python), "vmm")
        contenders = {
            "vmm run": spawn([command, "run", kernel]),
            "python -m vmm run": spawn([python, "-m", "vmm", "run", kernel]),
            "QEMU microvm": spawn([*QEMU, kernel], QEMU_STATUS),
            "floor: python -c pass": spawn([python, "-c", "pass"]),
            "floor: the ioctls in C": spawn([native.program(), "once"]),
        }
        results = interleave(contenders, REPETITIONS, progress, "start")
    rows = []
    for index, (comparison, unit) in enumerate((("wall time", "ms"), ("peak memory", "MiB"))):
        for name, samples in results.items():
            series = Series("a", f"start to exit, {comparison}", name, unit)
            series.reference = name == "QEMU microvm"
            series.samples = [sample[index] for sample in samples]
            rows.append(series)
    return rows


def spawn(command: list[str], expected: int = 0) -> Callable[[], Sequence[float]]:
    """A contender: run `command` to its end; milliseconds, and MiB of its peak resident set."""

    def run() -> Sequence[float]:
        try:
            done = subprocess.run(
                [native.program(), "spawn", *command],
                capture_output=True,
                text=True,
                check=False,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise HostError(f"{' '.join(command)} did not end within {TIME_LIMIT:g} s") from None
        taken, peak, status = (int(word) for word in done.stdout.split() or (0, 0, -1))
        if status != expected:
            raise HostError(f"{' '.join(command)} ended with {status}: {done.stderr.strip()}")
        return taken / 1e6, peak / 1024

    return run
