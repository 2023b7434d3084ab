"""Leases on the files that a restored machine's memory is mapped from.

A private mapping of a file ends the process with SIGBUS where somebody cuts the file short (pages
that the guest has written to are gone too), and shows what somebody writes into the file in pages
that the guest has not written to. A read lease (fcntl(2), F_SETLEASE) has the kernel hold up who
opens the file for writing or truncates it, until the lease is given back, for
/proc/sys/fs/lease-break-time seconds (45) at most. Meanwhile the machine is parked for as long as
it takes to copy its memory, which needs the file no longer.

Only a file's owner (or CAP_LEASE) gets a lease, on a local file system, while nobody has the file
open for writing. Without one the file has to be left alone.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal imports enum, and is in every restore
import fcntl
import os
import struct
from _thread import allocate_lock, get_native_id, start_new_thread
from _weakrefset import WeakSet
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vmm.memory import GuestMemory

F_SETOWN_EX = 15
OWNER_EX = struct.Struct("ii")
"""struct f_owner_ex: type (0, F_OWNER_TID), thread id."""
BROKEN = _signal.SIGURG
"""Tells the watcher of a lease that is to be given back: a signal that is ignored where nobody
waits for it, as in a process whose watcher has gone."""


class _Lease:
    """One file's lease, and the memories that are mapped from the file."""

    __slots__ = ("fd", "memories")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.memories: WeakSet[GuestMemory] = WeakSet()


_leases: dict[tuple[int, int], _Lease] = {}
"""By device and inode."""
_lock = allocate_lock()
_watcher = 0
"""The watcher's thread id; 0: there is none."""
_ident = 0
"""The same thread, as Python knows it."""
_asked: list[Callable[[], object]] = []
"""What the watcher is to call."""


def hold(memory: GuestMemory, fds: Iterable[int]) -> None:
    """Take leases on the files `fds`, open for reading only, that `memory` is mapped from now;
    until it is mapped from others, or closed."""
    now: list[_Lease] = []
    with _lock:
        for fd in fds:
            status = os.fstat(fd)
            key = status.st_dev, status.st_ino
            lease = _leases.get(key) or _take(fd)
            if lease is not None:
                _leases[key] = lease
                lease.memories.add(memory)
                now.append(lease)
        _drop(memory, now)
    memory.at_close = _let_go


def share(memory: GuestMemory) -> None:
    """Have `memory`, a copy, be one of those over the same base."""
    base = memory.base
    with _lock:
        for lease in _leases.values():
            if base is not None and any(each.base is base for each in lease.memories):
                lease.memories.add(memory)
    memory.at_close = _let_go


def _take(fd: int) -> _Lease | None:
    own = os.dup(fd)
    try:
        fcntl.fcntl(own, fcntl.F_SETSIG, BROKEN)
        fcntl.fcntl(own, F_SETOWN_EX, OWNER_EX.pack(0, _watching()))
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except (OSError, RuntimeError):  # not ours, or not to be had here; no thread for the watcher
        os.close(own)
        return None
    return _Lease(own)


def _let_go(memory: GuestMemory) -> None:
    """`memory` is being closed."""
    with _lock:
        _drop(memory, ())


def _drop(memory: GuestMemory, but: Sequence[_Lease]) -> None:
    """Take `memory` out of all leases `but` these; those that nobody needs are given back."""
    for key, lease in list(_leases.items()):
        if lease not in but:
            lease.memories.discard(memory)
            if not lease.memories:
                _give_back(key, lease)


def _give_back(key: tuple[int, int], lease: _Lease) -> None:
    if _leases.get(key) is lease:
        del _leases[key]
        with suppress(OSError):  # by itself: a forked child may hold the description
            fcntl.fcntl(lease.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(lease.fd)


# --- the watcher ----------------------------------------------------------------------------------


def _watching() -> int:
    """The watcher's thread id; it is started first if there is none."""
    global _ident, _watcher
    if not _watcher:
        begun = allocate_lock()
        begun.acquire()

        def main() -> None:
            global _watcher
            _signal.pthread_sigmask(_signal.SIG_BLOCK, {BROKEN})
            _watcher = get_native_id()
            begun.release()
            while True:
                _signal.sigwaitinfo({BROKEN})
                while _asked:
                    _asked.pop(0)()
                with suppress(Exception):  # the lease runs out then
                    _look()

        _ident = start_new_thread(main, ())
        with begun:
            pass
    return _watcher


def in_watcher(function: Callable[[], object]) -> bool:
    """Have the watcher's thread call `function`, and wait for that; False if there is none."""
    if not _watcher:
        return False
    done = allocate_lock()
    done.acquire()

    def call() -> None:
        try:
            function()
        finally:
            done.release()

    _asked.append(call)
    _signal.pthread_kill(_ident, BROKEN)
    with done:
        return True


def _look() -> None:
    """Have the memories leave the files that somebody wants to change."""
    with _lock:
        broken = [
            (key, lease)
            for key, lease in _leases.items()
            if fcntl.fcntl(lease.fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK
        ]
        memories = [memory for _, lease in broken for memory in lease.memories]
    try:
        for memory in memories:
            if memory.leave is not None:
                with suppress(Exception):  # closed meanwhile
                    memory.leave()
    finally:
        with _lock:
            for key, lease in broken:
                _give_back(key, lease)


def _forget() -> None:
    """In a forked child: the watcher is the parent's."""
    global _lock, _watcher
    _lock, _watcher = allocate_lock(), 0
    for lease in _leases.values():
        os.close(lease.fd)
    _leases.clear()


os.register_at_fork(after_in_child=_forget)
