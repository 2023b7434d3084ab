"""Whether a thread of a machine is late because a function of the program holds it up.

Loaded when a thread has not ended in time. A vCPU's thread that only waits for a processor, on a
host with many busy machines, will end soon; a thread in a bound function or in a listener may
never, nor may one whose disk does not answer.
"""

from __future__ import annotations

import os
import sys
import threading
import time

SLOW_WITHIN = 10.0
"""Seconds a thread that nothing holds up has besides."""
DISK_WITHIN = 0.3
"""Seconds a thread has for a disk that does not answer."""
LOOK = 0.05
"""Seconds between looks."""
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARY = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_CALLERS = (
    os.path.join(_OURS, "machine", "binding.py"),
    os.path.join(_OURS, "machine", "event_hub.py"),
)
"""Modules that call functions of the program, which may be the standard library's (`queue.get`)."""

_PEERS = os.path.join(_OURS, "virtio", "vhost_user.py")
"""The module in which a vCPU's thread may wait for another program."""
_CONSOLES = os.path.join(_OURS, "console", "backends.py")
"""The module in which it may wait for who reads the console."""


def in_program(thread: threading.Thread) -> bool:
    """Whether `thread` is in a function that is not this package's."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        name = frame.f_code.co_filename
        foreign = not name.startswith((_OURS, _LIBRARY, "<")) or "site-packages" in name
        if name in _CALLERS or (foreign and not name.startswith(_OURS)):
            return True
        frame = frame.f_back
    return False


def by_a_disk(thread: threading.Thread) -> bool:
    """Whether `thread` is in the kernel in a wait that no signal ends, as for a disk (state D of
    proc_pid_stat(5))."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] == b"D"
    except OSError:  # it has ended, or may not be looked at
        return False


def by_a_peer(ident: int | None) -> bool:
    """Whether the thread `ident` waits for a program that serves a device (vhost-user)."""
    return _is_in(ident, _PEERS)


def by_a_reader(ident: int | None) -> bool:
    """Whether the thread `ident` waits for somebody to read the console."""
    return _is_in(ident, _CONSOLES)


def _is_in(ident: int | None, module: str) -> bool:
    frame = sys._current_frames().get(ident or 0)
    while frame is not None:
        if frame.f_code.co_filename == module:
            return True
        frame = frame.f_back
    return False


_gave_up = float("-inf")
"""When a thread was last found to wait for a disk for too long (time.monotonic)."""


def join(thread: threading.Thread) -> bool:
    """Whether `thread`, which is late, ends after all; not once it is seen in the program, nor when
    it waits for a disk too long, be it right after another that did."""
    global _gave_up
    now = waits_since = time.monotonic()
    give_up = now + SLOW_WITHIN
    while thread.is_alive() and now < give_up:
        if in_program(thread):
            return False
        if not by_a_disk(thread):
            waits_since = now
        elif now - min(waits_since, _gave_up + DISK_WITHIN) > DISK_WITHIN:
            _gave_up = now
            return False
        thread.join(LOOK)
        now = time.monotonic()
    return not thread.is_alive()
