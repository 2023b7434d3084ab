"""Row n: how long a machine's pause and checkpoint take beside others in its process.

The guest that is paused spins. Beside it are no others; six that spin too, which is what any six
busy guests cost on the host's processors; and six that flood their devices with requests.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks import floods
from benchmarks.series import Progress, Series, interleave
from vmm import HostError, Machine

ROUNDS = 5
CALLS = 20
"""Pauses and checkpoints of a round; each is a sample."""
SETTLE, BETWEEN = 0.3, 0.01
"""Seconds from the start of the machines to the first call, and between calls."""
SPINS = "spins"
ALIKE = ("uart", "notifies", "hvc", "net", "disk", "vsock")
"""One of each device, with short requests."""
WORST = ("registers", "long output", "hvc", "net", "large reads", "vsock")
"""Those that take the most of the monitor."""
BESIDE: dict[str, Sequence[str]] = {
    "none": (),
    "six that spin": (SPINS,) * 6,
    "six that flood": ALIKE,
    "six that flood, the worst": WORST,
}


def measure(progress: Progress) -> list[Series]:
    """Both calls, beside each company."""
    contenders: dict[str, Callable[[], Sequence[float]]] = {
        name: lambda names=names: _round(names)  # type: ignore[misc]
        for name, names in BESIDE.items()
    }
    results = interleave(contenders, ROUNDS, progress, "neighbours", warm_up=0)
    rows = []
    for place, call in enumerate(("pause", "checkpoint")):
        for name, rounds in results.items():
            row = Series("n", f"{call} of a guest that spins, beside", name, "ms")
            row.reference = name == "six that spin"
            row.samples = [
                value for values in rounds for value in values[place * CALLS : (place + 1) * CALLS]
            ]
            rows.append(row)
    return rows


def _round(names: Sequence[str]) -> list[float]:
    """Milliseconds of each of CALLS pauses, then of each of CALLS checkpoints."""
    with (
        tempfile.TemporaryDirectory(prefix="vmm-bench-") as scratch,
        contextlib.ExitStack() as all_,
    ):
        others = [all_.enter_context(_neighbour(name, scratch)) for name in names]
        machine = all_.enter_context(_neighbour(SPINS, scratch))
        for each in (*others, machine):
            each.start()
        time.sleep(SETTLE)
        pauses = [_timed(machine.pause, machine.resume) for _ in range(CALLS)]
        checkpoints = [_timed(machine.checkpoint, lambda: None) for _ in range(CALLS)]
        for each in others:
            if each.exit is not None or "reset" in str(each.event_log):
                raise HostError(f"a neighbour does not flood any more: {each!r}")
    return pauses + checkpoints


def _neighbour(name: str, scratch: str) -> Machine:
    directory = tempfile.mkdtemp(dir=scratch)
    if name == SPINS:
        return floods.idle(floods.SPIN, directory)
    return floods.machine(name, directory)


def _timed(call: Callable[[], object], after: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    after()
    time.sleep(BETWEEN)
    return taken * 1e3
