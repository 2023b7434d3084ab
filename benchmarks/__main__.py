"""`python -m benchmarks [ROW ...]`: measure, print one table, keep the samples as JSON.

Rows, by letter or name: a start, b create, c exits, d boot, e memory, f blk, g net,
i idle, n neighbours, s snapshots, u unpack. Without one: all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks import output
from benchmarks.series import Series
from vmm.errors import UsageError, VmmError

ROWS = {
    "a": "start",
    "b": "create",
    "c": "exits",
    "d": "boot",
    "e": "memory",
    "f": "blk",
    "g": "net",
    "i": "idle",
    "n": "neighbours",
    "s": "snapshots",
    "u": "unpack",
}


def main(arguments: Sequence[str]) -> int:
    """Measure the rows named; the exit status."""
    try:
        chosen = [_row(argument) for argument in arguments] or list(ROWS)
        facts = output.host_facts()
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        rows: list[Series] = []
        for letter in chosen:
            module = import_module(f"benchmarks.{ROWS[letter]}")
            measured: list[Series] = module.measure(output.show_progress)
            output.show_progress("")
            print(f"\n{output.table(measured)}", flush=True)
            rows += measured
        print(f"\nevery sample: {output.save(facts, rows)}")
    except VmmError as error:
        output.show_progress("")
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        output.show_progress("")
        return 130
    return 0


def _row(name: str) -> str:
    for letter, row in ROWS.items():
        if name.strip("()") in (letter, row):
            return letter
    raise UsageError(
        f"no row {name!r}; there are {', '.join(f'{k} ({v})' for k, v in ROWS.items())}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
