"""A process that starts one more idle machine for each line it reads: row e's other half."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from vmm import Machine, MachineConfig


def main(kernel: str) -> None:
    """Keep every machine running until standard input ends."""
    with ExitStack() as stack:
        while sys.stdin.readline():
            machine = stack.enter_context(Machine(MachineConfig(kernel)))
            machine.start()
            print("ready", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
