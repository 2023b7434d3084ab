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

import threading
import time

from vmm.errors import EXIT_PANIC
from vmm.machine import exits
from vmm.machine.exits import MachineExit
from vmm.machine.vcpu_thread import RUNNING

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
    global _thread
    with _changed:
        _looks[machine] = _Look()
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_main, name="halted", daemon=True)
            _thread.start()


def forget(machine: Machine, timeout: float) -> None:
    """Watch `machine` no longer; harmless twice. The thread ends with the last machine, which is
    waited for, but no longer than `timeout` seconds: a listener may hold it up."""
    with _changed:
        if _looks.pop(machine, None) is None or _looks:
            return
        thread = _thread
        _changed.notify_all()
    if thread is not None and thread is not threading.current_thread():
        thread.join(timeout)


class _Look:
    """What is known of one machine: the CPU times of its vCPU threads in ns, at the last look and
    after they were last asked, the answer, and `since` when it has been dead (time.monotonic(), or
    0)."""

    __slots__ = ("_asked", "_dead", "_last", "since")

    def __init__(self) -> None:
        self.since = 0.0
        self._last: list[int] = []
        self._dead = False
        self._asked: list[int] = []

    def is_dead(self, machine: Machine) -> bool:
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
_thread: threading.Thread | None = None


def _main() -> None:
    while True:
        with _changed:
            if not _looks:
                return
            _changed.wait(PERIOD)
            looks = list(_looks.items())
        for machine, look in looks:
            if machine.state != RUNNING or not look.is_dead(machine):
                look.since = 0.0
                continue
            reason, now = ending(machine), time.monotonic()
            look.since = look.since or now
            if reason.status == 0 or now - look.since >= SILENT_TIME:
                machine.end(reason)


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
