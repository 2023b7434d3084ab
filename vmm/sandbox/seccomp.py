"""seccomp: a thread gives up every system call that is not on a list (seccomp(2)).

The list is data (vmm.sandbox.calls); here it becomes a BPF program: a binary search over the call's
number, then tests of its arguments. Calls that the list has without such tests are allowed by the
kernel from a bitmap, without running the program (Linux 5.11).

A test sees the lower 32 bits of an argument, which is all that the kernel looks at where the
argument is an int, and where all its flags are. The memory behind a pointer cannot be tested.
"""

from __future__ import annotations

import errno
import struct

from vmm import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypeAlias

    Test: TypeAlias = tuple[int, str, tuple[int, ...]]
    """Number of an argument, `in` (it is one of the values), or, with a single value of bits:
    `without` (it has none of them), `with` (it has all of them), `not all` (it lacks one)."""
    Calls: TypeAlias = Mapping[str, Sequence[Test]]
    """Names of allowed calls, and the tests that must all hold."""

SYS_SECCOMP = 317
_SET_MODE_FILTER, _GET_ACTION_AVAIL = 1, 2
_FLAG_TSYNC, _FLAG_NEW_LISTENER, _FLAG_TSYNC_ESRCH, _FLAG_WAIT_KILLABLE = 1, 8, 16, 32
"""The last has a call that is being answered not be interrupted by a signal, and made twice."""
ALLOW = 0x7FFF0000
KILL = 0x80000000
"""The process ends by SIGSYS."""
NOTIFY = 0x7FC00000
"""The process that has the filter's descriptor answers (seccomp_unotify(2))."""
LOG = 0x7FFC0000
"""Allowed, and the kernel's log says so: for making a list."""
_AUDIT_ARCH_X86_64 = 0xC000003E
_LOAD, _EQUAL, _AT_LEAST, _ANY_SET, _ALWAYS, _AND, _RETURN = (
    0x20, 0x15, 0x35, 0x45, 0x05, 0x54, 0x06,
)  # fmt: skip
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
"""Offsets in struct seccomp_data."""
_INSTRUCTION = struct.Struct("<HBBI")
_NEAR = 255
"""A conditional jump reaches so many instructions."""
MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS."""


def fails(number: int) -> int:
    """The action of a call that fails with errno `number`."""
    return 0x50000 | number


def compile_filter(
    calls: Calls,
    otherwise: int,
    others: Mapping[str, int] | None = None,
    *,
    refusal: int | None = None,
) -> bytes:
    """The BPF program: `others` have an action of their own, `calls` are allowed, all the rest (a
    listed call whose arguments do not pass, too) has the action `otherwise`.

    With `refusal`, which is for lists of what is denied, that is the action of listed calls whose
    arguments do not pass; calls that NUMBERS does not know yet, and the x32 ABI's, which have other
    numbers, fail with ENOSYS.

    Raises:
        KeyError: there is no call of that name.
        ValueError: the program is longer than the kernel takes, or a test has no such form.
    """
    from vmm.sandbox.numbers import NUMBERS

    leaves: dict[int, list[tuple[int, int, int, int]]] = {}
    for name, tests in calls.items():
        leaves[NUMBERS[name]] = _leaf(tests, otherwise if refusal is None else refusal)
    for name, action in (others or {}).items():
        leaves[NUMBERS[name]] = [(_RETURN, 0, 0, action)]
    # Runs of numbers that have the same answer: (first number, code).
    runs: list[tuple[int, list[tuple[int, int, int, int]]]] = []
    rest = [(_RETURN, 0, 0, otherwise)]
    for number in range(max(leaves, default=0) + 2):
        code = leaves.get(number, rest)
        if not runs or runs[-1][1] != code:
            runs.append((number, code))
    if refusal is not None:
        runs.append((max(NUMBERS.values()) + 1, [(_RETURN, 0, 0, fails(errno.ENOSYS))]))
    program = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        *_search(runs),
    ]
    if len(program) > MAX_INSTRUCTIONS:
        raise ValueError(f"a seccomp filter of {len(program)} instructions")
    return b"".join(_INSTRUCTION.pack(*each) for each in program)


def _search(
    runs: list[tuple[int, list[tuple[int, int, int, int]]]],
) -> list[tuple[int, int, int, int]]:
    if len(runs) == 1:
        return runs[0][1]
    half = len(runs) // 2
    below, above = _search(runs[:half]), _search(runs[half:])
    first = runs[half][0]
    if len(below) <= _NEAR:
        return [(_AT_LEAST, len(below), 0, first), *below, *above]
    return [(_AT_LEAST, 0, 1, first), (_ALWAYS, 0, 0, len(below)), *below, *above]


def _leaf(tests: Sequence[Test], otherwise: int) -> list[tuple[int, int, int, int]]:
    code: list[tuple[int, int, int, int]] = []
    for argument, how, values in tests:
        code.append((_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument))
        if how == "in":
            if len(values) >= _NEAR:
                raise ValueError(f"a test of {len(values)} values")
            # Each match jumps over the others and the return.
            for at, value in enumerate(values):
                code.append((_EQUAL, len(values) - at, 0, value & 0xFFFFFFFF))
            code.append((_RETURN, 0, 0, otherwise))
        elif how == "without":
            code += [(_ANY_SET, 0, 1, values[0]), (_RETURN, 0, 0, otherwise)]
        elif how in ("with", "not all"):
            here = (1, 0) if how == "with" else (0, 1)
            code += [(_AND, 0, 0, values[0]), (_EQUAL, *here, values[0])]
            code.append((_RETURN, 0, 0, otherwise))
        else:
            raise ValueError(f"no such test: {how}")
    return [*code, (_RETURN, 0, 0, ALLOW)]


def available(action: int = KILL) -> bool:
    """Whether the kernel has filters, with this action."""
    try:
        libc.syscall(SYS_SECCOMP, _GET_ACTION_AVAIL, 0, struct.pack("<I", action))
    except OSError:
        return False
    return True


def restrict(program: bytes, *, all_threads: bool = False, notify: bool = False) -> int:
    """Have this thread, or all of the process, and what they start, run under the filter `program`
    for good, besides those that are there.

    The caller has set no_new_privs (privileges.no_new_privs), or CAP_SYS_ADMIN.

    Returns:
        With `notify`, a descriptor, close-on-exec: who has it answers the calls whose action is
        NOTIFY. Without, 0.

    Raises:
        OSError: the kernel refuses; EBUSY: another filter of the process has such a descriptor.
    """
    header = struct.pack(
        "<HxxxxxxQ", len(program) // _INSTRUCTION.size, libc.address_of(program)
    )  # struct sock_fprog
    flags = _FLAG_TSYNC | _FLAG_TSYNC_ESRCH if all_threads else 0
    if not notify:
        return libc.syscall(SYS_SECCOMP, _SET_MODE_FILTER, flags, header)
    flags |= _FLAG_NEW_LISTENER
    try:
        return libc.syscall(SYS_SECCOMP, _SET_MODE_FILTER, flags | _FLAG_WAIT_KILLABLE, header)
    except OSError as err:
        if err.errno != errno.EINVAL:  # before Linux 5.19
            raise
    return libc.syscall(SYS_SECCOMP, _SET_MODE_FILTER, flags, header)
