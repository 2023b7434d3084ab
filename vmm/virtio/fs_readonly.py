"""A program of its own: runs a command to which a directory, and all mounted below, is read-only.

    python fs_readonly.py DIRECTORY COMMAND ARGUMENT...

For a virtiofsd without --readonly. In a mount namespace of its own the directory is bound to itself
with a read-only attribute (mount_setattr(2), Linux 5.12), which no request of a guest's, nor
virtiofsd without CAP_SYS_ADMIN, as it serves, can change. Needs CAP_SYS_ADMIN to begin with. It is
run as a file and imports nothing of this package.
"""

from __future__ import annotations

import ctypes
import os
import sys

CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 1 << 18
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY = 1
SYS_MOUNT_SETATTR = 442
"""The same number on every architecture."""


def make_readonly(directory: str) -> None:
    """In a new mount namespace of this process. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    path = os.fsencode(directory)
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
    check(libc.mount(path, path, None, ctypes.c_ulong(MS_BIND | MS_REC), None))
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr
    arguments = (AT_FDCWD, path, AT_RECURSIVE, attributes, ctypes.c_size_t(32))
    check(libc.syscall(ctypes.c_long(SYS_MOUNT_SETATTR), *arguments))


def main(arguments: list[str]) -> int:
    directory, command = arguments[0], arguments[1:]
    try:
        make_readonly(directory)
    except OSError as err:
        print(
            f"a read-only mount cannot be made ({err.strerror}); it takes root and Linux 5.12, or "
            "a virtiofsd that has --readonly",
            file=sys.stderr,
        )
        return 1
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
