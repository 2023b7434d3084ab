"""What the main thread of `vmm run` does: wait for the end of the machine, or for a signal.

Signals only write to a descriptor (signal.set_wakeup_fd); they are acted on here, between two
polls, so that no handler ever finds a lock held.

How a signal ends a machine:
    SIGINT   at once.
    SIGHUP   at once; but not in the moment after a SIGTERM (systemd's SendSIGHUP= sends both).
    SIGTERM  presses the guest's power button. A guest that cannot notice it is ended at once, one
             that has not powered off after `grace` seconds then. A second SIGTERM ends it, if it
             comes MOMENT seconds after the first or later: timeout(1) signals its child and the
             child's process group, two signals at once which may also arrive as one.
"""

from __future__ import annotations

# The C module: `signal` wraps it in enums, which cost a millisecond to load.
import _signal  # type: ignore[import-not-found]
import os
import select
import time

from vmm.cli.say import end_guests_line, say
from vmm.errors import StateError, UsageError
from vmm.machine import exits
from vmm.machine.exits import MachineExit
from vmm.machine.machine import UNSEEN_PATIENCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
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
MOMENT = 1.0
"""Seconds after a SIGTERM in which another one is the same."""
GRACE = 30.0
"""Seconds from SIGTERM to the end of a machine that goes on (--grace)."""
BUILDING_MAX = 2
"""Seconds a machine may still be built after a signal that ends it."""
TOGETHER = 50
"""Milliseconds between a pipeline's other processes ending by a signal and that signal here."""
STDOUT = 1
READER_GONE = "standard output: its reader has gone (--console none runs without one)"


class Terminated(KeyboardInterrupt):
    """SIGTERM, SIGHUP or SIGINT came while a machine was being built.

    Attributes:
        signum: which signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {NAMES[signum]}, before the machine had started")
        self.signum = signum


class Signals:
    """Signals come out of `fd`, a byte each, and do nothing else.

    A context manager, for the main thread. One that was ignored (nohup) stays ignored. Until
    `armed` is called a machine is being built, which can take seconds. A signal that ends a machine
    has `armed` raise Terminated then, when all that was built can be given back. It is raised in
    the main thread, wherever that is, if building goes on for BUILDING_MAX seconds, or at another
    signal a moment later.
    """

    def __init__(self, signums: tuple[int, ...] = SIGNALS) -> None:
        self.fd = -1
        self._signums = signums
        self._building = True
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        self.fd, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._old_fd = _signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old = {
            signum: _signal.signal(signum, self._on_signal)
            for signum in self._signums
            if _signal.getsignal(signum) != _signal.SIG_IGN
        }
        return self

    def __exit__(self, *exc: object) -> None:
        self._built()
        for signum, handler in self._old.items():
            _signal.signal(signum, handler)
        _signal.set_wakeup_fd(self._old_fd)
        os.close(self.fd)
        os.close(self._write_end)
        self.fd = -1

    def armed(self) -> None:
        """The machine is built: from now on somebody reads the signals. Raises Terminated."""
        self._built()
        if self._first is not None:
            raise Terminated(self._first[0])

    def _built(self) -> None:
        self._building = False
        if self._first is not None:
            _signal.alarm(0)
            _signal.signal(_signal.SIGALRM, _signal.SIG_DFL)

    def read(self) -> bytes:
        """The signals that came, in order."""
        try:
            return os.read(self.fd, 64)
        except BlockingIOError:
            return b""

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if not self._building or signum not in (*NAMES, _signal.SIGALRM):
            return
        now = time.monotonic()
        if self._first is None:
            self._first = signum, now
            _signal.signal(_signal.SIGALRM, self._on_signal)
            _signal.alarm(BUILDING_MAX)
        elif now - self._first[1] >= MOMENT:
            self._building = False
            raise Terminated(self._first[0])


class _Termination:
    """What SIGTERM has begun, and when it ends the machine."""

    def __init__(self, machine: Machine, grace: float, expected: Callable[[], bool]) -> None:
        self._machine = machine
        self._grace = grace
        self._expected = expected
        self._pressed: float | None = None
        self._look: float | None = None

    def wait(self) -> int | None:
        """Milliseconds until `act` is wanted; None: for ever."""
        due = self._due()
        return None if due is None else max(int((due - time.monotonic()) * 1000) + 1, 0)

    def _due(self) -> float | None:
        if self._pressed is None:
            return None
        due = self._pressed + self._grace if self._look is None else self._look
        return due if due < self._pressed + 1e6 else None

    def signal(self) -> None:
        """SIGTERM came."""
        now = time.monotonic()
        if self._pressed is None:
            self._press(now)
        elif now - self._pressed >= MOMENT:
            self._end("ended by SIGTERM")

    @property
    def begun(self) -> bool:
        """Whether the machine has been asked to end."""
        return self._pressed is not None

    @property
    def just_begun(self) -> bool:
        """Whether a SIGTERM came less than a moment ago."""
        return self._pressed is not None and time.monotonic() - self._pressed < MOMENT

    def _press(self, now: float) -> None:
        machine = self._machine
        if machine.state == "paused" and not self._expected():
            self._end("ended by SIGTERM: it is paused")
            return
        if not self._grace:
            self._end("ended by SIGTERM")
            return
        machine.press_power_button()
        self._pressed = now
        unseen = machine.platform.power_button_unseen()
        if unseen and not machine.config.acpi:
            self._end(f"ended by SIGTERM: {unseen}")
        elif unseen:
            self._look = now + UNSEEN_PATIENCE
        else:
            self._tell()

    def act(self) -> None:
        """Look whether it is time to end the machine, and do."""
        due = self._due()
        if due is None or time.monotonic() < due:
            return
        if self._look is None:
            self._end(f"ended by SIGTERM: the guest was still on after {self._grace:g} s (--grace)")
            return
        self._look = None
        unseen = self._machine.platform.power_button_unseen()
        if unseen:
            self._end(f"ended by SIGTERM: {unseen}")
        else:
            self._tell()

    def _tell(self) -> None:
        end_guests_line(self._machine)
        line = "SIGTERM: the guest's power button is pressed; "
        if self._due() is not None:
            line += f"the machine ends in {self._grace:g} s at the latest (--grace), or "
        say(line + "at another SIGTERM")

    def _end(self, message: str) -> None:
        self._machine.end(MachineExit(exits.STOPPED, message, status=128 + _signal.SIGTERM))


def supervise(
    machine: Machine,
    signals: Signals,
    expected: Callable[[], bool] = lambda: False,
    grace: float = GRACE,
    begin: Callable[[], None] = lambda: None,
) -> MachineExit:
    """Start the machine and see it to its end. On the main thread.

    `expected` says whether somebody has it paused for a moment, which nobody needs to be told.
    `grace`: seconds from SIGTERM to the end. `begin` is called last before the guest runs.
    """
    changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def on_event(event: str) -> None:
        if event in ("stopped", "paused"):
            os.eventfd_write(changed, 1)

    machine.listen(on_event)
    poll = select.poll()
    poll.register(changed, select.POLLIN)
    poll.register(signals.fd, select.POLLIN)
    watched = machine.config.console_where == "auto" and _is_stream(STDOUT)
    if watched:
        poll.register(STDOUT, 0)  # errors and hang-ups are told without being asked for
    termination = _Termination(machine, grace, expected)
    try:
        signals.armed()
        begin()
        machine.start()
        while machine.exit is None:
            ready = dict(poll.poll(termination.wait()))
            if changed in ready:
                os.eventfd_read(changed)
                if machine.state == "paused" and not expected():
                    end_guests_line(machine)
                    say(_why_paused(machine))
            gone = watched and STDOUT in ready
            if gone:
                poll.unregister(STDOUT)
                if signals.fd not in ready:  # one to the whole pipeline is about to come, perhaps
                    ready.update(poll.poll(TOGETHER))
            came = signals.read() if signals.fd in ready else b""
            for signum in came:
                if signum == _signal.SIGTERM:
                    termination.signal()
                elif signum == _signal.SIGCONT:
                    _go_on(machine)
                elif signum == _signal.SIGWINCH:
                    machine.platform.resize()
                elif signum == _signal.SIGHUP and (
                    termination.just_begun or _signal.SIGTERM in came
                ):
                    continue
                elif signum in NAMES:
                    machine.end(
                        MachineExit(exits.STOPPED, f"ended by {NAMES[signum]}", status=128 + signum)
                    )
            if gone and not termination.begun:  # else the guest is powering off
                machine.end(MachineExit(exits.STOPPED, READER_GONE, status=128 + _signal.SIGPIPE))
            termination.act()
        return machine.wait()
    finally:
        machine.listen(None)
        os.close(changed)


def parse_grace(text: str) -> float:
    """The value of `--grace`, in seconds. Raises UsageError."""
    from vmm.units import parse_seconds

    try:
        seconds = parse_seconds(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # nor "nan"
        raise UsageError(
            f"--grace {text!r} is not a number of seconds; say for example 10, or 0 to end the "
            "machine at once"
        )
    return seconds


def _is_stream(fd: int) -> bool:
    """Whether `fd` is a pipe or a socket, whose reader may go away."""
    import stat

    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _why_paused(machine: Machine) -> str:
    why, how = machine.paused_for, "SIGINT or Ctrl-A x ends it"
    if why:
        return f"{why}; it is paused (kill -CONT {os.getpid()} goes on, {how})"
    return f"the guest's kernel panicked; it is paused ({how})"


def _go_on(machine: Machine) -> None:
    machine.platform.console.reclaim()
    if machine.paused_for:
        from contextlib import suppress

        with suppress(StateError):  # it has ended meanwhile
            machine.resume()
