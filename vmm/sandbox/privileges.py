"""What a thread may do beyond its user's: capabilities, and programs that give more of them."""

from __future__ import annotations

import struct
from contextlib import contextmanager

from vmm import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SYS_CAPGET, SYS_CAPSET, SYS_PRCTL = 125, 126, 157
SYS_UNSHARE = 272
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
CAP_SYS_ADMIN = 21
_CAP_VERSION_3 = 0x20080522
_HEADER = struct.pack("<Ii", _CAP_VERSION_3, 0)
_SETS = struct.Struct("<6I")
"""struct cap_user_data twice: effective, permitted, inheritable; lower and upper half."""


def no_new_privs() -> None:
    """No program that this thread starts gets privileges by execve(2): a set-user-ID bit, file
    capabilities. What Landlock and seccomp ask for. Raises OSError."""
    libc.syscall(SYS_PRCTL, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def has_no_new_privs() -> bool:
    """Whether this thread has no_new_privs."""
    return bool(libc.syscall(SYS_PRCTL, PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))


def capabilities() -> tuple[int, int, int]:
    """This thread's effective, permitted and inheritable capabilities, bit N for number N."""
    data = bytearray(_SETS.size)
    libc.syscall(SYS_CAPGET, bytearray(_HEADER), data)
    effective, permitted, inheritable, effective2, permitted2, inheritable2 = _SETS.unpack(data)
    return (
        effective | effective2 << 32,
        permitted | permitted2 << 32,
        inheritable | inheritable2 << 32,
    )


def drop_capabilities(keep: Iterable[int] = ()) -> None:
    """Give up this thread's capabilities but the numbers `keep`: in all sets, the bounding and the
    ambient one among them, so that no program it starts has others either. Raises OSError."""
    kept = 0
    for number in keep:
        kept |= 1 << number
    effective, permitted, _ = capabilities()
    libc.syscall(SYS_PRCTL, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    raw = libc.raw
    for number in range(64):
        # EINVAL: the kernel has no more. EPERM: without CAP_SETPCAP, under which no_new_privs does.
        if not kept >> number & 1 and raw(SYS_PRCTL, PR_CAPBSET_DROP, number, 0, 0, 0, 0):
            break
    effective, permitted = effective & kept, permitted & kept
    low = 0xFFFFFFFF
    data = (effective & low, permitted & low, 0, effective >> 32, permitted >> 32, 0)
    libc.syscall(SYS_CAPSET, bytearray(_HEADER), _SETS.pack(*data))


@contextmanager
def none_effective() -> Iterator[None]:
    """This thread does without its capabilities for as long. Raises OSError."""
    data = bytearray(_SETS.size)
    libc.syscall(SYS_CAPGET, bytearray(_HEADER), data)
    _, permitted, inheritable, _, permitted2, inheritable2 = _SETS.unpack(data)
    without = _SETS.pack(0, permitted, inheritable, 0, permitted2, inheritable2)
    libc.syscall(SYS_CAPSET, bytearray(_HEADER), without)
    try:
        yield
    finally:
        libc.syscall(SYS_CAPSET, bytearray(_HEADER), data)


def unshare(flags: int) -> None:
    """Have namespaces of this thread's own, CLONE_NEW* `flags`. Raises OSError."""
    libc.syscall(SYS_UNSHARE, flags)
