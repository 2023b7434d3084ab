"""A program of its own: puts a directory where virtiofsd serves it, then becomes virtiofsd.

    python fs_sandbox.py KIND ACCESS DIRECTORY VIRTIOFSD FD

KIND is `c` (QEMU's virtiofsd up to 7.2, written in C) or `rust` (the later one), ACCESS `ro` or
`rw`, then `,suid` or `,dev` or both, FD the listening vhost-user socket.

Without `suid` the guest's root leaves no set-user-ID and set-group-ID files on the host: calls that
would set those bits fail with EPERM, and a write to a file that has them takes them away, as
anybody's does who is not its owner (virtiofsd has no CAP_FSETID then). Without `dev` it leaves no
device nodes but overlayfs's whiteouts (no CAP_MKNOD).

In a mount namespace of its own the directory, with all that is mounted below it, is attached at a
place (PLACES) that is never the root of the namespace: pivot_root(2) refuses that one. Device nodes
do not open there. With `ro` the mounts are read-only (mount_setattr(2), Linux 5.12): no request of
a guest's changes that, nor virtiofsd itself, which serves without CAP_SYS_ADMIN.

A person without CAP_SYS_ADMIN gets a user namespace besides, in which that person's user and group
have their own numbers and everybody else is `nobody`. virtiofsd has every capability there, but
over that person's files only: the host's permissions hold. setgroups(2), setresuid(2) and
setresgid(2) do nothing, and succeed: the namespace has no other identity to change to. So whatever
the guest makes is that person's, and files that their groups may read are read.

Where no mount namespace can be had, what is asked for is served without one if it is safe, else a
line on standard error says what would help. The program is run as a file, and imports nothing of
this package.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import socket
import struct
import sys
from contextlib import suppress

PLACES = ("/mnt", "/media", "/srv", "/tmp", "/home", "/opt")
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
AT_FDCWD, AT_RECURSIVE, AT_EMPTY_PATH = -100, 0x8000, 0x1000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NODEV = 1, 4
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = 1, 4
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442
"""The same numbers on every architecture."""
CAP_SYS_CHROOT, CAP_SYS_ADMIN = 18, 21
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 38, 47, 2
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
SECCOMP_RET_ERRNO, SECCOMP_RET_USER_NOTIF, SECCOMP_RET_ALLOW = 0x50000, 0x7FC00000, 0x7FFF0000
NOTIF_RECV, NOTIF_SEND, NOTIF_ID_VALID, NOTIF_ADDFD = (
    0xC0502100, 0xC0182101, 0x40082102, 0x40182103,
)  # fmt: skip
NOTIF_CONTINUE, NOTIF_ADDFD_SEND = 1, 2
_NOTIFICATION = struct.Struct("<QIIiIQ6Q")
_RESPONSE = struct.Struct("<QqiI")
_ADDITION = struct.Struct("<QIIII")
AUDIT_ARCH_X86_64 = 0xC000003E
SYS_OPENAT, SYS_OPENAT2, SYS_SECCOMP = 257, 437, 317
_TMPFILE = 0o20000000
"""__O_TMPFILE: what os.O_TMPFILE has beside O_DIRECTORY."""
IDENTITY_CALLS = (116, 117, 119)
"""setgroups, setresuid, setresgid; x86-64 has these numbers."""
SET_ID = 0o6000
MODES = ((90, 1), (91, 1), (268, 2), (85, 1), (133, 1), (259, 2))
"""chmod, fchmod, fchmodat, creat, mknod, mknodat, and which of their arguments is a mode."""
CREATING = ((2, 1, 2), (257, 2, 3))
"""open, openat, and which of their arguments are flags and a mode."""
CAP_FSETID, CAP_MKNOD, CAP_SETFCAP = 4, 27, 31
_CAP_VERSION = 0x20080522
_SYSCTL = "/proc/sys/"


class Refused(Exception):
    """This host does not give such a namespace; the text is for a person."""


class _Libc:
    """System calls by the C library; they raise OSError."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def call(self, name: str, *arguments: object) -> int:
        result = int(getattr(self._libc, name)(*arguments))
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def syscall(self, number: int, *arguments: object) -> int:
        return self.call("syscall", ctypes.c_long(number), *arguments)


def _capabilities() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def _sysctl(name: str) -> str:
    with suppress(OSError), open(_SYSCTL + name, encoding="ascii") as file:
        return file.read().strip()
    return ""


def _enter(libc: _Libc, *, privileged: bool) -> None:
    """Enter the namespaces. Raises Refused."""
    user, group = os.geteuid(), os.getegid()
    try:
        libc.call("unshare", CLONE_NEWNS | (0 if privileged else CLONE_NEWUSER))
        if not privileged:
            for name, text in (
                ("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):  # fmt: skip
                with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                    file.write(text)
        libc.call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    except OSError as err:
        raise Refused(_why(err, privileged=privileged)) from err


def _why(err: OSError, *, privileged: bool) -> str:
    """What refused a namespace, and what would help."""
    if err.errno == errno.EINVAL:
        return (
            "this is a chroot, which cannot have mounts of its own; run it outside, or share it "
            "writable"
        )
    if privileged:
        return f"this host gives root no mount namespace ({err.strerror})"
    most = _sysctl("user/max_user_namespaces")
    if _sysctl("kernel/unprivileged_userns_clone") == "0":
        return (
            "user namespaces are switched off on this host; as root: "
            "sysctl kernel.unprivileged_userns_clone=1"
        )
    if most == "0" or err.errno == errno.ENOSPC:
        return (
            f"this host allows {most or 'no more'} user namespaces; as root: "
            "sysctl user.max_user_namespaces=10000"
        )
    if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor keeps user namespaces from programs without a profile; as root: "
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    return (
        f"no user namespace can be had here ({err.strerror}): in a container, give it "
        "--cap-add SYS_ADMIN or --security-opt seccomp=unconfined; in a chroot, run it outside"
    )


def _attach(libc: _Libc, directory: str, program: str, *, readonly: bool) -> str:
    """Attach the directory at a place; that place. Raises Refused."""
    program = os.path.realpath(program)
    place = next(
        (each for each in PLACES if os.path.isdir(each) and not program.startswith(each + "/")), ""
    )
    if not place:
        raise Refused(f"none of {', '.join(PLACES)} is there to mount it at; make one")
    attributes = MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if readonly else 0)
    structure = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # struct mount_attr
    try:
        flags = OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC
        tree = libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(directory), flags)
        libc.syscall(
            SYS_MOUNT_SETATTR, tree, b"", AT_RECURSIVE | AT_EMPTY_PATH, structure,
            ctypes.c_size_t(ctypes.sizeof(structure)),
        )  # fmt: skip
        libc.syscall(
            SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(place), MOVE_MOUNT_F_EMPTY_PATH
        )
        os.close(tree)
    except OSError as err:
        if err.errno == errno.ENOSYS:
            raise Refused("a mount of its own takes Linux 5.12") from err
        if err.errno == errno.EPERM and _sysctl(
            "kernel/apparmor_restrict_unprivileged_userns"
        ) == "1":  # fmt: skip
            raise Refused(_why(err, privileged=False)) from err
        raise Refused(f"it cannot be mounted at a place of its own ({err.strerror})") from err
    return place


def _keep_capabilities(libc: _Libc, without: int) -> None:
    """Keep them across execve(2), which takes them from who is not root (capabilities(7)); but not
    those of the bits `without`."""
    header = ctypes.create_string_buffer(struct.pack("<Ii", _CAP_VERSION, 0), 8)
    data = ctypes.create_string_buffer(24)
    libc.call("capget", header, data)
    _, permitted, _, _, permitted2, _ = struct.unpack("<6I", data.raw)
    kept = (permitted | permitted2 << 32) & ~without
    low, high = kept & 0xFFFFFFFF, kept >> 32
    sets = struct.pack("<6I", low, low, low, high, high, high)
    libc.call("capset", header, ctypes.create_string_buffer(sets, 24))
    for number in range(64):
        if kept >> number & 1:
            libc.call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, ctypes.c_ulong(number), 0, 0)


# --- system calls ---------------------------------------------------------------------------------

_LOAD, _EQUAL, _ANY_SET, _GIVE = 0x20, 0x15, 0x45, 0x06


def _argument(number: int) -> int:
    """Where in struct seccomp_data the lower half of an argument is."""
    return 16 + 8 * number


def _rules(*, identity: bool, notify: bool, suid: bool) -> list[tuple[int, int, int, int]]:
    """The BPF program: for each call that matters, what becomes of it, else the next one."""
    refused = (_GIVE, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM)
    allowed = (_GIVE, 0, 0, SECCOMP_RET_ALLOW)
    done = (_GIVE, 0, 0, SECCOMP_RET_ERRNO)
    calls: list[tuple[int, list[tuple[int, int, int, int]]]] = []
    if identity:
        calls += [(number, [done]) for number in IDENTITY_CALLS]
    if not suid:
        for number, mode in MODES:
            calls.append((number, [
                (_LOAD, 0, 0, _argument(mode)), (_ANY_SET, 0, 1, SET_ID), refused, allowed,
            ]))  # fmt: skip
        # Its mode is in memory, which no filter sees: virtiofsd does without the call then.
        calls.append((SYS_OPENAT2, [(_GIVE, 0, 0, SECCOMP_RET_ERRNO | errno.ENOSYS)]))
    for number, flags, mode in CREATING:
        code = []
        if not suid:
            code += [
                (_LOAD, 0, 0, _argument(flags)), (_ANY_SET, 0, 3, os.O_CREAT | _TMPFILE),
                (_LOAD, 0, 0, _argument(mode)), (_ANY_SET, 0, 1, SET_ID), refused,
            ]  # fmt: skip
        if notify and number == SYS_OPENAT:
            code += [
                (_LOAD, 0, 0, _argument(flags)), (_ANY_SET, 0, 1, os.O_NOATIME),
                (_GIVE, 0, 0, SECCOMP_RET_USER_NOTIF),
            ]  # fmt: skip
        calls.append((number, [*code, allowed]))
    program = [
        (_LOAD, 0, 0, 4),  # struct seccomp_data: arch
        (_EQUAL, 1, 0, AUDIT_ARCH_X86_64), refused,
        (_LOAD, 0, 0, 0),  # nr
    ]  # fmt: skip
    for number, code in calls:
        program += [(_EQUAL, 0, len(code), number), *code]
    return [*program, allowed]


def _filter(libc: _Libc, *, identity: bool, notify: bool, suid: bool) -> int:
    """Have `_rules` hold from now on. IDENTITY_CALLS do nothing then, and succeed, with `identity`;
    with `notify`, openat(2) with O_NOATIME is left to who has the descriptor that this returns
    (seccomp(2), seccomp_unotify(2))."""
    rules = _rules(identity=identity, notify=notify, suid=suid)
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *each) for each in rules))
    filters = ctypes.create_string_buffer(
        struct.pack("<HxxxxxxQ", len(rules), ctypes.addressof(code))
    )
    libc.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER if notify else 0
    return libc.syscall(SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, filters)


def _have_one_identity(libc: _Libc, *, suid: bool) -> None:
    """Have the filter, and a process beside this one that opens what it leaves to it."""
    ours, theirs = socket.socketpair()
    if not os.fork():
        if not os.fork():  # virtiofsd gets no child that it does not know
            status = 1
            try:
                ours.close()
                _, received, _, _ = socket.recv_fds(theirs, 1, 1)
                if received:
                    os.dup2(received[0], 3)
                    os.closerange(4, 1 << 16)  # above all the socket that virtiofsd is to serve
                    _open_without_noatime(3)
                status = 0
            finally:
                os._exit(status)
        os._exit(0)
    os.wait()
    theirs.close()
    with ours:
        try:
            listener = _filter(libc, identity=True, notify=True, suid=suid)
        except OSError:  # another filter of this process's has such a descriptor already
            _filter(libc, identity=True, notify=False, suid=suid)
        else:
            socket.send_fds(ours, [b"."], [listener])
            os.close(listener)


def _open_without_noatime(listener: int) -> None:
    """Open files for virtiofsd, as asked but for O_NOATIME, until it has ended.

    The kernel keeps that flag for a file's owner, and overlayfs in a guest, whose root everybody's
    files belong to, always gives it (ovl_open_realfile() in fs/overlayfs/file.c). All that is
    opened is what virtiofsd has a descriptor for, under the mounts that this is on.
    """
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        if any(event & select.POLLHUP for _, event in poll.poll()):
            return
        told = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, NOTIF_RECV, told)
        except OSError as err:
            if err.errno in (errno.ENOENT, errno.EINTR):  # it was interrupted
                continue
            raise
        number, thread, _, call, _, _, _, path, flags, *_ = _NOTIFICATION.unpack(told)
        with suppress(OSError):  # it has ended meanwhile
            _answer(listener, number, thread, path, flags if call == SYS_OPENAT else os.O_CREAT)


def _answer(listener: int, number: int, thread: int, path: int, flags: int) -> None:
    name = b""
    with suppress(OSError), open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(path)
        name = memory.read(16).partition(b"\0")[0]
    fcntl.ioctl(listener, NOTIF_ID_VALID, struct.pack("<Q", number))  # what was read was its own
    if not name.isdigit() or flags & os.O_CREAT:
        fcntl.ioctl(listener, NOTIF_SEND, _RESPONSE.pack(number, 0, 0, NOTIF_CONTINUE))
        return
    wanted = flags & ~os.O_NOATIME & 0xFFFFFFFF
    try:
        opened = os.open(f"/proc/{thread}/fd/{int(name)}", wanted | os.O_CLOEXEC)
    except OSError as err:
        fcntl.ioctl(listener, NOTIF_SEND, _RESPONSE.pack(number, 0, -(err.errno or 5), 0))
        return
    try:
        added = _ADDITION.pack(number, NOTIF_ADDFD_SEND, opened, 0, wanted & os.O_CLOEXEC)
        fcntl.ioctl(listener, NOTIF_ADDFD, added)
    finally:
        os.close(opened)


def _proc_is_covered() -> bool:
    """Whether something is mounted below /proc: a user namespace gets no proc of its own then, as
    in a container (mount_too_revealing() in fs/namespace.c)."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        places = {line.split()[4] for line in mounts}
    return any(each.startswith("/proc/") for each in places - {"/proc/sys/fs/binfmt_misc"})


def _many_files() -> None:
    """virtiofsd keeps a descriptor for each file that the guest knows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _told_readonly(program: str) -> bool:
    """Whether this virtiofsd has an option for it (1.13)."""
    import subprocess

    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    return "--readonly" in done.stdout + done.stderr


def without(access: str) -> dict[str, int]:
    """The capabilities that `access` leaves out, by the names of virtiofsd's options."""
    words = access.split(",")
    found = {} if "dev" in words else {"mknod": CAP_MKNOD}
    return found if "suid" in words else {**found, "fsetid": CAP_FSETID, "setfcap": CAP_SETFCAP}


def command(kind: str, program: str, place: str, fd: str, sandbox: str, access: str) -> list[str]:
    """The command of a virtiofsd that serves `place`."""
    less = ":".join(f"-{name}" for name in without(access))
    if kind == "c":
        source = place.replace("\\", "\\\\").replace(",", "\\,")
        options = ["-o", f"source={source}", "-o", "log_level=err", "-o", f"sandbox={sandbox}"]
        options += ["-o", f"modcaps={less}"] if less else []
        return [program, *options, f"--fd={fd}"]
    return [
        program, "--shared-dir", place, "--log-level", "error", "--sandbox", sandbox,
        "--rlimit-nofile", "0", *([f"--modcaps={less}"] if less else []), f"--fd={fd}",
    ]  # fmt: skip


def without_namespace(kind: str, access: str, directory: str, program: str, fd: str) -> list[str]:
    """The command where there is no mount namespace; empty: there is no safe one."""
    chroot = bool(_capabilities() >> CAP_SYS_CHROOT & 1) and os.geteuid() == 0
    readonly = access.startswith("ro")
    if readonly and (kind == "c" or not _told_readonly(program)):
        return []
    if kind == "c" and not chroot:
        return []
    found = command(kind, program, directory, fd, "chroot" if chroot else "none", access)
    return [*found, "--readonly"] if readonly else found


def main(arguments: list[str]) -> int:
    kind, access, directory, program, fd = arguments
    _many_files()
    libc = _Libc()
    privileged = bool(_capabilities() >> CAP_SYS_ADMIN & 1)
    if not os.access(directory, os.R_OK | os.X_OK):
        print("this user may not read it", file=sys.stderr)
        return 1
    suid = "suid" in access.split(",")
    filtered = False
    try:
        _enter(libc, privileged=privileged)
        place = _attach(libc, directory, program, readonly=access.startswith("ro"))
        sandbox = "namespace"
        if not privileged:
            _keep_capabilities(libc, sum(1 << number for number in without(access).values()))
            _have_one_identity(libc, suid=suid)
            filtered = True
            if kind == "rust":  # it would make a user namespace of its own
                sandbox = "none"
            elif _proc_is_covered():
                sandbox = "chroot"
        words = command(kind, program, place, fd, sandbox, access)
    except (Refused, OSError) as err:
        words = without_namespace(kind, access, directory, program, fd)
        if not words:
            print(err, file=sys.stderr)
            return 1
    if not filtered and not suid:
        _filter(libc, identity=False, notify=False, suid=False)
    os.execv(program, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
