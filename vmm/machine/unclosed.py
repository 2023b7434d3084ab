"""Machines that a program has forgotten to close: they are told of (ResourceWarning) and closed.

A machine that runs is referred to by its threads, so it is known to be forgotten when the process
ends; one that never ran, or has stopped, when nothing refers to it any more.
"""

from __future__ import annotations

import atexit
from _weakrefset import WeakSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.machine.machine import Machine

_open: WeakSet[Machine] = WeakSet()
_registered = False


def watch(machine: Machine) -> None:
    """`machine` is to be closed; at the process's end it is, with a warning."""
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_at_exit)
    _open.add(machine)


def forgotten(machine: Machine) -> None:
    """Nothing refers to `machine`, which is not closed: warn, and have it closed.

    In a thread of its own: the garbage collector may have interrupted whoever holds a lock that is
    needed for that.
    """
    import threading

    _warn(machine)
    threading.Thread(target=machine.close, name="vmm-close", daemon=True).start()


def _at_exit() -> None:
    import sys

    for machine in list(_open):
        if machine.state == "closed":
            continue
        _warn(machine)
        try:
            machine.close()
        except Exception as err:
            sys.excepthook(type(err), err, err.__traceback__)


def _warn(machine: Machine) -> None:
    import warnings

    warnings.warn(f"unclosed {machine!r}", ResourceWarning, stacklevel=3)
