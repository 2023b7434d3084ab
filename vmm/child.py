"""The one launcher of helper programs: passt, virtiofsd, qemu-storage-daemon, the uffd handler.

A helper gets what its Confinement says and no more (vmm.sandbox.helper): files, capabilities,
system calls, a few names of the environment.

A helper ends when this process does, however this process ends: a shell beside the helper waits for
the end of a pipe, which the kernel closes with this process, and ends the helper then.
(PR_SET_PDEATHSIG would tell of the death of the thread that started it, not of the process.) The
helper begins only once that shell is there: there is no moment in which our end would leave it
behind. A helper that ends with its socket's other end, as passt does, needs no such shell.

A helper has its own session (Ctrl-C on the terminal is for the machine), no descriptors but those
it is given, no signal blocked or ignored, and a bounded place for what it says.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from _thread import RLock, start_new_thread
from _weakrefset import WeakSet
from contextlib import suppress

from vmm import descriptors
from vmm.errors import HostError
from vmm.forked import drop_in_child
from vmm.guest_text import visible
from vmm.sandbox import landlock
from vmm.sandbox.cgroup import Cgroup
from vmm.sandbox.helper import RUN, Confinement, loader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SHELL = "/bin/sh"
_MFD_EXEC = 0x10
"""memfd_create(2): programs may be run from it (Linux 6.3)."""
_STARTER = 'read -r _ && exec "$@" </dev/null'
_RMDIR, _SLEEP = "/bin/rmdir", "/bin/sleep"
_KEEPER = (
    'read -r _; kill -s TERM "$1"; kill -s CONT -- "-$1"; n=0; while kill -s 0 "$1"; do '
    f'[ $((n += 1)) -lt 50 ] || {{ kill -s KILL "$1"; break; }}; {_SLEEP} 0.1 || break; done'
)
"""SIGCONT has a helper that somebody stopped take its SIGTERM, and what it has started see its end.
One that ignores its signal is killed when it has had GRACE seconds."""
_REMOVER = (
    'read -r _ || { kill -s TERM "$1"; kill -s CONT -- "-$1"; }; read -r _; n=0; '
    f'gone() {{ until {_RMDIR} "$2"; do [ $((n += 1)) -lt $1 ] || return 1; done; }}; '
    'gone 100 "$2" || { echo 1 >"$2/cgroup.kill"; gone 1000 "$2"; }'
)
"""The keeper's where there is a cgroup: it is left when this process has ended, or has said a line
and then ended the helper. Whoever is in it has some tenths of a second to end."""
SAID_MAX = 1 << 16
"""Bytes kept of a helper's output: what it writes after them is refused (EPERM)."""
_DEFAULT = tuple(
    getattr(signal, f"SIG{name}") for name in ("PIPE", "XFSZ", "INT", "QUIT", "TERM", "HUP", "CHLD")
)
"""Signals that this process may ignore and a helper does not."""
GRACE = 5.0
"""Seconds a program has to end when it is told to: qemu-storage-daemon writes its tables then."""
PATIENCE = 0.6
"""Seconds of those that `Child.close` waits itself."""
PATIENCE_AFTER = 0.05
"""Seconds that it waits right after a program that did not end in PATIENCE: a machine may have many
such programs, and is closed within a second all the same."""
_gave_up = float("-inf")
"""When `Child.close` last left a program to a thread (time.monotonic)."""


def find(name: str, package: str, *elsewhere: str) -> str:
    """The path of program `name`; HostError names the Debian package that has it."""
    from shutil import which

    path = which(name) or next((p for p in elsewhere if os.access(p, os.X_OK)), None)
    if path is None:
        raise HostError(f"{name} is not installed; apt-get install {package}")
    return path


_running: WeakSet[Child] = WeakSet()


def running() -> list[int]:
    """What kill(2) may be given: the processes of helper programs that have not been waited for,
    the groups of processes that each leads (negative), and their keepers."""
    children = [child for child in list(_running) if child.pid]
    keepers = [child._keeper for child in list(_running) if child._keeper]
    return [*(child.pid for child in children), *(-child.pid for child in children), *keepers]


def killed_by(signum: int) -> str:
    """What is said of a process that signal `signum` ended: `was killed by SIGKILL`."""
    try:
        return f"was killed by {signal.Signals(signum).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {signum}"


class Child:
    """A running helper program.

    Args:
        argv: the command; its first word is the program's path.
        confine: what it needs; None: it is this package itself, which has all that this process
            has until it confines itself.
        pass_fds: descriptors it inherits, under their numbers.
        stdout: the descriptor of its standard output, else where `said` looks.
        keeper: have a shell end it when this process ends.
        variables: its environment, without a keeper; None: what `confine` says.
        name: what it is called in messages; empty: as the program is.

    Attributes:
        name: the program's name, for messages.
        pid: its process, 0 once it was waited for.

    Raises:
        HostError: it cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        confine: Confinement | None,
        *,
        pass_fds: Sequence[int] = (),
        stdout: int = -1,
        keeper: bool = True,
        variables: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        self.name = name or os.path.basename(argv[0])
        self.pid = 0
        self._status: int | None = None
        self._keeper = 0
        self._cgroup: Cgroup | None = None
        self._closing = False
        self._lock = RLock()
        """Held while the process is waited for or signalled: its number is its own then."""
        self._life = -1
        """Our end of the pipe that the keeper reads."""
        self._output = os.memfd_create("vmm-child-output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            import fcntl

            os.ftruncate(self._output, SAID_MAX)
            fcntl.fcntl(self._output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
            out = (stdout if stdout >= 0 else self._output, self._output)
            os.stat(argv[0])  # the shell that becomes it would tell its own way
            if confine is not None and os.access(_RMDIR, os.X_OK):
                with suppress(OSError):
                    self._cgroup = Cgroup(self.name)
            if keeper or self._cgroup is not None:  # it is to be there before the helper begins
                self._start_kept(argv, confine, out, pass_fds)
            else:
                null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    self.pid = _spawn(
                        argv[0], argv, confine, (null, *out), pass_fds, variables=variables
                    )
                finally:
                    os.close(null)
        except BaseException as err:
            self.close()
            if isinstance(err, OSError):
                reason = err.strerror
                if err.errno == errno.EMFILE:
                    reason = f"{reason}; see `ulimit -n`"
                raise HostError(f"{self.name} cannot be started: {reason}") from err
            raise
        _running.add(self)
        drop_in_child(self)

    def forked(self) -> None:
        """This is a forked child: the helper, and its end, are the parent's."""
        self.pid = self._keeper = 0
        self._cgroup = None
        if self._life >= 0:
            os.close(self._life)
            self._life = -1

    def _start_kept(
        self,
        argv: Sequence[str],
        confine: Confinement | None,
        out: tuple[int, int],
        pass_fds: Sequence[int],
    ) -> None:
        began, go = os.pipe2(os.O_CLOEXEC)
        starter = -1
        try:
            shell = [_SHELL, "-c", _STARTER, "sh", *argv]
            starter = _copied_shell()
            path = f"/proc/self/fd/{starter}" if starter >= 0 else _SHELL
            self.pid = _spawn(argv[0], shell, confine, (began, *out), pass_fds, through=path)
            self._start_keeper()
            with suppress(BrokenPipeError):  # the shell was killed
                os.write(go, b"go\n")
        finally:
            if starter >= 0:
                os.close(starter)
            os.close(began)
            os.close(go)

    def _start_keeper(self) -> None:
        """Put the helper into its cgroup, and have a shell end it when this process has ended."""
        cgroup = self._cgroup
        script, files, words = _KEEPER, [(_SLEEP, RUN)], [str(self.pid)]
        if cgroup is not None:
            try:
                cgroup.add(self.pid)
            except OSError:  # it has ended already, or processes may not be moved
                cgroup.close()
                cgroup = self._cgroup = None
        if cgroup is not None:
            script = _REMOVER
            words.append(cgroup.path)
            files = [
                (_RMDIR, RUN), (cgroup.path, landlock.WRITE),
                (os.path.dirname(cgroup.path), landlock.REMOVE_DIR),
            ]  # fmt: skip
        life, self._life = os.pipe2(os.O_CLOEXEC)
        try:
            # Without `pass_fds`: a socket's other end must see it close when the program ends.
            shell = [_SHELL, "-c", f"exec 2>/dev/null; {script}", "sh", *words]
            standard = (life, self._output, self._output)
            confine = Confinement(files, signals=True)
            self._keeper = _spawn(_SHELL, shell, confine, standard, ())
        finally:
            os.close(life)

    def text(self) -> str:
        """What it wrote to standard error, the first SAID_MAX bytes of it, each line as
        `vmm.guest_text.visible` has it: an image can choose what qemu-storage-daemon says."""
        if self._output < 0:
            return ""
        data = os.pread(self._output, SAID_MAX, 0)
        lines = data.rstrip(b"\0").decode(errors="replace").split("\n")
        return "\n".join(map(visible, lines))

    def said(self) -> str:
        """The last line it wrote to standard error, or an empty string."""
        lines = [line for line in self.text().split("\n") if line.strip()]
        return lines[-1].strip() if lines else ""

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended; whether it has."""
        with self._lock:
            if self._reap():
                return True
            pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(seconds * 1000)
        finally:
            os.close(pidfd)
        return self._reap()

    def _reap(self) -> bool:
        with self._lock:
            if not self.pid:
                return True
            try:
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    return False
                self._dismiss()  # before its number may be another's
                _, self._status = os.waitpid(self.pid, 0)
            except ChildProcessError:  # somebody waits for all children
                self._dismiss()
            self.pid = 0
            return True

    def _dismiss(self) -> None:
        """Tell the keeper that there is nobody to end."""
        if self._keeper and self._cgroup is not None:
            with suppress(OSError):
                os.write(self._life, b"ended\n")
        elif self._keeper:
            keeper, self._keeper = self._keeper, 0
            _kill(keeper)

    def _signal(self, signum: int, *, group: bool = False) -> None:
        """Signal it, or all of the group that it leads: it has a session of its own."""
        with self._lock, suppress(ProcessLookupError):
            if self.pid:
                os.kill(-self.pid if group else self.pid, signum)

    def how(self) -> str:
        """How it ended, such as `was killed by SIGKILL`; `has ended` where that is not known."""
        if self._status is None:
            return "has ended"
        code = os.waitstatus_to_exitcode(self._status)
        if code >= 0:
            return f"has ended (status {code})"
        return killed_by(-code)

    def close(self, *, patience: float = 0.0, grace: float = 0.0) -> None:
        """End it: SIGTERM, and SIGKILL when it has had its grace. Harmless twice.

        Returns when it has ended, but one that takes longer than `patience` has the rest of its
        grace from a thread, and from its keeper where this process ends first.

        Args:
            patience: seconds to wait for it here; 0: PATIENCE.
            grace: seconds that it has to end; 0: GRACE.
        """
        global _gave_up
        if self._output >= 0:
            os.close(self._output)
            self._output = -1
        if self._closing:
            return
        self._closing = True
        now = time.monotonic()
        if not patience:
            patience = PATIENCE_AFTER if now - _gave_up < PATIENCE else PATIENCE
        grace = max(grace or GRACE, patience)
        if self._life < 0:  # nobody would end it after this process
            grace = patience
        if not self._reap():
            self._signal(signal.SIGTERM)
            with suppress(PermissionError):
                self._signal(signal.SIGCONT, group=True)  # it may be stopped
        if not self.wait(patience):
            _gave_up = time.monotonic()
            if grace > patience:
                with suppress(RuntimeError):  # no thread can be had
                    start_new_thread(self._end, (grace - patience,))
                    return
            self._signal(signal.SIGKILL)
            self.wait(patience)  # longer only for one in the kernel, which has no end to wait for
        self._finish()

    def _end(self, seconds: float) -> None:
        """Wait for its end so long, and then kill it."""
        if not self.wait(seconds):
            self._signal(signal.SIGKILL)
            self.wait(GRACE)
        self._finish()

    def _finish(self) -> None:
        """It has ended: give back what there was for that."""
        with self._lock:
            self._dismiss()
            keeper, self._keeper = self._keeper, 0
            cgroup, self._cgroup = self._cgroup, None
        if self._life >= 0:
            os.close(self._life)
            self._life = -1
        if cgroup is not None:
            if not keeper:
                cgroup.close()
            elif not _wait_briefly(keeper, PATIENCE / 2):  # what the program has started goes on
                start_new_thread(_wait_briefly, (keeper, GRACE))


def _kill(pid: int) -> None:
    """End a shell of ours, and wait for it."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait_briefly(pid: int, seconds: float) -> bool:
    """Whether a shell of ours ends within so many seconds; after GRACE it is ended."""
    with suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(seconds * 1000) and seconds < GRACE:
                return False
        finally:
            os.close(pidfd)
    _kill(pid)
    return True


def _copied_shell() -> int:
    """A descriptor of a copy of the shell: the program that it starts may not run the shell itself,
    nor see this copy. -1: such copies do not run on this host (sysctl vm.memfd_noexec)."""
    try:
        try:
            fd = os.memfd_create("vmm-starter", os.MFD_CLOEXEC | _MFD_EXEC)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            fd = os.memfd_create("vmm-starter", os.MFD_CLOEXEC)
    except PermissionError:
        return -1
    if fd <= 2:  # the standard descriptors' numbers are the program's
        import fcntl

        low, fd = fd, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
    try:
        with open(_SHELL, "rb", buffering=0) as shell:
            while os.sendfile(fd, shell.fileno(), None, 1 << 20):
                pass
    except BaseException:
        os.close(fd)
        raise
    return fd


def _spawn(
    program: str,
    argv: Sequence[str],
    confine: Confinement | None,
    standard: tuple[int, int, int],
    pass_fds: Sequence[int],
    through: str = "",
    variables: Mapping[str, str] | None = None,
) -> int:
    """Start `program`, confined, with these standard descriptors and `pass_fds`; or the program at
    `through`, which becomes it. Raises OSError."""
    import fcntl

    # Where this process has no standard descriptors, ours may have their numbers.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) if fd <= 2 else -1 for fd in standard]
    standard_now = [new if new >= 0 else fd for new, fd in zip(moved, standard, strict=True)]
    actions: list[tuple[int, ...]] = []
    given = set(pass_fds)
    limit = os.sysconf("SC_OPEN_MAX")
    beyond: list[int] = []  # opened before the limit was lowered: posix_spawn refuses to name them
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in given:
            with suppress(OSError):  # listdir's own has gone
                if os.get_inheritable(fd):
                    if fd < limit:
                        actions.append((os.POSIX_SPAWN_CLOSE, fd))
                    else:
                        os.set_inheritable(fd, False)
                        beyond.append(fd)
    actions += [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(standard_now)]
    # A descriptor that is made a copy of itself is inherited (posix_spawn(3)).
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in pass_fds]
    if variables is None:
        variables = os.environ if confine is None else confine.variables()
    more = [(each, RUN) for each in (loader(_SHELL), through) if each] if through else []

    def start() -> int:
        return os.posix_spawn(
            through or program,
            list(argv),
            variables,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=_DEFAULT,
        )

    try:
        pid = start() if confine is None else confine.run(program, start, more)
        descriptors.give_former(pid)
        return pid
    finally:
        for fd in beyond:
            with suppress(OSError):
                os.set_inheritable(fd, True)
        for fd in moved:
            if fd >= 0:
                os.close(fd)
