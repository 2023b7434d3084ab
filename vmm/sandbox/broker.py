"""A process beside a confined monitor that does for it what has to be done later, and no more.

It is forked before the machine is built, with none of its descriptors, and is not confined. When
the monitor gives things up, it hands over its policy (sockets to connect to, sockets of its own to
remove at the end) and a seccomp descriptor, by which the kernel asks this process about each call
that opens, makes, renames or removes a file, or connects a socket. What the policy has is done
here, on copies of the arguments, and the result put into the monitor; all else the kernel does
itself, and finds the monitor's Landlock domain in the way (CONTINUE), or is refused.

Whatever the monitor says after that is said by somebody who may have been taken over. The policy
grows only by what a service in this process lets it do for as long as somebody outside has asked
for it (`Policy.making`).

When the monitor has ended, however that was, this process removes its sockets, and ends.
"""

from __future__ import annotations

import errno
import marshal
import os
import select
import socket
import stat
import struct
import sys
from contextlib import contextmanager, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    Service: TypeAlias = Callable[["Policy", list[int]], Callable[[], object]]
    """Begins to serve, in threads of its own, with the descriptors that `hand_over` named; what it
    returns is called at the end."""

_NOTIF_RECV, _NOTIF_SEND, _NOTIF_ID_VALID, _NOTIF_ADDFD = (
    0xC0502100, 0xC0182101, 0x40082102, 0x40182103,
)  # fmt: skip
_CONTINUE, _ADDFD_SEND = 1, 2
_NOTIFICATION = struct.Struct("<QIIiIQ6Q")
_RESPONSE = struct.Struct("<QqiI")
_ADDITION = struct.Struct("<QIIII")
_SYS_OPENAT2, _SYS_PIDFD_GETFD = 437, 438
_RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x04, 0x08
_AT_FDCWD = -100
_PATH_MAX = 4096
_ADDRESS_MAX = 110
"""Bytes of struct sockaddr_un."""
_POLICY_MAX = 1 << 20
_RUNS_OUT = 5.0
"""Seconds that `close` waits for this process to end by itself."""
_TRUNCATES = os.O_CREAT | os.O_TRUNC | os.O_EXCL | os.O_WRONLY | os.O_RDWR


class Policy:
    """What is done for the monitor.

    Attributes:
        connects: sockets it may connect to.
        prefixes: of sockets it may connect to: PREFIX_N, N a decimal number.
        removes: sockets of its own, and the device and inode number of each.
    """

    def __init__(self) -> None:
        self.connects: set[str] = set()
        self.prefixes: set[str] = set()
        self.removes: dict[str, tuple[int, int]] = {}
        self._making: _Making | None = None
        self._nameless: frozenset[str] = frozenset()

    def pack(self) -> bytes:
        """As bytes, for `read`."""
        return marshal.dumps((self.connects, self.prefixes, self.removes))

    def read(self, data: bytes) -> None:
        """Become what `pack` was called on: by the monitor, before the guest has run."""
        self.connects, self.prefixes, self.removes = marshal.loads(data)

    def __bool__(self) -> bool:
        return bool(self.connects or self.prefixes or self.removes)

    @contextmanager
    def making(self, target: str, reads: list[str]) -> Iterator[None]:
        """For as long as the block, the directory `target`, which is not there yet, may be made,
        and what is below `reads` be read."""
        self._making = _Making(target, reads)
        try:
            yield
        finally:
            self._making = None

    @contextmanager
    def nameless(self, directories: list[str]) -> Iterator[None]:
        """For as long as the block, files without a name may be made in `directories`."""
        self._nameless = frozenset(map(os.path.abspath, directories))
        try:
            yield
        finally:
            self._nameless = frozenset()

    # --- what may be done -------------------------------------------------------------------------

    def may_connect(self, path: str) -> bool:
        """Whether it may connect to the socket `path`."""
        if path in self.connects:
            return True
        prefix, _, number = path.rpartition("_")
        return prefix in self.prefixes and number.isascii() and number.isdecimal()

    def may_open(self, path: str, flags: int) -> str:
        """The directory below which, or the path at which, `path` may be opened so; empty: it may
        not."""
        if flags & os.O_TMPFILE == os.O_TMPFILE and path in self._nameless:
            return path
        return self._making.may_open(path, flags) if self._making is not None else ""

    def may_make(self, path: str) -> bool:
        """Whether the directory `path` may be made."""
        return self._making is not None and self._making.may_make(path)

    def may_rename(self, old: str, new: str) -> bool:
        """Whether `old` may become `new`."""
        return self._making is not None and self._making.may_rename(old, new)

    def may_remove(self, path: str, *, directory: bool) -> bool:
        """Whether what was made at `path` may be removed."""
        return self._making is not None and self._making.may_remove(path, directory=directory)

    def remove_sockets(self) -> None:
        """Remove those that are left, unless others have taken their place."""
        for path in list(self.removes):
            with suppress(OSError):
                self.remove_socket(path)

    def remove_socket(self, path: str) -> None:
        """Remove one of `removes`. Raises OSError."""
        identity = self.removes.pop(path)
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == identity and stat.S_ISSOCK(found.st_mode):
            os.unlink(path)


class _Making:
    """A new directory: it is made under another name beside its place, `.NAME.*.partial`, filled,
    and moved there; directories above it that are missing are made."""

    def __init__(self, target: str, reads: list[str]) -> None:
        self.target = os.path.abspath(target)
        self.parent, name = os.path.split(self.target)
        self._reads = [os.path.abspath(each) for each in reads]
        self._begins = os.path.join(self.parent, f".{name}.")
        self._made: set[str] = set()
        self._partial: set[str] = set()
        self._missing = set()
        above = self.parent
        while not os.path.lexists(above):
            self._missing.add(above)
            above = os.path.dirname(above)

    def may_make(self, path: str) -> bool:
        if self._below(path, self._partial) or path in self._missing:
            self._made.add(path)
            return True
        rest = path.removeprefix(self._begins)
        if rest != path and rest.endswith(".partial") and "/" not in rest:
            self._partial.add(path)
            return True
        return False

    def may_open(self, path: str, flags: int) -> str:
        top = self._below(path, self._partial)
        if top or flags & _TRUNCATES:
            return top
        if path in self._partial or path in (self.target, *self._reads):
            return path
        if path == self.parent and flags & os.O_DIRECTORY:
            return path
        return self._below(path, {self.target, *self._reads})

    def may_rename(self, old: str, new: str) -> bool:
        inside = self._below(old, self._partial) and self._below(new, self._partial)
        return bool(inside) or (
            old in self._partial and new == self.target and not os.path.lexists(new)
        )

    def may_remove(self, path: str, *, directory: bool) -> bool:
        if self._below(path, self._partial):
            return True
        return directory and path in self._partial | self._made

    @staticmethod
    def _below(path: str, tops: set[str]) -> str:
        """The one of `tops` that `path` is below."""
        return next((top for top in tops if path.startswith(top + "/")), "")


class Broker:
    """The monitor's end. To be made while the process has one thread.

    Args:
        service: called in the broker, when the policy is there.

    Attributes:
        pid: its process, 0 once it has ended.
        policy: what it is to do, until `arm` hands it over.

    Raises:
        OSError: there can be no more processes.
    """

    def __init__(self, service: Service | None = None) -> None:
        self.policy = Policy()
        self._fds: list[int] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.pid = os.fork()
        if not self.pid:
            try:
                ours.close()
                _main(theirs, service)
            finally:
                os._exit(0)
        theirs.close()
        self._channel = ours

    def hand_over(self, fd: int) -> None:
        """Have the service get a copy of `fd`, in the order of the calls."""
        self._fds.append(fd)

    def arm(self, listener: int, data: bytes) -> None:
        """Hand over the policy, packed, and the seccomp descriptor `listener`, which is closed
        here. Nothing is loaded or opened for it: the broker does not answer yet."""
        fds = [listener, *self._fds]
        told = struct.pack("<iI", os.getpid(), len(data))
        rights = struct.pack(f"<{len(fds)}i", *fds)
        self._channel.sendmsg([told], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        self._channel.sendall(data)
        os.close(listener)
        self._channel.recv(1)  # it has what it needs of this process

    def close(self) -> None:
        """Have it end, and wait for that. Harmless twice."""
        if not self.pid:
            return
        self._channel.close()
        pid, self.pid = self.pid, 0
        with suppress(ProcessLookupError):  # somebody waits for all children
            pidfd = os.pidfd_open(pid)
            try:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if not poll.poll(_RUNS_OUT * 1000):
                    return
            finally:
                os.close(pidfd)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


# --- in the broker --------------------------------------------------------------------------------


def _main(channel: socket.socket, service: Service | None) -> None:
    # All that is needed, while the machine is built.
    import _signal as signal  # type: ignore[import-not-found]
    import fcntl  # noqa: F401

    from vmm import libc  # noqa: F401
    from vmm.sandbox import numbers  # noqa: F401

    kept = channel.fileno()
    os.setsid()  # the terminal's signals are for the monitor
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    size = struct.calcsize("<iI")
    data, ancillary, _, _ = channel.recvmsg(size, socket.CMSG_SPACE(4 * 16))
    if len(data) < size:
        return  # the machine could not be built
    fds: list[int] = []
    for level, kind, rights in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += struct.unpack(f"<{len(rights) // 4}i", rights)
    monitor, length = struct.unpack("<iI", data)
    text = b""
    while len(text) < min(length, _POLICY_MAX):
        text += channel.recv(length - len(text))
    policy = Policy()
    policy.read(text)
    supervisor = _Supervisor(monitor, fds[0], policy)
    end = service(policy, fds[1:]) if service is not None else None
    channel.send(b".")
    supervisor.serve(channel)
    policy.remove_sockets()
    if end is not None:
        end()


class _Supervisor:
    """Answers the kernel's questions about the calls of process `monitor`."""

    def __init__(self, monitor: int, listener: int, policy: Policy) -> None:
        self._listener = listener
        self._policy = policy
        self._pid = monitor
        self._pidfd = os.pidfd_open(monitor)
        # Of the process, for good: no other process gets to be read by its number.
        self._memory = os.open(f"/proc/{monitor}/mem", os.O_RDONLY | os.O_CLOEXEC)
        from vmm.sandbox.numbers import NUMBERS

        self._calls: dict[int, Callable[[list[int]], int]] = {
            NUMBERS["open"]: lambda a: self._open(a, _AT_FDCWD, *a[0:3]),
            NUMBERS["openat"]: lambda a: self._open(a, *a[0:4]),
            NUMBERS["connect"]: self._connect,
            NUMBERS["mkdir"]: lambda a: self._mkdir(_AT_FDCWD, a[0], a[1]),
            NUMBERS["mkdirat"]: lambda a: self._mkdir(*a[0:3]),
            NUMBERS["rename"]: lambda a: self._rename(_AT_FDCWD, a[0], _AT_FDCWD, a[1], 0),
            NUMBERS["renameat"]: lambda a: self._rename(a[0], a[1], a[2], a[3], 0),
            NUMBERS["renameat2"]: lambda a: self._rename(a[0], a[1], a[2], a[3], a[4]),
            NUMBERS["rmdir"]: lambda a: self._remove(_AT_FDCWD, a[0], directory=True),
            NUMBERS["unlink"]: lambda a: self._remove(_AT_FDCWD, a[0], directory=False),
            NUMBERS["unlinkat"]: lambda a: self._remove(
                a[0], a[1], directory=bool(a[2] & _AT_REMOVEDIR)
            ),
        }

    def serve(self, channel: socket.socket) -> None:
        """Until the monitor has ended, or has closed the channel."""
        import fcntl

        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(channel, 0)
        while True:
            for fd, event in poll.poll():
                if fd != self._listener or event & select.POLLHUP:
                    return
                told = bytearray(_NOTIFICATION.size)
                try:
                    fcntl.ioctl(self._listener, _NOTIF_RECV, told)
                except OSError as err:
                    if err.errno in (errno.ENOENT, errno.EINTR):  # it was interrupted
                        continue
                    raise
                self._number, _, _, call, _, _, *arguments = _NOTIFICATION.unpack(told)
                with suppress(OSError):  # it has ended meanwhile
                    self._answer(call, arguments)

    def _answer(self, call: int, arguments: list[int]) -> None:
        import fcntl

        value = error = 0
        flags = 0
        try:
            value = self._calls[call](arguments)
        except _NotOurs:
            flags = _CONTINUE
        except _Answered:
            return
        except OSError as err:
            error = -(err.errno or errno.EIO)
        except Exception:  # whatever it was told: this process goes on
            error = -errno.EINVAL
        response = _RESPONSE.pack(self._number, value, error, flags)
        fcntl.ioctl(self._listener, _NOTIF_SEND, response)

    # --- arguments --------------------------------------------------------------------------------

    def _path(self, directory: int, address: int) -> str:
        """The absolute path that a call names, without `.` and `..`."""
        path = os.fsdecode(self._string(address, _PATH_MAX))
        return self._absolute(directory, path)

    def _absolute(self, directory: int, path: str) -> str:
        if not path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        for own in ("/proc/self/fd/", "/proc/thread-self/fd/", f"/proc/{self._pid}/fd/"):
            number, slash, rest = path.removeprefix(own).partition("/")
            if path.startswith(own) and number.isdecimal() and slash:
                path = os.path.join(os.readlink(f"/proc/{self._pid}/fd/{number}"), rest)
        if not path.startswith("/"):
            where = "cwd" if _signed(directory) == _AT_FDCWD else f"fd/{_signed(directory)}"
            path = os.path.join(os.readlink(f"/proc/{self._pid}/{where}"), path)
        return os.path.normpath(path)

    def _string(self, address: int, most: int) -> bytes:
        found = b""
        while len(found) < most:
            # Not across the end of a page: the next one may not be there.
            size = min(4096 - (address + len(found)) % 4096, most - len(found))
            piece = os.pread(self._memory, size, address + len(found))
            text, end, _ = piece.partition(b"\0")
            found += text
            if end:
                return found
            if not piece:
                break
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))

    # --- calls ------------------------------------------------------------------------------------

    def _open(self, _: list[int], directory: int, name: int, flags: int, mode: int = 0) -> int:
        path = self._path(directory, name)
        flags &= 0xFFFFFFFF
        top = self._policy.may_open(path, flags)
        if not top:
            raise _NotOurs
        fd = _open_below(top, path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY, mode)
        try:
            self._give(fd, flags & os.O_CLOEXEC)
        finally:
            os.close(fd)
        raise _Answered

    def _give(self, fd: int, flags: int) -> None:
        import fcntl

        fcntl.ioctl(
            self._listener, _NOTIF_ADDFD, _ADDITION.pack(self._number, _ADDFD_SEND, fd, 0, flags)
        )

    def _connect(self, arguments: list[int]) -> int:
        fd, address, size = arguments[0:3]
        if not 2 < size <= _ADDRESS_MAX:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        data = os.pread(self._memory, size, address)
        name = data[2:].partition(b"\0")[0]
        if int.from_bytes(data[:2], sys.byteorder) != socket.AF_UNIX or not name:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        path = self._absolute(_AT_FDCWD, os.fsdecode(name))
        if not self._policy.may_connect(path):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        from vmm import libc

        copy = libc.syscall(_SYS_PIDFD_GETFD, self._pidfd, fd & 0x7FFFFFFF, 0)
        with socket.socket(fileno=copy) as sock:
            if os.get_blocking(copy):
                self._connect_later(socket.socket(fileno=os.dup(copy)), path)
                raise _Answered
            _connect(sock, path)
        return 0

    def _connect_later(self, sock: socket.socket, path: str) -> None:
        """Connect a socket whose connect(2) waits where a listener is slow, in a thread."""
        import fcntl
        import threading

        number = self._number

        def main() -> None:
            error = 0
            try:
                with sock:
                    _connect(sock, path)
            except OSError as err:
                error = -(err.errno or errno.EIO)
            with suppress(OSError):
                fcntl.ioctl(self._listener, _NOTIF_SEND, _RESPONSE.pack(number, 0, error, 0))

        threading.Thread(target=main, daemon=True).start()

    def _mkdir(self, directory: int, name: int, mode: int) -> int:
        path = self._path(directory, name)
        if not self._policy.may_make(path):
            raise _NotOurs
        os.mkdir(path, mode & 0o777)
        return 0

    def _rename(self, old_at: int, old: int, new_at: int, new: int, flags: int) -> int:
        before, after = self._path(old_at, old), self._path(new_at, new)
        if flags or not self._policy.may_rename(before, after):
            raise _NotOurs
        os.rename(before, after)
        return 0

    def _remove(self, at: int, name: int, *, directory: bool) -> int:
        path = self._path(at, name)
        if not directory and path in self._policy.removes:
            self._policy.remove_socket(path)
        elif not self._policy.may_remove(path, directory=directory):
            raise _NotOurs
        elif directory:
            os.rmdir(path)
        else:
            os.unlink(path)
        return 0


_AT_REMOVEDIR = 0x200


class _NotOurs(Exception):
    """The kernel does it, as far as the monitor may."""


class _Answered(Exception):
    """The answer was given, or will be."""


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _open_below(top: str, path: str, flags: int, mode: int) -> int:
    """Open `path`, which is `top` or below it, by no symbolic link there. Raises OSError."""
    if path == top:
        return os.open(path, flags, mode & 0o777)
    from vmm import libc

    directory = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = os.fsencode(os.path.relpath(path, top)) + b"\0"
        # struct open_how: flags, mode (of what is made alone), resolve.
        made = mode & 0o777 if flags & os.O_CREAT else 0
        how = struct.pack("<QQQ", flags, made, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS)
        return libc.syscall(_SYS_OPENAT2, directory, name, how, len(how))
    finally:
        os.close(directory)


def _connect(sock: socket.socket, path: str) -> None:
    if len(os.fsencode(path)) < _ADDRESS_MAX - 2:
        sock.connect(path)
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{fd}/{name}")
    finally:
        os.close(fd)
