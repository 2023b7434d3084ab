"""`python -m tests.soak`: for half an hour, cycles of machines, and a crowd of them; a verdict.

Part one holds `--machines` machines alive in this process for a fifth of the time, pauses and rolls
them back, and closes them. Part two makes, runs and closes one machine after the other, each in
another way (tests/soak/cycles.py), at least `--cycles` times and until the time is over. Between
two rounds of all kinds no machine is there: open files, threads, children, temporary files and
network interfaces named vmm-something must be as at the begin, and memory must not grow.

With `--linux`, another soak: Linux guests under a load that is verified (tests/soak/linux.py).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.soak import PATHS, figures
from tests.soak.crowd import Crowd
from tests.soak.cycles import Cycle, available
from tests.soak.figures import Figures

CYCLES, MACHINES = 1000, 200
WARM_UP = 2
"""Rounds before the begin that others are compared with: modules are loaded, arenas grown."""
GROWTH = 16 << 10
"""Bytes of resident memory a round may grow by: what the allocators' fragments come to."""
PATIENCE = 20.0
"""Seconds in which what was closed has to be gone: helper programs end by themselves."""
SHOWN = 20.0
"""Seconds between two lines of progress."""


class Soak:
    """A soak of machines without an operating system."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        self.scratch = scratch
        self.temporary = scratch / "tmp"
        self.temporary.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
        self.rng = random.Random(options.seed)
        self.begin = time.monotonic()
        self.end = self.begin + options.minutes * 60
        self.cycles: dict[str, int] = {}
        self.failures: list[str] = []
        self.rounds: list[Figures] = []
        self._shown = 0.0

    def run(self) -> bool:
        """All of it; whether nothing was found."""
        kinds = available()
        for _ in range(WARM_UP):
            self._round(kinds)
        first = self._settled(None)
        self._say(f"begin: {first}")
        self._crowd()
        self._compare(first, f"after {self.options.machines} machines alive")
        while not self.failures and not self._enough():
            self._round(kinds)
            self.rounds.append(self._compare(first, "after a round"))
            self._progress()
        return self._verdict(first)

    def _enough(self) -> bool:
        done = sum(self.cycles.values()) >= self.options.cycles
        return done and time.monotonic() >= self.end

    def _round(self, kinds: list[Cycle]) -> None:
        for cycle in self.rng.sample(kinds, len(kinds)):
            path = Path(tempfile.mkdtemp(prefix="cycle-", dir=self.scratch))
            name = cycle.__name__
            try:
                cycle(path, self.rng)
            except Exception:
                self.failures.append(f"{name} (seed {self.options.seed}): {traceback.format_exc()}")
            finally:
                shutil.rmtree(path, ignore_errors=True)
            self.cycles[name] = self.cycles.get(name, 0) + 1

    def _crowd(self) -> None:
        """Part one."""
        path = Path(tempfile.mkdtemp(prefix="crowd-", dir=self.scratch))
        until = time.monotonic() + self.options.minutes * 60 / 5
        try:
            begin = time.monotonic()
            with Crowd(self.options.machines, path, self.rng) as crowd:
                count = len(crowd.machines)
                up, held = time.monotonic() - begin, self._now()
                self._say(f"{count} machines run after {up:.1f} s: {held}")
                calls: list[float] = []
                grown: list[int] = []
                while True:
                    calls += crowd.poke()
                    crowd.check()
                    grown.append(self._now().rss)
                    if time.monotonic() >= until:
                        break
                    time.sleep(0.2)
                self._say(
                    f"{len(calls)} pauses, resumes, checkpoints and rollbacks among them: median "
                    f"{statistics.median(calls) * 1e3:.1f} ms, most {max(calls) * 1e3:.0f} ms"
                )
                begin = time.monotonic()
            self._say(f"they are closed after {time.monotonic() - begin:.1f} s")
        except Exception:
            self.failures.append(traceback.format_exc())
        finally:
            shutil.rmtree(path, ignore_errors=True)

    # --- figures ----------------------------------------------------------------------------------

    def _now(self) -> Figures:
        return figures.take(self.temporary)

    def _settled(self, wanted: Figures | None) -> Figures:
        """The figures once what was closed is gone."""
        limit = time.monotonic() + (PATIENCE if wanted is not None else 1.0)
        while True:
            gc.collect()
            now = self._now()
            done = wanted is not None and now.flat() == wanted.flat()
            if done or time.monotonic() > limit:
                _trim()
                return self._now()
            time.sleep(0.02)

    def _compare(self, first: Figures, when: str) -> Figures:
        now = self._settled(first)
        if now.flat() != first.flat():
            self.failures.append(
                f"{when}, not as at the begin:\n  {first}\n  {now}\n{figures.what(self.temporary)}"
            )
        return now

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._shown > SHOWN:
            self._shown = now
            total = sum(self.cycles.values())
            self._say(f"{(now - self.begin) / 60:5.1f} min, {total} cycles: {self.rounds[-1]}")

    def _verdict(self, first: Figures) -> bool:
        total = sum(self.cycles.values())
        minutes = (time.monotonic() - self.begin) / 60
        grown = figures.growth([each.rss for each in self.rounds])
        per_thousand = grown / max(total / max(len(self.rounds), 1), 1) * 1000
        if grown > GROWTH and len(self.rounds) >= 20:
            self.failures.append(f"memory grows by {grown / 1024:.0f} KiB a round")
        for failure in self.failures:
            print(failure, flush=True)
        last = self.rounds[-1] if self.rounds else first
        self._say(f"end:   {last}")
        each = ", ".join(f"{name} {count}" for name, count in sorted(self.cycles.items()))
        self._say(f"cycles: {each}")
        self._say(
            f"{'FAILED' if self.failures else 'flat'}: {total} cycles and {self.options.machines} "
            f"machines at once in {minutes:.1f} minutes; memory grows by "
            f"{per_thousand / 1024:+.1f} KiB a thousand cycles; seed {self.options.seed}"
        )
        return not self.failures

    def _say(self, line: str) -> None:
        print(f"soak: {line}", flush=True)


def _trim() -> None:
    """Have the allocator give back what it can, so that what is left is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description="Machines for half an hour.")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--cycles", type=int, help=f"at least (default: {CYCLES})")
    parser.add_argument("--machines", type=int, help=f"alive at once (default: {MACHINES})")
    parser.add_argument("--seed", type=int, default=None, help="of what is left to chance")
    parser.add_argument(
        "--linux", action="store_true", help="Linux guests under a load that is verified, instead"
    )
    parser.add_argument(
        "--spoil", choices=PATHS, metavar="PATH",
        help=f"with --linux: have a wrong byte come by PATH ({', '.join(PATHS)}), which must fail",
    )  # fmt: skip
    options = parser.parse_args(words)
    if options.linux:
        for name in ("cycles", "machines"):
            if getattr(options, name) is not None:
                parser.error(f"--{name}: not with --linux, which has two machines")
    elif options.spoil is not None:
        parser.error(f"--spoil {options.spoil}: only with --linux")
    if not options.minutes >= 0:
        parser.error(f"--minutes {options.minutes:g}: not a length of time")
    options.cycles = CYCLES if options.cycles is None else options.cycles
    options.machines = MACHINES if options.machines is None else options.machines
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 32)
    return options


def main(words: list[str]) -> int:
    """The exit status: 0 where nothing was found."""
    options = _options(words)
    if options.linux:
        from tests.soak import linux

        if (wanted := linux.missing()) is not None:
            print(f"make soak: {wanted}", file=sys.stderr)
            return 2
        return linux.run(options.minutes, options.seed, options.spoil)
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="vmm-soak-") as scratch:
        try:
            return 0 if Soak(options, Path(scratch)).run() else 1
        finally:
            tempfile.tempdir = before[0]
            if before[1] is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
