"""Whose process listens on a UNIX socket that was connected to.

In a directory that everybody may write to, such as /tmp, another user may put a socket where a
person expects that of a program of theirs. The kernel's rule for links and files there
(fs.protected_symlinks, fs.protected_regular) is kept for sockets here: only this user's, root's and
the directory's owner's are used.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from _socket import SO_PEERCRED, SOL_SOCKET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

_UCRED = struct.Struct("iII")
"""struct ucred: pid, uid, gid."""
_PUBLIC = stat.S_ISVTX | stat.S_IWOTH


def check(sock: socket, path: str) -> None:
    """Raises PermissionError where `sock`, connected to the socket `path`, must not be used."""
    directory = os.stat(os.path.dirname(path) or ".")
    if directory.st_mode & _PUBLIC != _PUBLIC:
        return
    _, uid, _ = _UCRED.unpack(sock.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED.size))
    if uid not in (os.geteuid(), 0, directory.st_uid):
        raise PermissionError(
            errno.EPERM,
            f"user {uid} listens there, in a directory that everybody may write to; have the "
            "socket in a directory of its own",
        )
