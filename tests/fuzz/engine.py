"""Runs a target on inputs: those that are kept, then ones made from a seed, the same each time.

    python -m tests.fuzz.engine TARGET[,TARGET ...] --seed 1 --runs 1000 --seconds 10 [FILE ...]

With FILEs it runs those alone. Several targets have so many runs each, one after the other. A
finding ends the process with status 1 after a traceback; the input is written to the file that
FUZZ_FINDING names.
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import targets
from tests.fuzz.source import NUMBERS
from tests.fuzz.target import ENDLESS, GROWTH_MAX, Target

CORPUS = Path(__file__).parent / "corpus"
INPUT_MAX = 4096
"""Bytes of an input that is made here."""


class EndlessError(BaseException):
    """An input took longer than ENDLESS. No Exception: no parser may pass over it."""


def confine() -> None:
    """Have time run out for an input that is a finding."""

    def endless(number: int, frame: object) -> None:
        raise EndlessError(f"an input took longer than {ENDLESS:g} s")

    signal.signal(signal.SIGALRM, endless)


def kept(target: Target) -> list[bytes]:
    """The target's seeds and the inputs of the repository's corpus."""
    directory = CORPUS / target.name
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    return [*target.seeds(), *(file.read_bytes() for file in files)]


class Generator:
    """Makes inputs out of `corpus` by chance."""

    def __init__(self, corpus: list[bytes], seed: int) -> None:
        self._corpus = corpus or [b""]
        self._chance = random.Random(seed)

    def make(self) -> bytes:
        """The next input."""
        chance = self._chance
        if chance.random() < 0.1:
            return chance.randbytes(chance.choice((1, 8, 40, 200, 1000)))
        data = bytearray(chance.choice(self._corpus))
        for _ in range(chance.choice((1, 1, 1, 2, 3, 5, 9))):
            self._change(data)
        return bytes(data[:INPUT_MAX])

    def _change(self, data: bytearray) -> None:
        chance = self._chance
        at = chance.randrange(len(data) + 1)
        what = chance.randrange(8)
        if what == 0 or not data:
            data[at:at] = chance.randbytes(chance.choice((1, 1, 2, 4, 16)))
        elif what == 1:
            del data[at : at + chance.choice((1, 1, 2, 4, 16, 256))]
        elif what == 2:
            data[min(at, len(data) - 1)] = chance.getrandbits(8)
        elif what == 3:
            data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif what == 4:  # a number that code goes wrong at, in either byte order
            size = chance.choice((1, 2, 4, 8))
            number = chance.choice(NUMBERS) & (1 << 8 * size) - 1
            data[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))
        elif what == 5:
            other = chance.choice(self._corpus)
            begin = chance.randrange(len(other) + 1)
            data[at:] = other[begin:]
        elif what == 6:
            end = at + chance.choice((1, 4, 16, 64))
            data[at:at] = data[at:end] * chance.choice((1, 1, 2, 40))
        else:
            del data[at:]


def check(run: Callable[[bytes], None], data: bytes) -> None:
    """Run one input, which has its time. Raises whatever is a finding."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    signal.setitimer(signal.ITIMER_REAL, ENDLESS)
    try:
        run(data)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    if grown > GROWTH_MAX:
        raise MemoryError(f"an input took {grown >> 20} MiB")


def search(target: Target, *, seed: int, runs: int, seconds: float) -> int:
    """Run what is kept, then what is made; how many inputs. Raises what is a finding."""
    run = target.start()
    corpus = kept(target)
    for data in corpus:
        _checked(run, data)
    generator = Generator(corpus, seed)
    end = time.monotonic() + seconds
    for number in range(runs):
        if time.monotonic() > end:
            return len(corpus) + number
        _checked(run, generator.make())
    return len(corpus) + runs


def _checked(run: Callable[[bytes], None], data: bytes) -> None:
    try:
        check(run, data)
    except BaseException:
        keep = os.environ.get("FUZZ_FINDING")
        if keep:
            Path(keep).write_bytes(data)
        raise


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("tests.fuzz.engine")
    parser.add_argument(
        "targets", type=lambda text: [targets.find(name) for name in text.split(",")]
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1 << 40)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("files", nargs="*", type=Path)
    given = parser.parse_args(arguments)
    confine()
    for target in given.targets:
        try:
            if given.files:
                run = target.start()
                for file in given.files:
                    _checked(run, file.read_bytes())
                continue
            done = search(target, seed=given.seed, runs=given.runs, seconds=given.seconds)
        except BaseException as err:
            print(f"FINDING {target.name}: {type(err).__name__}: {err}", file=sys.stderr)
            traceback.print_exc()
            return 1
        print(f"{target.name}: {done} inputs", flush=True)
    return 0


if __name__ == "__main__":
    sys.stdout.flush()
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()  # directories of inputs
    os._exit(status)  # threads of a device under test need not end
