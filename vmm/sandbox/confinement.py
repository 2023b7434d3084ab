"""A monitor gives up what it no longer needs, all of it at once and for good.

`confine` is called by the thread that builds the machine, while the process has no other: Landlock
and capabilities are a thread's, and those that it starts afterwards inherit them.
"""

from __future__ import annotations

import errno
import os
import sys
import time

from vmm import libc
from vmm.sandbox import landlock, privileges, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vmm.sandbox.broker import Broker

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_KNOWN = ("/proc/self", "/proc/cpuinfo", "/sys/module")
"""What reports and the interpreter may still look at."""
_SITES = ("site-packages", "dist-packages", "lib-dynload", ".zip")
SECCOMP = "seccomp"
PR_SET_PTRACER = 0x59616D61
_OWN_PID, _BROKER_PID = 0x7FFFFFF1, 0x7FFFFFF2
"""As in vmm.sandbox.calls, which is not loaded in every start."""
_MOMENTS = 50


class Lack:
    """Something that this host does not give.

    Attributes:
        what: what is missing.
        why: what refuses it, and what would help.
    """

    def __init__(self, what: str, why: str) -> None:
        self.what = what
        self.why = why

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


def python_files() -> list[tuple[str | int, int]]:
    """Landlock's rules for what an interpreter that goes on importing reads."""
    found = [f"{prefix}/lib" for prefix in {sys.base_prefix, sys.prefix}]
    found += [path for path in _LIBRARIES if not os.path.islink(path)]
    more = [os.path.dirname(os.path.dirname(__file__)), os.path.dirname(os.__file__)]
    more += [path for path in sys.path if path.endswith(_SITES)]
    found += [path for path in more if not path.startswith((*found, "/usr/lib"))]
    rules: list[tuple[str | int, int]] = [(path, landlock.READ) for path in (*found, *_KNOWN)]
    rules.append(("/dev/null", landlock.READ_FILE | landlock.WRITE_FILE))
    rules.append(("/dev/urandom", landlock.READ_FILE))
    return rules


def lacks() -> list[Lack]:
    """What this kernel does not have of what `confine` uses; nothing is given up."""
    found = []
    if not landlock.abi():
        found.append(
            Lack(
                "Landlock",
                "this kernel has none, or it is off; Linux 5.13 and `landlock` in lsm= have it",
            )
        )
    if not seccomp.available():
        found.append(Lack(SECCOMP, "this kernel has no filters (CONFIG_SECCOMP_FILTER)"))
    return found


def confine(
    files: Iterable[tuple[str | int, int]],
    *,
    helpers: Sequence[int] = (),
    threads: Sequence[Callable[[Callable[[], object]], object]] = (),
    broker: Broker | None = None,
    leases: bool = False,
    apart: bool = False,
) -> list[Lack]:
    """Give up everything but what is open, `files`, and what the list of calls has.

    Args:
        files: Landlock's rules, besides Python's own trees.
        helpers: processes that may be signalled.
        broker: does what is not allowed any more, where its policy has it.
        leases: F_SETSIG and F_SETOWN_EX are needed.
        threads: of each thread that is there already, a function that has it call one.
        apart: have mount and network namespaces as well, which cost half a millisecond.

    Returns:
        What could not be had.

    Raises:
        OSError: the kernel refuses what it says it has.
    """
    missing = lacks()
    others = _other_threads(len(threads))
    if others:
        missing.append(
            Lack("Landlock", f"{others} of this process's threads were there before, and have none")
        )
    privileges.no_new_privs()
    missing += _own_namespaces(apart)
    # A program that this process started is outside of the domain, and it is to end it.
    scopes = landlock.SCOPE_ABSTRACT_UNIX | (0 if helpers else landlock.SCOPE_SIGNAL)
    rules = landlock.ruleset([*python_files(), *files], scopes=scopes)
    program = _filter(helpers, broker, leases)
    if broker is not None and not _have(broker):
        missing.append(
            Lack(
                "Landlock and calls by which files are made and sockets connected",
                "what has to be done later is done by this process, for another filter has it "
                "supervised (as in some containers), or Linux is older than 5.14",
            )
        )
        if rules >= 0:
            os.close(rules)
        rules = -1
    for call in threads:
        call(lambda: _give_up(rules))
    _give_up(rules)
    if rules >= 0:
        os.close(rules)
    if not any(lack.what == SECCOMP for lack in missing):
        seccomp.restrict(program, all_threads=True)
    return missing


def _give_up(rules: int) -> None:
    """What is a thread's: in the thread that calls."""
    privileges.no_new_privs()
    privileges.drop_capabilities()
    if rules >= 0:
        landlock.enforce(os.dup(rules))


def _have(broker: Broker) -> bool:
    """Have `broker` be asked from now on; whether it can be."""
    from vmm.sandbox._filters import BROKERED

    policy = broker.policy.pack()
    try:
        libc.syscall(privileges.SYS_PRCTL, PR_SET_PTRACER, broker.pid, 0, 0, 0)
    except OSError as err:  # EINVAL: without Yama everybody of this user may
        if err.errno != errno.EINVAL:
            raise
    try:
        listener = seccomp.restrict(BROKERED, all_threads=True, notify=True)
    except OSError as err:
        if err.errno in (errno.EBUSY, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    broker.arm(listener, policy)
    return True


def _other_threads(known: int) -> int:
    """How many there are beside this one and those `known`; one that has been joined may have a
    moment left."""
    others = 0
    for _ in range(_MOMENTS):
        others = len(os.listdir("/proc/self/task")) - 1 - known
        if not others:
            break
        time.sleep(0.001)
    return others


def _own_namespaces(apart: bool) -> list[Lack]:
    flags = privileges.CLONE_NEWIPC | privileges.CLONE_NEWUTS | privileges.CLONE_NEWCGROUP
    if apart:
        flags |= privileges.CLONE_NEWNS | privileges.CLONE_NEWNET
    try:
        try:
            privileges.unshare(flags)
        except PermissionError:
            if not apart:
                raise
            _own_user_namespace(flags)
    except OSError as err:
        # Landlock and seccomp keep what they would.
        if err.errno in (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSPC, errno.ENOSYS):
            return [Lack("namespaces", f"{err.strerror}; they take root")]
        raise
    return []


def _own_user_namespace(flags: int) -> None:
    """Namespaces of an ordinary user's, who stays who that is. Raises OSError."""
    user, group = os.geteuid(), os.getegid()
    privileges.unshare(privileges.CLONE_NEWUSER | flags)
    for name, text in (
        ("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1"),
    ):  # fmt: skip
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _filter(helpers: Sequence[int], broker: Broker | None, leases: bool) -> bytes:
    from vmm.sandbox import _filters

    pids = {_OWN_PID: os.getpid()}
    if broker is not None:
        pids[_BROKER_PID] = broker.pid
    program: bytes = _filters.MONITOR if broker is None else _filters.BESIDE_BROKER
    if helpers or leases:
        from vmm.sandbox import calls
        from vmm.sandbox.filter_build import beside_broker, monitor, of_helpers

        more = beside_broker(broker.pid, helpers) if broker is not None else of_helpers(helpers)
        if leases:
            known = (*calls.MONITOR["fcntl"][0][2], *calls.LEASE_FCNTL.values())
            more = {**more, "fcntl": ((1, "in", known),)}
        program = monitor(more)
    for stands, pid in pids.items():
        program = program.replace(stands.to_bytes(4, "little"), pid.to_bytes(4, "little"))
    return program
