"""Row s: restoring a snapshot, copies of a machine, going back to a point, what a copy costs."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import guests
from benchmarks.native import Native, clones_program
from benchmarks.series import Progress, Series, interleave
from vmm import HostError, Machine, MachineConfig
from vmm.layout import GIB, MIB, PAGE_SIZE
from vmm.machine.copies import Copies

SIZES = {"128 MiB": 128 * MIB, "1 GiB": GIB, "4 GiB": 4 * GIB}
MEMORY = 128 * MIB
COPIES = 100
PAGES = 1000
STRIDE = (MEMORY - 4 * MIB) // PAGES & -PAGE_SIZE
ROLLBACKS = 20
"""In a sample, which is their median."""
HELD = 50
REPETITIONS = 20


def measure(progress: Progress) -> list[Series]:
    """All of them, each beside C."""
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None  # files are in memory, as in rows b, c
    with tempfile.TemporaryDirectory(prefix="vmm-bench-", dir=shm) as scratch:
        rows = []
        for part in (_restore, _copies, _busy_copies, _rollback, _memory, _rate):
            rows += part(scratch, progress)
        return rows


def _image(scratch: str, pages: int, memory: int = MEMORY) -> str:
    """A file of `memory` bytes with a guest that writes to that many pages, then ends."""
    path = os.path.join(scratch, f"image-{pages}-{memory}")
    Path(path).write_bytes(guests.dirty_image(pages, STRIDE))
    os.truncate(path, memory)
    return path


@contextmanager
def _machine(pages: int, memory: int = MEMORY) -> Iterator[Machine]:
    """One with that guest, which has not run."""
    with Machine(MachineConfig(memory=memory)) as machine:
        machine.memory.write(0, guests.dirty_image(pages, STRIDE))
        guests.set_long_mode(machine.vcpus[0], 3)
        yield machine


def _to_exit(machine: Machine) -> None:
    ended = machine.wait(30)
    if ended.kind != "exit-port" or ended.status:
        raise HostError(f"the guest did not reach its exit port: {ended.message}")


def _series(
    comparison: str, unit: str, reference: str, results: dict[str, list[Sequence[float]]]
) -> list[Series]:
    return [
        Series(
            "s",
            comparison,
            name,
            unit,
            name == reference,
            samples=[sample[0] for sample in samples],
        )
        for name, samples in results.items()
    ]


def _restore(scratch: str, progress: Progress) -> list[Series]:
    rows = []
    with Native(clones_program()) as native:
        for name, memory in SIZES.items():
            rows += _restore_of(scratch, native, name, memory, progress)
    return rows


def _restore_of(
    scratch: str, native: Native, name: str, memory: int, progress: Progress
) -> list[Series]:
    image, path = _image(scratch, 1, memory), os.path.join(scratch, f"snapshot-{memory}")
    reference = "a private mapping and the same state in C"
    with _machine(1, memory) as machine:
        machine.snapshot(path)

    def to_first_exit(make: Callable[[], Machine]) -> Sequence[float]:
        begin = time.perf_counter()
        machine = make()
        try:
            machine.start()
            _to_exit(machine)
            return [(time.perf_counter() - begin) * 1e3]
        finally:
            machine.close()

    def fresh() -> Machine:
        machine = Machine(MachineConfig(memory=memory))
        machine.memory.write(0, guests.dirty_image(1, STRIDE))
        guests.set_long_mode(machine.vcpus[0], 3)
        return machine

    contenders = {
        "Machine.restore": lambda: to_first_exit(lambda: Machine.restore(path)),
        "Machine, fresh memory": lambda: to_first_exit(fresh),
        reference: lambda: [native.ask(f"restore 0 {image} {memory}") / 1e6],
        "fresh memory in C": lambda: [native.ask(f"create 0 {memory}") / 1e6],
    }
    results = interleave(contenders, REPETITIONS, progress, f"restore {name}", warm_up=3)
    return _series(f"{name} restored, to its first exit", "ms", reference, results)


def _copies(scratch: str, progress: Progress) -> list[Series]:
    image, reference = _image(scratch, 1), "the same ioctls and mappings in C"
    with _machine(1) as machine, Native(clones_program()) as native:

        def ours() -> Sequence[float]:
            begin = time.perf_counter()
            copies = machine.clone(COPIES)
            try:
                for copy in copies:
                    copy.start()
                for copy in copies:
                    _to_exit(copy)
                return [(time.perf_counter() - begin) * 1e3]
            finally:
                for copy in copies:
                    copy.close()

        def theirs() -> Sequence[float]:
            return [native.ask(f"clones {COPIES} {image} {MEMORY}") / 1e6]

        contenders = {f"Machine.clone({COPIES})": ours, reference: theirs}
        results = interleave(contenders, REPETITIONS, progress, "copies")
    return _series(f"{COPIES} copies made, each run to its first exit", "ms", reference, results)


def _busy_copies(scratch: str, progress: Progress) -> list[Series]:
    """Copies of a machine whose guest counts in memory without a pause, until each has counted."""
    path, reference = Path(scratch, "busy"), "the same in C, of a machine that does not run"
    path.write_bytes(guests.busy_image())
    os.truncate(path, MEMORY)
    with Machine(MachineConfig(memory=MEMORY)) as busy, Native(clones_program()) as native:
        busy.memory.write(0, guests.busy_image())
        guests.set_long_mode(busy.vcpus[0], 3)
        busy.start()

        def counted(copies: Copies, first: list[int]) -> None:
            waiting = list(zip(copies, first, strict=True))
            while waiting:
                time.sleep(0.001)
                waiting = [
                    (copy, at) for copy, at in waiting if copy.memory.read_u64(2 * MIB) == at
                ]

        def made(closing: bool) -> Sequence[float]:
            begin = time.perf_counter()
            copies = busy.clone(COPIES)
            taken = time.perf_counter() - begin
            try:
                counted(copies, [copy.memory.read_u64(2 * MIB) for copy in copies])
                ran = time.perf_counter() - begin
            finally:
                begin = time.perf_counter()
                copies.close()
            return [(time.perf_counter() - begin if closing else ran) * 1e3, taken * 1e3]

        contenders = {
            f"Machine.clone({COPIES})": lambda: made(closing=False),
            "their close": lambda: made(closing=True),
            reference: lambda: [native.ask(f"busy {COPIES} {path} {MEMORY}") / 1e6],
        }
        results = interleave(contenders, 5, progress, "busy copies")
    results[f"Machine.clone({COPIES}), the call alone"] = [
        [sample[1]] for sample in results[f"Machine.clone({COPIES})"]
    ]
    return _series(
        f"{COPIES} copies of a running, busy machine, until each has counted",
        "ms",
        reference,
        results,
    )


def _rollback(scratch: str, progress: Progress) -> list[Series]:
    image, reference = _image(scratch, PAGES), "PAGEMAP_SCAN, memcpy and the same ioctls in C"
    with _machine(PAGES) as ended, _machine(PAGES) as paused, Native(clones_program()) as native:
        for machine in (ended, paused):
            machine.checkpoint()
            machine.start()
            _to_exit(machine)
        paused.rollback()

        def guests_pages() -> Sequence[float]:
            samples = []
            for _ in range(ROLLBACKS):
                begin = time.perf_counter()
                ended.rollback()
                samples.append((time.perf_counter() - begin) * 1e3)
                ended.resume()
                _to_exit(ended)
            return [statistics.median(samples)]

        def programs_pages() -> Sequence[float]:
            samples, data = [], paused.memory.regions[0].data
            for _ in range(ROLLBACKS):
                for number in range(PAGES):
                    data[2 * MIB + number * STRIDE] = 1
                begin = time.perf_counter()
                paused.rollback()
                samples.append((time.perf_counter() - begin) * 1e3)
            return [statistics.median(samples)]

        def theirs() -> Sequence[float]:
            return [native.ask(f"rollback {ROLLBACKS} {image} {MEMORY}") / 1e6]

        contenders = {
            "Machine.rollback, paused": programs_pages,
            "Machine.rollback, its guest has ended (new threads)": guests_pages,
            reference: theirs,
        }
        results = interleave(contenders, REPETITIONS, progress, "rollback")
    return _series(f"{PAGES} pages of {MEMORY // MIB} MiB put back", "ms", reference, results)


def _memory(scratch: str, progress: Progress) -> list[Series]:
    image, reference = _image(scratch, 1), "in C"
    with _machine(1) as machine, Native(clones_program()) as native:
        for warm in machine.clone(2):
            warm.start()
            _to_exit(warm)
            warm.close()

        def ours() -> Sequence[float]:
            before = private_kib("self")
            copies = machine.clone(HELD)
            try:
                for copy in copies:
                    copy.start()
                for copy in copies:
                    _to_exit(copy)
                return [(private_kib("self") - before) / HELD / 1024]
            finally:
                for copy in copies:
                    copy.close()

        def theirs() -> Sequence[float]:
            native.ask(f"clones 1 {image} {MEMORY}")
            before = private_kib(str(native.pid))
            native.ask(f"hold {HELD} {image} {MEMORY}")
            return [(private_kib(str(native.pid)) - before) / HELD / 1024]

        contenders = {"a further copy (of its guest's pages: 1)": ours, reference: theirs}
        results = interleave(contenders, 5, progress, "memory of a copy")
    return _series(
        "memory of each further copy, private, page tables too", "MiB", reference, results
    )


def private_kib(pid: str) -> int:
    """A process's private memory, and its page tables."""
    total = 0
    for name, keys in (("smaps_rollup", ("Private_",)), ("status", ("VmPTE:",))):
        for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
            if line.startswith(keys):
                total += int(line.split()[1])
    return total


def _rate(scratch: str, progress: Progress) -> list[Series]:
    image, reference = _image(scratch, 1), "C, fresh memory"
    with _machine(1) as original, Native(clones_program()) as native:

        def timed(run: Callable[[], None]) -> Sequence[float]:
            begin = time.perf_counter()
            run()
            return [1 / (time.perf_counter() - begin)]

        def fresh() -> None:
            with _machine(1) as machine:
                machine.start()
                _to_exit(machine)

        def copy() -> None:
            [machine] = original.clone()
            with machine:
                machine.start()
                _to_exit(machine)

        def many() -> Sequence[float]:
            begin = time.perf_counter()
            copies = original.clone(HELD)
            for machine in copies:
                machine.start()
            for machine in copies:
                _to_exit(machine)
                machine.close()
            return [HELD / (time.perf_counter() - begin)]

        contenders: dict[str, Callable[[], Sequence[float]]] = {
            "Machine": lambda: timed(fresh),
            "Machine.clone()": lambda: timed(copy),
            f"Machine.clone({HELD})": many,
            reference: lambda: [1e9 / native.ask(f"create 1 {MEMORY}")],
            "C, a private mapping and its state": lambda: [
                1e9 / native.ask(f"restore 1 {image} {MEMORY}")
            ],
        }
        results = interleave(contenders, REPETITIONS, progress, "rate", warm_up=3)
    return _series(
        "machines made, run to their first exit and closed (more is better)",
        "a second",
        reference,
        results,
    )
