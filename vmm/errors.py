"""Exceptions, each with the exit status `vmm` ends with when nobody catches it.

A message is one line for a person: it names the option or file, the value, and what would work.
"""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_HOST = 69
"""The host cannot run this (sysexits.h EX_UNAVAILABLE): no /dev/kvm, no permission, ..."""
EXIT_INTERNAL = 70
"""The monitor itself failed (sysexits.h EX_SOFTWARE)."""
EXIT_PANIC = 120
EXIT_TRIPLE_FAULT = 121
EXIT_EMULATION = 122
EXIT_TIMEOUT = 124
EXIT_AGENT = 125
"""The guest's agent does not answer, or not as it should."""
EXIT_INTERRUPTED = 130


_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(32), 127)}


class VmmError(Exception):
    """Anything this package raises on purpose."""

    exit_status = EXIT_INTERNAL


class UsageError(VmmError):
    """A value a person gave cannot work; exit status 2."""

    exit_status = EXIT_USAGE

    def __str__(self) -> str:
        """One line, whatever characters the value has."""
        return super().__str__().translate(_CONTROL)


class SnapshotError(UsageError):
    """A snapshot cannot be used, or not here; exit status 2."""


class ShapeError(ValueError):
    """Data that somebody else may have written has another shape than it should (vmm.shapes), or
    is no state of the device that is to take it over."""


class BootError(UsageError):
    """A kernel or initrd file cannot be booted as asked; exit status 2."""


class StateError(VmmError):
    """A call was made in a state of the machine that does not allow it."""


class GuestMemoryError(VmmError):
    """An address range is not (wholly) guest memory."""

    def __init__(self, gpa: int, size: int, what: str = "outside guest memory") -> None:
        super().__init__(f"GPA {gpa:#x}+{size:#x} {what}")
        self.gpa = gpa
        self.size = size


class AgentError(VmmError):
    """The agent in the guest cannot be reached, or broke the rules; exit status 125."""

    exit_status = EXIT_AGENT


class HostError(VmmError):
    """The host cannot do what was asked; exit status 69."""

    exit_status = EXIT_HOST


class KvmError(HostError):
    """A KVM ioctl failed.

    `ioctl` is its name in linux/kvm.h, `errno` the error, `hint` what a person can do about it.
    """

    def __init__(self, ioctl: str, errno: int, hint: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        text = f"{ioctl}: {os.strerror(errno)} ({name})"
        super().__init__(f"{text}; {hint}" if hint else text)
        self.ioctl = ioctl
        self.errno = errno
        self.hint = hint


def call_each(functions: Iterable[Callable[[], object]]) -> None:
    """Call every function, also after one has raised; then raise the first error.

    What the others raised is told in notes of that error (`__notes__`).
    """
    first: BaseException | None = None
    for function in functions:
        try:
            function()
        except BaseException as err:  # Ctrl-C too: the rest is called all the same
            if first is None:
                first = err
            else:
                first.add_note(f"and then: {type(err).__name__}: {err}")
    if first is not None:
        raise first
