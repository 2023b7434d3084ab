"""Whether a thread of a machine is late because a function of the program holds it up.

Loaded when a thread has not ended in time. A vCPU's thread that only waits for a processor, on a
host with many busy machines, or a device's thread whose disk is slow, will end soon; a thread in a
bound function or in a listener may never.
"""

from __future__ import annotations

import os
import sys
import threading
import time

SLOW_WITHIN = 10.0
"""Seconds a thread that nothing of the program holds up has besides."""
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


def join(thread: threading.Thread) -> bool:
    """Whether `thread`, which is late, ends after all; not once it is seen in the program."""
    give_up = time.monotonic() + SLOW_WITHIN
    while thread.is_alive() and time.monotonic() < give_up:
        if in_program(thread):
            return False
        thread.join(LOOK)
    return not thread.is_alive()
