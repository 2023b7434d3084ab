"""How a machine ended, and the exit status `vmm run` makes of it."""

from __future__ import annotations

from vmm import errors

POWEROFF = "poweroff"
HALTED = "halted"
"""Every processor is halted for good; see vmm/machine/halted.py."""
REBOOT = "reboot"
EXIT_PORT = "exit-port"
PANIC = "panic"
TRIPLE_FAULT = "triple-fault"
EMULATION_FAILURE = "emulation-failure"
FAIL_ENTRY = "fail-entry"
INTERNAL_ERROR = "internal-error"
TIMEOUT = "timeout"
STOPPED = "stopped"
MONITOR_ERROR = "monitor-error"
MEMORY_LOST = "memory-lost"
"""Who should have handed the guest's memory over has gone (userfaultfd)."""
CRASHED = "crashed"
"""The process of a machine that has one of its own (`isolate=True`) has ended."""

STATUS: dict[str, int] = {
    POWEROFF: errors.EXIT_OK,
    REBOOT: errors.EXIT_OK,
    HALTED: errors.EXIT_OK,
    PANIC: errors.EXIT_PANIC,
    TRIPLE_FAULT: errors.EXIT_TRIPLE_FAULT,
    EMULATION_FAILURE: errors.EXIT_EMULATION,
    FAIL_ENTRY: errors.EXIT_EMULATION,
    INTERNAL_ERROR: errors.EXIT_EMULATION,
    TIMEOUT: errors.EXIT_TIMEOUT,
    STOPPED: errors.EXIT_INTERRUPTED,
    MONITOR_ERROR: errors.EXIT_INTERNAL,
    MEMORY_LOST: errors.EXIT_HOST,
    CRASHED: errors.EXIT_INTERNAL,
}


class MachineExit:
    """Why a machine stopped.

    Attributes:
        kind: one of this module's constants.
        status: the exit status, 0 to 255; for `exit-port` the byte the guest wrote.
        message: one line for a person.
        report: the failure report (registers, code) where there is one, else an empty string.
    """

    __slots__ = ("kind", "message", "report", "status")

    def __init__(
        self, kind: str, message: str, *, report: str = "", status: int | None = None
    ) -> None:
        self.kind = kind
        self.message = message
        self.report = report
        self.status = STATUS[kind] if status is None else status

    @property
    def ok(self) -> bool:
        """Whether the guest ended by itself with status 0."""
        return self.status == 0

    def __repr__(self) -> str:
        return f"MachineExit({self.kind!r}, {self.message!r}, status={self.status})"
