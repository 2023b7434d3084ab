"""Landlock: a thread gives up every file, port and peer that it does not name (Linux 5.13).

Three system calls: include/uapi/linux/landlock.h. What is already open stays usable, whatever it
is. A kernel handles the rights that its ABI (`abi()`) has; others are left out, so that the same
rules are as strict as each kernel can be.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from vmm import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SYS_CREATE_RULESET, SYS_ADD_RULE, SYS_RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2
_ATTRIBUTES = struct.Struct("<QQQ")
"""struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped."""
_PATH_BENEATH = struct.Struct("<Qi")
_NET_PORT = struct.Struct("<QQ")

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK = 1 << 6, 1 << 7, 1 << 8, 1 << 9
MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = 1 << 10, 1 << 11, 1 << 12
REFER = 1 << 13
"""Link or rename from one directory to another (ABI 2)."""
TRUNCATE = 1 << 14
"""ABI 3."""
IOCTL_DEV = 1 << 15
"""ioctl(2) on a device that is opened from now on (ABI 5)."""

READ = READ_FILE | READ_DIR
WRITE = WRITE_FILE | TRUNCATE
MAKE = MAKE_DIR | MAKE_REG | REMOVE_DIR | REMOVE_FILE
"""Make and remove ordinary files and directories."""

BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1
"""ABI 4."""
SCOPE_ABSTRACT_UNIX, SCOPE_SIGNAL = 1 << 0, 1 << 1
"""No abstract Unix socket, and no signal, of a process outside (ABI 6)."""

_OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""Rights that a rule for something other than a directory may have; the kernel refuses others."""
_FS = ((5, (1 << 16) - 1), (3, (1 << 15) - 1), (2, (1 << 14) - 1), (1, (1 << 13) - 1))
"""ABI, and the rights on files that it has."""
_FS_ATTRIBUTES, _NET_ATTRIBUTES = 8, 16
"""Bytes of the attributes that older ABIs know."""

_abi = -1


def abi() -> int:
    """The kernel's ABI version; 0: it has no Landlock, or it is off (the parameter lsm=)."""
    global _abi
    if _abi < 0:
        try:
            _abi = libc.syscall(SYS_CREATE_RULESET, 0, 0, _VERSION)
        except OSError:  # ENOSYS, EOPNOTSUPP; EPERM in a container whose filter does not know it
            _abi = 0
    return _abi


def handled(version: int) -> int:
    """All rights on files that ABI `version` has."""
    return next((rights for first, rights in _FS if version >= first), 0)


def restrict(
    files: Iterable[tuple[str | int, int]] | None,
    *,
    ports: Iterable[tuple[int, int]] | None = (),
    scopes: int = SCOPE_ABSTRACT_UNIX | SCOPE_SIGNAL,
) -> int:
    """Have this thread, and what it starts from now on, reach nothing but `files` and `ports`.

    The caller has set no_new_privs (privileges.no_new_privs), or CAP_SYS_ADMIN. It holds for this
    thread: do it while the process has one, or in a thread that starts a program and ends.

    Args:
        files: paths, or descriptors, and the rights on each and on what is below it. A path that is
            not there is passed over: there is nothing at it to reach. None: files are not
            restricted (otherwise mounts cannot be made, nor removed).
        ports: TCP ports and BIND_TCP or CONNECT_TCP of each; None: TCP is not restricted.
        scopes: SCOPE_* to keep to this domain.

    Returns:
        The ABI that was there; 0: nothing is restricted.

    Raises:
        OSError: the kernel refuses.
    """
    fd = ruleset(files, ports=ports, scopes=scopes)
    if fd >= 0:
        enforce(fd)
    return abi()


def ruleset(
    files: Iterable[tuple[str | int, int]] | None,
    *,
    ports: Iterable[tuple[int, int]] | None = (),
    scopes: int = SCOPE_ABSTRACT_UNIX | SCOPE_SIGNAL,
) -> int:
    """A descriptor of what `restrict` restricts to, for `enforce`; -1: that is nothing."""
    version = abi()
    if not version:
        return -1
    fs = handled(version) if files is not None else 0
    net = BIND_TCP | CONNECT_TCP if version >= 4 and ports is not None else 0
    size = _ATTRIBUTES.size if version >= 6 else _NET_ATTRIBUTES if version >= 4 else _FS_ATTRIBUTES
    if not fs and not net and not (scopes and version >= 6):
        return -1
    attributes = _ATTRIBUTES.pack(fs, net, scopes)[:size]
    fd = libc.syscall(SYS_CREATE_RULESET, attributes, size, 0)
    try:
        for file, rights in files or ():
            _allow(fd, file, rights & fs)
        for port, rights in (ports or ()) if net else ():
            libc.syscall(SYS_ADD_RULE, fd, _RULE_NET_PORT, _NET_PORT.pack(rights, port), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def enforce(fd: int) -> None:
    """Have this thread be restricted to the ruleset `fd`, which is closed. Raises OSError."""
    try:
        libc.syscall(SYS_RESTRICT_SELF, fd, 0)
    finally:
        os.close(fd)


def _allow(rules: int, file: str | int, rights: int) -> None:
    if isinstance(file, int):
        fd = file
    else:
        try:
            fd = os.open(file, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_A_FILE
        if rights:
            rule = _PATH_BENEATH.pack(rights, fd)
            libc.syscall(SYS_ADD_RULE, rules, _RULE_PATH_BENEATH, rule, 0)
    except OSError as err:
        # EBADFD: no file of a file system (a socket, a pipe, a memfd): it has no path to be
        # reached by.
        if err.errno != errno.EBADFD:
            raise
    finally:
        if fd != file:
            os.close(fd)
