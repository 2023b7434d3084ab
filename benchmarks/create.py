"""Row b: a machine created, run to its first exit and closed, in a process that is warm."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import guests
from benchmarks.native import Native
from benchmarks.series import Progress, Series, interleave
from vmm import HostError, Machine, MachineConfig
from vmm.boot import registers
from vmm.boot.state import BootState
from vmm.layout import BOOT_STACK, MIB

REPETITIONS = 60


def measure(progress: Progress) -> list[Series]:
    """Machine with and without a kernel file, and the same ioctls from C.

    An i8254 is what most monitors create; Machine leaves it until a guest touches it.
    """
    with tempfile.TemporaryDirectory(prefix="vmm-bench-") as scratch, Native() as native:
        kernel = os.path.join(scratch, "exit.elf")
        Path(kernel).write_bytes(guests.pvh_elf(guests.EXIT_0))
        contenders: dict[str, Callable[[], Sequence[float]]] = {
            "Machine, code put in by hand": lambda: [_timed(_bare)],
            "Machine, ELF kernel and ACPI tables": lambda: [_timed(lambda: _kernel(kernel))],
            "the same ioctls in C": lambda: [native.ask("create 0") / 1e6],
            "in C, with an i8254 in KVM": lambda: [native.ask("create 1") / 1e6],
        }
        results = interleave(contenders, REPETITIONS, progress, "create", warm_up=3)
    return [
        Series(
            "b",
            "Machine created, run, closed",
            name,
            "ms",
            reference=name == "the same ioctls in C",
            samples=[sample[0] for sample in samples],
        )
        for name, samples in results.items()
    ]


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _bare() -> None:
    with Machine(MachineConfig()) as machine:
        machine.memory.write(MIB, guests.EXIT_0)
        registers.set_up(machine.vcpus[0], BootState("pvh32", MIB, rsp=BOOT_STACK))
        _to_exit(machine)


def _kernel(path: str) -> None:
    with Machine(MachineConfig(path)) as machine:
        _to_exit(machine)


def _to_exit(machine: Machine) -> None:
    machine.start()
    ended = machine.wait(10)
    if ended.kind != "exit-port" or ended.status:
        raise HostError(f"the guest did not reach its exit port: {ended.message}")
