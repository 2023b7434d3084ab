"""Whether this user may make a user namespace and mount in it, found by doing so in a child."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

from vmm.kvm.access import as_root

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
SYSCTLS = (
    # What is on where the value is this, and what to set.
    ("kernel/unprivileged_userns_clone", "0", "1"),
    ("user/max_user_namespaces", "0", "15000"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
)
"""Debian's switch, the kernel's own limit, and Ubuntu's (23.10 and later) for programs that
AppArmor has no profile of. Root is under the second alone."""


def trouble() -> str:
    """Why a user namespace, or a mount in it, cannot be made; empty if both can."""
    libc = ctypes.CDLL(None, use_errno=True)
    ids = f"0 {os.geteuid()} 1", f"0 {os.getegid()} 1"
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, _try(libc, ids).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read(1000).decode("utf-8", "replace")
    os.waitpid(child, 0)
    return "" if said == "ok" else said or "the attempt was killed"


def _try(libc: ctypes.CDLL, ids: tuple[str, str]) -> str:
    """In the child: "ok", or what failed."""
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", ids[0]), ("gid_map", ids[1])):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    except OSError as err:
        return f"{err.filename or name}: {err.strerror}"
    if libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None):
        return f"mount: {os.strerror(ctypes.get_errno())}"
    return "ok"


def limits(root: str = "/proc/sys") -> list[str]:
    """The mends for what this host's settings say against it."""
    mends = []
    for path, bad, good in SYSCTLS:
        try:
            with open(f"{root}/{path}", encoding="ascii") as file:
                value = file.read().strip()
        except OSError:
            continue
        if value == bad:
            mends.append(as_root(f"sysctl {path.replace('/', '.')}={good}"))
    return mends


def subordinate_ids(path: str = "/etc/subuid") -> str:
    """What /etc/subuid gives this user, in words."""
    import pwd

    uid = os.geteuid()
    names = [str(uid)]
    with suppress(KeyError):
        names.append(pwd.getpwuid(uid).pw_name)
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.strip().split(":")
                if len(fields) == 3 and fields[0] in names:
                    return f"{fields[2]} subordinate ids from {fields[1]}"
    except OSError:
        pass
    return "no subordinate ids"
