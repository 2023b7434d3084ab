"""Threads of machines that serve devices let somebody go first who waits for a machine's vCPUs.

All machines of a process share its processors and CPython's global lock. Guests that keep their
devices busy would make each step of another machine's pause wait for that lock, 5 ms at a time, and
for a processor. So while a pause or a checkpoint waits (`first`), threads that serve devices stop
between two batches (`give_way`), and the lock changes hands after 0.1 ms.
"""

from __future__ import annotations

import sys
import time
from _thread import allocate_lock

SWITCH_INTERVAL = 1e-4
"""Seconds after which the lock changes hands, where several threads want it."""
AT_MOST = 0.2
"""Seconds that the others are held up by a wait, however long it takes."""

wanted = False
"""Somebody waits: whoever serves a device calls `give_way` when he holds no lock."""

_lock = allocate_lock()
_gate = allocate_lock()
"""Held while somebody waits."""
_waiting = 0
_until = 0.0
_interval = 0.0


class _First:
    """A context manager, for any number of threads at a time."""

    def __enter__(self) -> None:
        global wanted, _gate, _waiting, _until, _interval
        with _lock:
            _waiting += 1
            if _waiting == 1:
                _gate = allocate_lock()  # those who had waited at the former one may still have it
                _gate.acquire()
                _until = time.monotonic() + AT_MOST
                _interval = sys.getswitchinterval()
                if _interval > SWITCH_INTERVAL:
                    sys.setswitchinterval(SWITCH_INTERVAL)
                wanted = True

    def __exit__(self, *exc: object) -> None:
        global wanted, _waiting
        with _lock:
            _waiting -= 1
            if not _waiting:
                wanted = False
                _gate.release()
                if _interval > SWITCH_INTERVAL:
                    sys.setswitchinterval(_interval)


first = _First()
"""`with first:` the caller waits for a machine; the others give way for AT_MOST seconds."""


def give_way() -> None:
    """Wait until nobody goes first any more, but not beyond AT_MOST. With no lock held."""
    gate, left = _gate, _until - time.monotonic()
    if left > 0 and gate.acquire(timeout=left):
        gate.release()
