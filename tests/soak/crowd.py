"""Many machines alive in one process, of every kind, paused, checkpointed and watched."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

from benchmarks import floods
from tests.soak.cycles import everything
from tests.support import tiny
from vmm import Machine, MachineConfig

FLOODING = 6
IDLE = b"\xfb" + tiny.HALT
"""sti, hlt: with interrupts off it would have halted for ever, and be ended."""
MEMORY = 16 << 20


class Crowd:
    """`count` machines that run: a few flood their devices, a tenth has all devices, a tenth spins
    or counts, the rest halt. A context manager."""

    def __init__(self, count: int, path: Path, rng: random.Random) -> None:
        self._count, self._path, self._rng = count, path, rng
        self._stack = contextlib.ExitStack()
        self.machines: list[Machine] = []

    def __enter__(self) -> Crowd:
        halts = tiny.kernel(self._path, tiny.prints(b"up\n") + IDLE)
        counts = tiny.kernel(self._path, tiny.COUNTING)
        try:
            for number in range(self._count):
                place = self._path / f"machine-{number}"
                place.mkdir()
                if number < min(FLOODING, self._count // 10):
                    machine = floods.machine(floods.NAMES[number], str(place))
                elif number % 10 == 1:
                    options: dict[str, object] = {**everything(place), "nets": ["lan=crowd"]}
                    machine = Machine(MachineConfig(halts, memory=MEMORY, **options))  # type: ignore[arg-type]
                else:
                    kernel = counts if number % 40 == 2 else halts
                    machine = Machine(MachineConfig(kernel, memory=MEMORY, rng=True))
                self.machines.append(self._stack.enter_context(machine))
                machine.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def poke(self) -> list[float]:
        """Pause, checkpoint or roll back some of them; seconds of each call."""
        taken = []
        for machine in self._rng.sample(self.machines, min(10, len(self.machines))):
            for call in (machine.pause, machine.resume, machine.checkpoint, machine.rollback):
                if call in (machine.checkpoint, machine.rollback) and self._disk_stays(machine):
                    continue
                if machine.exit is not None:
                    raise AssertionError(f"it has ended: {machine!r}")
                begin = time.monotonic()
                call()
                taken.append(time.monotonic() - begin)
        return taken

    @staticmethod
    def _disk_stays(machine: Machine) -> bool:
        """A disk without an overlay cannot go back."""
        return any(not drive.snapshot and not drive.readonly for drive in machine.config.drives)

    def check(self) -> None:
        """Every one of them is alive."""
        for machine in self.machines:
            if machine.state != "running" or machine.exit is not None:
                raise AssertionError(f"it does not run any more: {machine!r}")
