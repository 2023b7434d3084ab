"""Writes vmm/sandbox/_filters.py: the usual monitor's seccomp filter (vmm.sandbox.calls) as the BPF
program that it is, so that a start neither loads the names nor compiles them.

Run by the build hook (hatch_build.py) or by hand: `python -m vmm.sandbox.filter_build`.
"""

from __future__ import annotations

import errno
import os

from vmm.sandbox import calls, seccomp
from vmm.sandbox.numbers import NUMBERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.sandbox.seccomp import Calls


def monitor(more: Calls | None = None) -> bytes:
    """A monitor's filter; `more` replaces or adds calls."""
    others = {
        **dict.fromkeys(calls.ENOSYS, seccomp.fails(errno.ENOSYS)),
        **dict.fromkeys(calls.DEADLY, seccomp.KILL),
    }
    allowed = {**calls.MONITOR, **(more or {})}
    return seccomp.compile_filter(allowed, seccomp.fails(errno.EPERM), others)


def brokered() -> bytes:
    """The filter that has a broker asked first; it allows all the rest, which another does not."""
    every: Calls = {name: () for name in NUMBERS if name not in calls.BROKERED}
    return seccomp.compile_filter(
        every, seccomp.ALLOW, dict.fromkeys(calls.BROKERED, seccomp.NOTIFY)
    )


def build(target: str | None = None) -> str:
    """Write the module to `target` (default: beside this file) and return its path."""
    path = target or os.path.join(os.path.dirname(os.path.abspath(__file__)), "_filters.py")
    with open(path, "w", encoding="ascii") as file:
        file.write(f"# auto-generated file\n\nMONITOR = {monitor()!r}\n")
    return path


if __name__ == "__main__":
    build()
