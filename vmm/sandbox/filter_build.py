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
    from collections.abc import Sequence

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


def beside_broker(broker: int, helpers: Sequence[int] = ()) -> Calls:
    """What a monitor may do besides where process `broker` is asked first, and `helpers` are its
    helper programs."""
    return {
        **calls.CONNECT,
        **dict.fromkeys(calls.BROKERED, ()),
        **of_helpers((*helpers, broker)),
        "kill": ((0, "in", (calls.OWN_PID, *helpers)),),
    }


def of_helpers(helpers: Sequence[int]) -> Calls:
    """What a monitor may do with its helper programs."""
    own = ((0, "in", (calls.OWN_PID, *helpers)),)
    return {"kill": own, "pidfd_open": own}


def build(target: str | None = None) -> str:
    """Write the module to `target` (default: beside this file) and return its path."""
    path = target or os.path.join(os.path.dirname(os.path.abspath(__file__)), "_filters.py")
    with open(path, "w", encoding="ascii") as file:
        file.write(f"# auto-generated file\n\nMONITOR = {monitor()!r}\n")
        file.write(f"BROKERED = {brokered()!r}\n")
        file.write(f"BESIDE_BROKER = {monitor(beside_broker(calls.BROKER_PID))!r}\n")
    return path


if __name__ == "__main__":
    build()
