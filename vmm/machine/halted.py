"""Ends machines whose guest has halted for ever.

A guest that cannot power off (no ACPI, `halt`) disables interrupts and halts each processor; Linux
prints "reboot: System halted". Nothing but an NMI or an INIT wakes such a processor (Intel SDM
volume 2A, HLT), and when all are halted nobody is left to send one. QEMU keeps such a machine for
ever; this monitor ends it.

One thread watches all machines of the process that booted a kernel. Each PERIOD it reads the CPU
time of the vCPU threads. Only where none of them used any since the last look are they interrupted
and asked for their vCPUs' states, and not again until one has run: neither a busy guest nor an idle
one is disturbed.
"""

from __future__ import annotations

import os
import threading
import time
from _thread import start_new_thread

from vmm.errors import EXIT_PANIC
from vmm.machine import exits
from vmm.machine.exits import MachineExit
from vmm.machine.vcpu_thread import RUNNING, STOPPED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.machine.machine import Machine

PERIOD = 1.0
"""Seconds between two looks; a machine ends two or three after its guest said that it halts."""
SILENT_TIME = 30.0
"""Seconds after which a machine ends whose guest did not say so."""
ANSWER_TIME = 0.5
"""Seconds a vCPU thread may take to answer; it may be busy in a device."""
SETTLE_TIME = 0.02
"""Seconds in which a vCPU thread that answered is back in KVM_RUN."""

SAID = ("System halted", "Power down")
"""What Linux prints after "reboot: " when it halts on purpose (kernel/reboot.c)."""
DIED = (
    # (what Linux prints before it halts for no good, what that means)
    (" -- System halted", "the kernel's decompressor gave up"),  # boot/compressed/error.c
    ("PANIC: early exception", "the guest's kernel crashed early"),  # mm/extable.c
    ("Kernel panic - not syncing", "the guest's kernel panicked"),
)


def watch(machine: Machine) -> None:
    """Watch `machine` from now on, until it is forgotten."""
    global _watcher
    with _changed:
        _looks[machine] = _Look()
        if _watcher != os.getpid():  # none yet, or it is the parent's of this process
            _watcher = os.getpid()
            # Not threading.Thread, whose start waits for the thread: this is in every start.
            start_new_thread(_main, ())


def forget(machine: Machine, timeout: float) -> None:
    """Watch `machine` no longer; harmless twice. The watcher ends with the last machine.

    Waits until nobody looks at it, but no longer than `timeout` seconds: a listener may hold the
    watcher up.
    """
    with _changed:
        _looks.pop(machine, None)
        if not _looks:
            _changed.notify_all()
        if _at[0] is machine and _at[1] not in (0, threading.get_ident()):
            _changed.wait_for(lambda: _at[0] is not machine, timeout)


class _Look:
    """What is known of one machine: the CPU times of its vCPU threads in ns, at the last look and
    after they were last asked, the answer, and since when it has been dead (time.monotonic(), or
    0)."""

    __slots__ = ("_asked", "_dead", "_last", "_since")

    def __init__(self) -> None:
        self._since = 0.0
        self._last: list[int] = []
        self._dead = False
        self._asked: list[int] = []

    def at(self, machine: Machine) -> None:
        """Look at it, and end it where that is due."""
        if machine.state != RUNNING or not self._is_dead(machine):
            self._since = 0.0
            return
        reason, now = ending(machine), time.monotonic()
        self._since = self._since or now
        if reason.status == 0 or now - self._since >= SILENT_TIME:
            machine.end(reason)

    def _is_dead(self, machine: Machine) -> bool:
        """Whether no vCPU ran since the last look, nor can ever run again."""
        threads = machine.vcpu_threads
        times = [thread.cpu_time() for thread in threads]
        quiet, self._last = times == self._last, times
        if not quiet:
            return False
        if times == self._asked:
            return self._dead
        # No vCPU ran since the last look, so the answers are all of one and the same state.
        self._dead = all(thread.is_dead(ANSWER_TIME) for thread in threads)
        time.sleep(SETTLE_TIME)
        self._last = self._asked = [thread.cpu_time() for thread in threads]
        return self._dead


_changed = threading.Condition()
_looks: dict[Machine, _Look] = {}
_watcher = 0
"""The process whose thread watches, or 0."""
_at: tuple[Machine | None, int] = (None, 0)
"""The machine that is looked at now, and the watcher's thread."""


def _main() -> None:
    global _watcher
    while True:
        with _changed:
            if _looks:
                _changed.wait(PERIOD)
            _drop_stopped()
            if not _looks:
                _watcher = 0
                return
        _look_at_all()


def _drop_stopped() -> None:
    """Refer no longer to machines that have stopped: one that the program has forgotten would never
    be closed. One that is revived is watched again."""
    for machine in [each for each in _looks if each.state == STOPPED]:
        del _looks[machine]


def _look_at_all() -> None:
    with _changed:
        machines = list(_looks)
    for machine in machines:
        look = _begin(machine)
        if look is None:
            continue
        try:
            look.at(machine)
        except BaseException as err:
            machine.monitor_failed(err)
        finally:
            _end()


def _begin(machine: Machine) -> _Look | None:
    """Look at `machine` until `_end`, if it is still watched."""
    global _at
    with _changed:
        look = _looks.get(machine)
        if look is not None:
            _at = machine, threading.get_ident()
        return look


def _end() -> None:
    global _at
    with _changed:
        _at = None, 0
        _changed.notify_all()


def ending(machine: Machine) -> MachineExit:
    """What it means that the guest halted for ever, by the last of what it printed."""
    machine.platform.flush()
    text = machine.console.text()
    for words, meaning in DIED:
        if words in text:
            return MachineExit(exits.PANIC, f"{meaning}, and all processors are halted for good")
    last = text.rpartition("reboot: ")[2].partition("\n")[0] if "reboot: " in text else ""
    if any(words in last for words in SAID):
        return MachineExit(exits.HALTED, "the guest halted, and cannot wake up")
    return MachineExit(
        exits.HALTED,
        "the guest halted all processors for good and did not say why: a crash, or the end of a "
        "kernel that cannot power off",
        status=EXIT_PANIC,
    )
