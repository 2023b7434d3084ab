"""What the main thread of `vmm run` does: wait for the end of the machine, or for a signal.

Signals only write to a descriptor (signal.set_wakeup_fd); they are acted on here, between two
polls, so that no handler ever finds a lock held.
"""

from __future__ import annotations

# The C module: `signal` wraps it in enums, which cost a millisecond to load.
import _signal  # type: ignore[import-not-found]
import os
import select

from vmm.cli.say import end_guests_line, say
from vmm.errors import StateError
from vmm.machine import exits
from vmm.machine.exits import MachineExit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from vmm.machine import Machine

SIGNALS = (
    _signal.SIGINT,
    _signal.SIGTERM,
    _signal.SIGHUP,
    _signal.SIGWINCH,
    _signal.SIGCONT,
)
NAMES = {_signal.SIGINT: "SIGINT", _signal.SIGTERM: "SIGTERM", _signal.SIGHUP: "SIGHUP"}


class Signals:
    """Signals come out of `fd`, a byte each, and do nothing else.

    A context manager, for the main thread. One that was ignored (nohup) stays ignored.
    """

    def __init__(self, signums: tuple[int, ...] = SIGNALS) -> None:
        self.fd = -1
        self._signums = signums

    def __enter__(self) -> Self:
        self.fd, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._old_fd = _signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old = {
            signum: _signal.signal(signum, _on_signal)
            for signum in self._signums
            if _signal.getsignal(signum) != _signal.SIG_IGN
        }
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._old.items():
            _signal.signal(signum, handler)
        _signal.set_wakeup_fd(self._old_fd)
        os.close(self.fd)
        os.close(self._write_end)
        self.fd = -1

    def read(self) -> bytes:
        """The signals that came, in order."""
        try:
            return os.read(self.fd, 64)
        except BlockingIOError:
            return b""


def supervise(
    machine: Machine, signals: Signals, expected: Callable[[], bool] | None = None
) -> MachineExit:
    """Start the machine and see it to its end. On the main thread.

    `expected` says whether somebody has it paused for a moment, which nobody needs to be told.
    """
    changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def on_event(event: str) -> None:
        if event in ("stopped", "paused"):
            os.eventfd_write(changed, 1)

    machine.listen(on_event)
    poll = select.poll()
    poll.register(changed, select.POLLIN)
    poll.register(signals.fd, select.POLLIN)
    pressed = False
    try:
        machine.start()
        while machine.exit is None:
            ready = [fd for fd, _ in poll.poll()]
            if changed in ready:
                os.eventfd_read(changed)
                if machine.state == "paused" and not (expected is not None and expected()):
                    end_guests_line(machine)
                    say(_why_paused(machine))
            for signum in signals.read() if signals.fd in ready else b"":
                if signum == _signal.SIGTERM and not pressed:
                    pressed = True
                    machine.press_power_button()
                    if machine.config.trace:
                        say("SIGTERM: the power button is pressed; another one ends the machine")
                elif signum == _signal.SIGCONT:
                    _go_on(machine)
                elif signum == _signal.SIGWINCH:
                    machine.platform.resize()
                elif signum in NAMES:
                    machine.end(
                        MachineExit(exits.STOPPED, f"ended by {NAMES[signum]}", status=128 + signum)
                    )
        return machine.wait()
    finally:
        machine.listen(None)
        os.close(changed)


def _why_paused(machine: Machine) -> str:
    why, how = machine.paused_for, "SIGINT or Ctrl-A x ends it"
    if why:
        return f"{why}; it is paused (kill -CONT {os.getpid()} goes on, {how})"
    return f"the guest's kernel panicked; it is paused ({how})"


def _go_on(machine: Machine) -> None:
    if machine.paused_for:
        from contextlib import suppress

        with suppress(StateError):  # it has ended meanwhile
            machine.resume()


def _on_signal(signum: int, frame: object) -> None:
    """The wakeup descriptor carries the signal."""
