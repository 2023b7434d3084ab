"""What the main thread of `vmm run` does: wait for the end of the machine, or for a signal.

Signals only write to a descriptor (signal.set_wakeup_fd); they are acted on here, between two
polls, so that no handler ever finds a lock held.
"""

from __future__ import annotations

# The C module: `signal` wraps it in enums, which cost a millisecond to load.
import _signal  # type: ignore[import-not-found]
import os
import select

from vmm.machine import exits
from vmm.machine.exits import MachineExit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.machine import Machine

SIGNALS = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)
NAMES = {_signal.SIGINT: "SIGINT", _signal.SIGTERM: "SIGTERM", _signal.SIGHUP: "SIGHUP"}


def supervise(machine: Machine) -> MachineExit:
    """Start the machine and see it to its end. On the main thread."""
    ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    old_fd = _signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    old = {signum: _signal.signal(signum, _ignore) for signum in SIGNALS}

    def on_event(event: str) -> None:
        if event == "stopped":
            os.eventfd_write(ended, 1)

    machine.listen(on_event)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(read_end, select.POLLIN)
    pressed = False
    try:
        machine.start()
        while machine.exit is None:
            left = machine.time_left()
            ready = [fd for fd, _ in poll.poll(None if left is None else left * 1000 + 1)]
            if read_end not in ready:
                continue
            for signum in os.read(read_end, 64):
                if signum == _signal.SIGTERM and not pressed:
                    pressed = True
                    machine.press_power_button()
                elif signum in SIGNALS:
                    machine.end(
                        MachineExit(exits.STOPPED, f"ended by {NAMES[signum]}", status=128 + signum)
                    )
        return machine.wait()
    finally:
        machine.listen(None)
        for signum, handler in old.items():
            _signal.signal(signum, handler)
        _signal.set_wakeup_fd(old_fd)
        for fd in (ended, read_end, write_end):
            os.close(fd)


def _ignore(signum: int, frame: object) -> None:
    """The wakeup descriptor carries the signal."""
