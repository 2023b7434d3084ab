"""Calls that may never return, with a limit: a failing test must not stop those after it.

A vCPU may be inside a function of the test (`Machine.bind_port`) that waits for what will never
come; whoever waits for that vCPU then waits for ever too.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
import warnings

from vmm.testing.identity import of_a_library

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from vmm import Machine

    T = TypeVar("T")

STUCK_AFTER = 5.0
"""Seconds `close` gives a function of the test that is called meanwhile."""
CLOSE_WITHIN = 60.0
"""Seconds a machine has to close: slow disks are flushed in them."""
LOOK = 0.05
FRAMES = 3


class LateError(Exception):
    """A call has not returned in time; it goes on in a thread of its own, and nobody waits."""


def within(
    seconds: float, function: Callable[[], T], given_up: Callable[[float], bool] | None = None
) -> T:
    """What `function` returns, called in a thread of its own.

    Args:
        given_up: asked now and then with the seconds that have passed; True ends the wait.

    Raises:
        LateError: it has not returned within `seconds`.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def call() -> None:
        try:
            result.append(function())
        except BaseException as err:
            failure.append(err)

    name = getattr(function, "__name__", "call")
    thread = threading.Thread(target=call, name=f"vmm-testing-{name}", daemon=True)
    begun = time.monotonic()
    thread.start()
    while True:
        passed = time.monotonic() - begun
        if passed >= seconds or (given_up is not None and given_up(passed)):
            thread.join(0)
            if thread.is_alive():
                raise LateError(f"{name} has not returned within {passed:.0f} s")
        thread.join(min(LOOK, max(seconds - passed, 0.0)) if given_up else max(seconds - passed, 0))
        if not thread.is_alive():
            break
    if failure:
        raise failure[0]
    return result[0]


def close(machine: Machine, patience: float = STUCK_AFTER) -> None:
    """Close `machine` in bounded time.

    Args:
        patience: seconds that a function of the test, which the machine calls when it is closed
            (`at_close`, a listener), has.

    Raises:
        LateError: it has not closed in time; the message says where that is. It goes on, and
            nobody waits.
        Exception: what a part of it raised in closing; the other parts are closed.
    """
    if machine.config.console_where == "auto":  # its terminal's signals are the main thread's
        machine.close()
        return
    closing = threading.Thread(name="not started")

    def run() -> None:
        nonlocal closing
        closing = threading.current_thread()
        machine.close()

    def stuck(passed: float) -> bool:
        return passed >= patience and _in_a_test(closing)

    try:
        within(CLOSE_WITHIN, run, stuck)
    except LateError:
        where = _where(closing.ident) or "a call that has just returned"
        raise LateError(f"the machine does not close; it is in {where}") from None
    stacks = vcpu_stacks(machine)
    if stacks:  # a warning that pytest shows, other than a ResourceWarning
        left = "; ".join(stacks)
        warnings.warn(
            f"{machine!r}: {left}; what that uses is given back when it returns",
            RuntimeWarning,
            stacklevel=3,
        )


def _in_a_test(thread: threading.Thread) -> bool:
    """Whether `thread` is in a function that is not of vmm, or of a library."""
    frame = sys._current_frames().get(thread.ident or -1)
    while frame is not None:
        if not of_a_library(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def ended_after(machine: Machine, seconds: float, who: str) -> Iterator[None]:
    """With `machine` ended once `seconds` have passed: whoever waits for it is told then."""
    from vmm.machine.exits import TIMEOUT, MachineExit

    reason = MachineExit(TIMEOUT, f"{who} has taken more than {seconds:g} s")
    timer = threading.Timer(seconds, machine.end, (reason,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def vcpu_stacks(machine: Machine) -> list[str]:
    """Where in Python each vCPU's thread is, innermost call last; none where all have ended."""
    found = [(vcpu.vcpu.number, _where(vcpu.ident)) for vcpu in machine.vcpu_threads]
    return [f"vCPU {number} is in {where}" for number, where in found if where]


def _where(ident: int | None) -> str:
    """The innermost calls of a thread of this process; empty where it has ended."""
    alive = {thread.ident for thread in threading.enumerate()}
    frame = sys._current_frames().get(ident or -1)
    if frame is None or ident not in alive:
        return ""
    calls = traceback.extract_stack(frame)[-FRAMES:]
    return ", ".join(f"{call.name} ({call.filename}:{call.lineno})" for call in calls)
