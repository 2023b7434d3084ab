"""The process that machines' processes are forked from; it has loaded what they need, once.

A program has one zygote (see `nursery`), a fresh interpreter: it has none of the program's memory,
descriptors, threads or environment. It forks when it is asked to, tells how each process ended, and
when the program has gone it kills what is left. It runs no guest and reads nothing of one.
"""

from __future__ import annotations

import array
import gc
import os
import select
import signal
import socket
import struct
from contextlib import suppress

REQUEST = b"F"
DESCRIPTORS = 6
"""What comes with a request: the machine's connection, its stream, the broker's connection, the
status socket, a file for standard error, the working directory."""
BORN = struct.Struct("<i")
"""The answer on the status socket: the process's number, its pidfd beside it; 0: fork failed."""
ENDED = struct.Struct("<i")
"""The last word on the status socket: the process's wait status."""
PR_SET_PDEATHSIG = 1


def main(fd: int) -> None:
    """Serve the program at the other end of socket `fd` until it has gone."""
    from vmm.isolated import server  # with all it needs: each process then has it

    server.preload()
    gc.collect()
    gc.freeze()  # what is loaded stays in pages that all processes share
    requests = socket.socket(fileno=fd)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    children: dict[int, tuple[int, socket.socket]] = {}
    """By pidfd: the process's number, and where its end is told."""
    while True:
        for ready, _ in poll.poll():
            if ready != fd:
                poll.unregister(ready)
                pid, status = children.pop(ready)
                _bury(pid, ready, status)
                continue
            given = _request(requests)
            if given is None:
                for pidfd in children:
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os._exit(0)
            born = _fork(given, requests)
            if born is not None:
                children[born[0]] = born[1:]
                poll.register(born[0], select.POLLIN)


def _request(requests: socket.socket) -> list[int] | None:
    """The descriptors of the next request; None where the program has gone."""
    try:
        data, fds, flags, _ = socket.recv_fds(requests, 1, DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    if data != REQUEST or len(fds) != DESCRIPTORS or flags & socket.MSG_CTRUNC:
        return None
    return fds


def _fork(given: list[int], requests: socket.socket) -> tuple[int, int, socket.socket] | None:
    """Fork; (pidfd, number, status socket), None where that failed."""
    control, stream, grants, status_fd, errors, directory = given
    zygote = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        pid = -1
    if pid == 0:
        _begin(zygote, control, stream, grants, errors, directory)  # does not return
    status = socket.socket(fileno=status_fd)
    for fd in (control, stream, grants, errors, directory):
        os.close(fd)
    if pid < 0:
        with suppress(OSError):
            status.send(BORN.pack(0))
        status.close()
        return None
    pidfd = os.pidfd_open(pid)
    with suppress(OSError):
        status.sendmsg(
            [BORN.pack(pid)],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))],
            socket.MSG_NOSIGNAL,
        )
    return pidfd, pid, status


def _bury(pid: int, pidfd: int, status: socket.socket) -> None:
    _, how = os.waitpid(pid, 0)
    os.close(pidfd)
    with suppress(OSError):
        status.send(ENDED.pack(how), socket.MSG_NOSIGNAL)
    status.close()


def _begin(
    zygote: int, control: int, stream: int, grants: int, errors: int, directory: int
) -> None:
    """In the new process: keep what was given, nothing else, and serve a machine."""
    status = 1
    try:
        from vmm import libc

        libc.syscall(157, PR_SET_PDEATHSIG, signal.SIGKILL)  # prctl: it ends with the zygote
        if os.getppid() != zygote:
            os._exit(1)
        os.setsid()
        os.fchdir(directory)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        kept = {control, stream, grants}
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in kept:
                with suppress(OSError):  # listdir's own
                    os.close(int(name))
        from vmm.isolated import server

        server.serve(control, stream, grants)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(OSError):
            import sys

            sys.stderr.flush()
        os._exit(status)
