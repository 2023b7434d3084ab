"""`vmm run` with a clock at each step: `python -m benchmarks.boot_phases STARTED run KERNEL ...`.

STARTED is time.monotonic() before this process was made. Writes phases.json: seconds by step.
"""

from __future__ import annotations

import time

PYTHON_UP = time.monotonic()

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from importlib import import_module  # noqa: E402
from typing import Any  # noqa: E402

MODULES = (
    *("cli.run", "cli.supervise", "machine.platform", "boot.loader", "boot.registers"),
    *("tables.acpi", "cpu", "console.input"),
)
"""What `vmm run` comes to import, bit by bit."""

BEGAN = time.monotonic()

for module in MODULES:
    import_module(f"vmm.{module}")

from vmm import cli  # noqa: E402
from vmm.machine.machine import Machine  # noqa: E402
from vmm.machine.platform import Platform  # noqa: E402

IMPORTED = time.monotonic()

MARK = b"bench: init runs"


class Clock:
    """When each step was first passed."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._output = b""

    def before(self, owner: type, method: str, step: str) -> None:
        """`step` is when `method` is first entered."""
        self._wrap(owner, method, lambda: self._pass(step), lambda: None)

    def around(self, owner: type, method: str, start: str, end: str) -> None:
        """`start` and `end` are when `method` is first entered and left."""
        self._wrap(owner, method, lambda: self._pass(start), lambda: self._pass(end))

    def hear(self, data: bytes) -> None:
        """Console output: its first byte, and init's line."""
        self._pass("first output")
        if "init" not in self.times:
            self._output = self._output[-len(MARK) :] + data
            if MARK in self._output:
                self._pass("init")

    def _pass(self, step: str) -> None:
        self.times.setdefault(step, time.monotonic())

    def _wrap(
        self, owner: type, method: str, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before()
            try:
                return function(*args, **kwargs)
            finally:
                after()

        setattr(owner, method, timed)


def main(started: float, arguments: list[str]) -> int:
    """Run the command, write the steps."""
    clock = Clock()
    clock.around(Machine, "__init__", "build", "built")
    clock.around(Platform, "load_kernel", "load", "loaded")
    clock.before(Machine, "start", "start")
    clock.before(Machine, "end", "end")
    sink = Platform._sink

    def heard(platform: Platform, data: bytes) -> None:
        clock.hear(data)
        sink(platform, data)

    Platform._sink = heard  # type: ignore[assignment, method-assign]
    ready = time.monotonic()
    status = cli.main(arguments)
    at = clock.times
    phases = {
        "Python starts": PYTHON_UP - started,
        "vmm's modules": IMPORTED - BEGAN,
        "kernel and initrd loaded": at["loaded"] - at["load"],
        "VM and vCPU created": at["built"] - at["build"] - (at["loaded"] - at["load"]),
        "options, console, threads": at["build"] - ready + at["start"] - at["built"],
        "guest to its first output": at["first output"] - at["start"],
        "guest to init": at["init"] - at["first output"],
        "guest to power-off": at["end"] - at["init"],
        "machine closed": time.monotonic() - at["end"],
        "this instrument": BEGAN - PYTHON_UP + ready - IMPORTED,
    }
    with open("phases.json", "w") as file:
        json.dump(phases, file)
    return status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
