"""Run a function in a process, or a thread, that gives things up first."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> T:
    """What `function` returns or raises, in a thread of its own that ends with it."""
    kept: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            kept.append(function())
        except BaseException as err:
            failed.append(err)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return kept[0]


def in_process(function: Callable[[], T]) -> tuple[T | None, int]:
    """What `function` returns in a forked child, None if it did not return, and the wait status."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(theirs, pickle.dumps(function()))
        finally:
            os._exit(1)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    return (pickle.loads(data) if data else None), status


def outcome(function: Callable[[], object]) -> str:
    """`ok`, or the name of the error that `function` ends in: `EACCES`, `EPERM` ..."""
    import errno

    try:
        function()
    except OSError as err:
        return errno.errorcode.get(err.errno or 0, str(err))
    return "ok"
