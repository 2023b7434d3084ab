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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from vmm import Machine

    T = TypeVar("T")

STUCK_AFTER = 5.0
"""Seconds `close` gives a vCPU to come out of a function of the test, once it was told to stop."""
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


def close(machine: Machine) -> None:
    """Close `machine`, all of it, in bounded time.

    Raises:
        LateError: it has not closed in time; the message says where its vCPUs are.
        Exception: what a part of it raised in closing; the other parts are closed.
    """
    if machine.state == "closed":
        return
    if machine.config.console_where == "auto":  # its terminal's signals are the main thread's
        _close_all(machine)
        return

    def stuck(passed: float) -> bool:
        return passed >= STUCK_AFTER and bool(vcpu_stacks(machine))

    try:
        within(CLOSE_WITHIN, lambda: _close_all(machine), stuck)
    except LateError:
        where = "\n".join(vcpu_stacks(machine)) or "its vCPUs have ended, its devices have not"
        raise LateError(
            f"it does not close: {where}\nIt is left behind, with what it holds."
        ) from None


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


def _close_all(machine: Machine) -> None:
    """Close `machine`; where a part raises, the parts after it are closed all the same."""
    first: BaseException | None = None
    for _ in range(32):  # each call gets by the part that raised
        try:
            machine.close()
            break
        except BaseException as err:
            first = first or err
            if machine.state == "closed":
                break
    if first is not None:
        raise first


def vcpu_stacks(machine: Machine) -> list[str]:
    """Where in Python each vCPU's thread is, innermost call last; none where all have ended."""
    frames = sys._current_frames()
    by_name = {thread.ident: thread for thread in threading.enumerate()}
    found = []
    for vcpu in machine.vcpu_threads:
        ident = vcpu.ident
        if ident not in frames or ident not in by_name:
            continue
        calls = traceback.extract_stack(frames[ident])[-FRAMES:]
        where = ", ".join(f"{call.name} ({call.filename}:{call.lineno})" for call in calls)
        found.append(f"vCPU {vcpu.vcpu.number} is in {where}")
    return found
