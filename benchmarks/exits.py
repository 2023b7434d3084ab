"""Row c: a PIO or MMIO exit, its device, and back into the guest."""

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
from vmm.devices.device import Device

REPETITIONS = 40
COUNT = 1000
"""Exits a repetition."""


def measure(progress: Progress) -> list[Series]:
    """Each operation at CPL0 and CPL3, through Machine and through C."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="vmm-bench-") as scratch, Native() as native:
        for cpl in (0, 3):
            for operation in guests.OPERATIONS:
                rows += _compare(operation, cpl, scratch, native, progress)
    return rows


def _compare(
    operation: str, cpl: int, scratch: str, native: Native, progress: Progress
) -> list[Series]:
    image = guests.exits_image(operation, COUNT)
    path = os.path.join(scratch, "image")
    Path(path).write_bytes(image)
    contenders: dict[str, Callable[[], Sequence[float]]] = {
        "Machine": lambda: [_through_machine(image, cpl)],
        "C": lambda: [native.ask(f"exits {cpl} {COUNT} {path}") / 1e3],
    }
    title = f"{operation} at CPL{cpl}, round trip"
    results = interleave(contenders, REPETITIONS, progress, f"exits: {title}")
    return [
        Series("c", title, name, "µs", name == "C", "", [sample[0] for sample in samples])
        for name, samples in results.items()
    ]


class Register(Device):
    """One register that holds what was written last."""

    def __init__(self) -> None:
        super().__init__("register")
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


class Mark(Device):
    """Notes when it was written, in nanoseconds."""

    def __init__(self) -> None:
        super().__init__("mark")
        self.times: list[int] = []

    def write(self, offset: int, size: int, value: int) -> None:
        self.times.append(time.perf_counter_ns())


def _through_machine(image: bytes, cpl: int) -> float:
    with Machine(MachineConfig()) as machine:
        mark = Mark()
        machine.platform.pio.add(guests.PORT, 1, Register())
        machine.platform.pio.add(guests.MARK_PORT, 1, mark)
        machine.platform.mmio.add(guests.MMIO, 4096, Register())
        machine.memory.write(0, image)
        guests.set_long_mode(machine.vcpus[0], cpl)
        machine.start()
        ended = machine.wait(60)
        if ended.kind != "exit-port" or len(mark.times) != 2:
            raise HostError(f"the guest did not end as written: {ended.message}")
    return (mark.times[1] - mark.times[0]) / COUNT / 1e3
