"""The program's side of the zygote: start it, have it fork, know how a machine's process ended.

There is one zygote at a time. It was started with the program's user, namespaces and limits as they
were; where those have changed since, the next machine gets a zygote of its own kind. A zygote ends
when its socket's other end does, that is with the program, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
from _thread import allocate_lock
from contextlib import suppress

from vmm.child import SAID_MAX, Child, killed_by
from vmm.errors import HostError
from vmm.forked import drop_in_child
from vmm.isolated import wire
from vmm.isolated.zygote import BORN, ENDED, REQUEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

BORN_WITHIN = 120.0
"""Seconds in which a process is there; the first one waits for the zygote to load its modules."""
NAMESPACES = ("mnt", "net", "user", "pid", "ipc", "uts", "cgroup")
ENVIRONMENT = (
    "PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME",
    "XDG_RUNTIME_DIR", "LD_LIBRARY_PATH", "QEMU_MODULE_DIR", "CC",
)  # fmt: skip
"""Names of variables that caches and helper programs look at; LC_* and VMM_* besides."""
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from vmm.isolated.zygote import main; main(int(sys.argv[1]))"
)


class Process:
    """The process of one machine.

    Attributes:
        pid: its number.
        control: the connection on which it is told what machine to make, and of other connections.
        stream: where its events and console output come.
        grants: the connection to its broker, see `vmm.isolated.grants`.
        status: can be read once it has ended.

    Raises:
        HostError: it cannot be started.
    """

    def __init__(
        self,
        control: wire.Channel,
        stream: wire.Channel,
        grants: wire.Channel,
        status: socket.socket,
    ) -> None:
        self.control = control
        self.stream = stream
        self.grants = grants
        self.status = status
        self.pid = 0
        self._pidfd = -1
        self._how: int | None = None
        self._killed = False
        self._gone = False
        self._lock = allocate_lock()
        self._errors = -1
        drop_in_child(self)

    def forked(self) -> None:
        """This is a forked child: the process is the parent's."""
        fds = [self._pidfd, self._errors]
        self._pidfd = self._errors = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        for sock in (self.control.sock, self.stream.sock, self.grants.sock, self.status):
            sock.close()

    def born(self, errors: int) -> None:
        """Wait until it is there; `errors` is the file of its standard error."""
        self._errors = errors
        poll = select.poll()
        poll.register(self.status, select.POLLIN)
        poll.poll(BORN_WITHIN * 1000)
        try:
            data, fds, _, _ = socket.recv_fds(
                self.status, BORN.size, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, fds = b"", []
        if len(data) == BORN.size and len(fds) == 1:
            (self.pid,) = BORN.unpack(data)
            self._pidfd = fds[0]
        else:
            wire.close_all(fds)
        if not self.pid:
            raise HostError("the process of the machine cannot be started; see `ulimit -u`")

    def kill(self) -> None:
        """Kill it, whatever it does; harmless where it has ended."""
        with self._lock:
            if self._pidfd >= 0 and not self._gone:
                self._killed = True
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended; whether it has."""
        if self._gone or self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
        self._gone = True
        # The zygote has been woken by the same end, and tells it.
        with suppress(OSError):
            poll = select.poll()
            poll.register(self.status, select.POLLIN)
            if poll.poll(1000):
                data = self.status.recv(ENDED.size, socket.MSG_DONTWAIT)
                if len(data) == ENDED.size:
                    (self._how,) = ENDED.unpack(data)
        return True

    def how(self) -> str:
        """How it ended, in words: `was killed by SIGKILL`, `has ended with status 1`."""
        if self._how is None:
            return "has ended"
        code = os.waitstatus_to_exitcode(self._how)
        if code >= 0:
            return f"has ended with status {code}"
        return killed_by(-code)

    @property
    def was_killed(self) -> bool:
        """Whether `kill` was called while it was there."""
        return self._killed

    def said(self) -> str:
        """What it wrote to standard error, the first SAID_MAX bytes of it."""
        if self._errors < 0:
            return ""
        data = os.pread(self._errors, SAID_MAX, 0)
        return data.rstrip(b"\0").decode(errors="replace")

    def close(self) -> None:
        """Kill it if it has not ended, and let go of it. Harmless twice."""
        self.kill()
        self.wait(1.0)
        self.control.close()
        self.stream.close()
        self.grants.close()
        self.status.close()
        with self._lock:
            fds, self._pidfd, self._errors = [self._pidfd, self._errors], -1, -1
        wire.close_all([fd for fd in fds if fd >= 0])
        _leave(self)


class _Zygote:
    """A running zygote, and what it was started with."""

    def __init__(self, kind: object) -> None:
        self.kind = kind
        self.processes: set[int] = set()
        """The machines' processes that are there, by id()."""
        if not sys.executable:
            raise HostError("isolate: this program has no sys.executable to start a process with")
        ours, theirs = wire.pair()
        path = json.dumps([os.path.abspath(each) for each in sys.path])
        try:
            self.child = Child(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, str(theirs.fileno()), path],
                None,
                pass_fds=(theirs.fileno(),),
                keeper=False,
                variables=_variables(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.sock = ours
        drop_in_child(ours)

    def fork(self, fds: Sequence[int]) -> bool:
        """Ask for a process that gets `fds`; False where the zygote has gone."""
        try:
            socket.send_fds(self.sock, [REQUEST], fds)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End it, and the processes it has forked with it."""
        self.sock.close()
        self.child.wait(1.0)
        self.child.close()


_lock = allocate_lock()
_zygotes: list[_Zygote] = []
"""The one in use last; those before it still have machines."""


def start() -> Process:
    """A new process for a machine. Raises HostError."""
    for last in (False, True):
        process = _start()
        if process is not None:
            return process
        if last:
            break
    raise HostError("the process that machines' processes are forked from does not start")


def _start() -> Process | None:
    made: list[socket.socket] = []
    fds: list[int] = []
    try:
        for _ in range(4):
            made += wire.pair()
        for sock in made[::2]:
            drop_in_child(sock)
        errors = os.memfd_create("vmm-machine-errors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fds.append(errors)
        os.ftruncate(errors, SAID_MAX)
        fcntl.fcntl(errors, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        fds.append(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        control, stream, grants = (wire.Channel(sock) for sock in made[:6:2])
        process = Process(control, stream, grants, made[6])
        with _lock:
            zygote = _current()
            asked = zygote.fork([*(sock.fileno() for sock in made[1::2]), *fds])
            if asked:
                zygote.processes.add(id(process))
            else:
                _zygotes.remove(zygote)
        if not asked:
            zygote.close()
            for sock in made[::2]:
                sock.close()
            return None
        try:
            process.born(os.dup(errors))
        except BaseException:
            said = zygote.child.said()
            process.close()
            if said:
                raise HostError(f"isolate: {said}") from None
            raise
        return process
    finally:
        for sock in made[1::2]:
            sock.close()
        wire.close_all(fds)


def _current() -> _Zygote:
    """The zygote for what this thread is now; `_lock` is held."""
    kind = _kind()
    for zygote in _zygotes:
        if zygote.kind == kind:
            return zygote
    zygote = _Zygote(kind)
    _zygotes.append(zygote)
    for old in [each for each in _zygotes if each is not zygote and not each.processes]:
        _zygotes.remove(old)
        old.close()
    return zygote


def _kind() -> object:
    """What a process has of the thread that starts it, and keeps: user, namespaces, limits."""
    import resource

    names = [os.stat(f"/proc/thread-self/ns/{name}").st_ino for name in NAMESPACES]
    limits = [
        resource.getrlimit(number)
        for number in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
    ]
    root = os.stat("/")
    return (
        os.getresuid(), os.getresgid(), tuple(os.getgroups()), names, limits,
        (root.st_dev, root.st_ino), sys.executable, tuple(sys.path), _variables(),
    )  # fmt: skip


def _variables() -> dict[str, str]:
    """What of the program's environment a machine's process has: nothing that may be a secret."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in ENVIRONMENT or name.startswith(("LC_", "VMM_"))
    }


def _leave(process: Process) -> None:
    """`process` is closed; a zygote of a former kind ends with its last one."""
    ended = []
    with _lock:
        for zygote in _zygotes:
            zygote.processes.discard(id(process))
        for zygote in _zygotes[:-1]:
            if not zygote.processes:
                ended.append(zygote)
        for zygote in ended:
            _zygotes.remove(zygote)
    for zygote in ended:
        zygote.close()


def end() -> None:
    """End the zygotes that have no machines; the next machine starts one."""
    with _lock:
        idle = [zygote for zygote in _zygotes if not zygote.processes]
        for zygote in idle:
            _zygotes.remove(zygote)
    for zygote in idle:
        zygote.close()


def _in_child() -> None:
    """After os.fork: the zygotes are the parent's."""
    global _lock
    _lock = allocate_lock()
    for zygote in _zygotes:
        zygote.sock.close()
    _zygotes.clear()


os.register_at_fork(after_in_child=_in_child)
