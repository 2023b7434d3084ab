"""Code of an attacker's in the process of `vmm run`: it runs in a vCPU's thread, when the guest
writes to the exit port, as if the monitor had been taken over by what the guest had sent it.

    python -m tests.support.intruder FD FACTS ARGUMENT...    (of vmm)

FACTS is a JSON object: what there is to be attacked, and `probes`, the names of those to be tried.
What became of each is written to FD as a line: name, outcome.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# All of it is loaded before anything is given up: an attacker brings what he needs.
from tests.support.confined import outcome
from vmm import libc
from vmm.devices.debugexit import DebugExit
from vmm.sandbox.numbers import NUMBERS

facts: dict[str, Any] = {}
SECRET, HOME, VICTIM = "secret", "directory", "victim"


def call(name: str, *arguments: Any) -> Callable[[], object]:
    """Make the system call."""
    return lambda: libc.syscall(NUMBERS[name], *arguments)


def path(key: str, more: str = "") -> bytes:
    return os.fsencode(facts[key] + more) + b"\0"


def opened(name: str, flags: int) -> None:
    os.close(os.open(name, flags | os.O_CLOEXEC, 0o600))


def connected(family: int, address: Any, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(family, kind) as sock:
        sock.connect(address)


def spawned() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def forked() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


def kvm_descriptor() -> int:
    """That of /dev/kvm, or of a machine."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "/dev/kvm" in os.readlink(f"/proc/self/fd/{name}"):
                return int(name)
    return -1


def fcntl_owner() -> None:
    import fcntl

    ours, theirs = socket.socketpair()
    with ours, theirs:
        fcntl.fcntl(ours, fcntl.F_SETOWN, facts[VICTIM])


def fds_of_victim() -> None:
    os.listdir(f"/proc/{facts[VICTIM]}/fd")


PROBES: dict[str, Callable[[], object]] = {
    # Files.
    "read a file": lambda: opened(facts[SECRET], os.O_RDONLY),
    "read /etc/passwd": lambda: opened("/etc/passwd", os.O_RDONLY),
    "read the kernel again": lambda: opened(facts["kernel"], os.O_RDONLY),
    "list a directory": lambda: os.listdir(facts[HOME]),
    "write a file": lambda: opened(facts[SECRET], os.O_WRONLY),
    "truncate a file": lambda: os.truncate(facts[SECRET], 0),
    "make a file": lambda: opened(facts[HOME] + "/new", os.O_WRONLY | os.O_CREAT),
    "make a nameless file": lambda: opened(facts[HOME], os.O_WRONLY | os.O_TMPFILE),
    "change Python's own files": lambda: opened(os.__file__, os.O_WRONLY),
    "make a directory": lambda: os.mkdir(facts[HOME] + "/new"),
    "make what looks like a snapshot": lambda: os.mkdir(facts[HOME] + "/.s.x.partial"),
    "remove a file": lambda: os.unlink(facts[SECRET]),
    "rename a file": lambda: os.rename(facts[SECRET], facts[SECRET] + "2"),
    "link a file": lambda: os.link(facts[SECRET], facts[HOME] + "/linked"),
    "make a symbolic link": lambda: os.symlink("/etc/passwd", facts[HOME] + "/link"),
    "make a FIFO": lambda: os.mkfifo(facts[HOME] + "/fifo"),
    "change a file's mode": lambda: os.chmod(facts[SECRET], 0o777),
    "change a file's owner": lambda: os.chown(facts[SECRET], 1, 1),
    "set an attribute": lambda: os.setxattr(facts[SECRET], "user.x", b"y"),
    "change directory": lambda: os.chdir("/"),
    "open /dev/kvm": lambda: opened("/dev/kvm", os.O_RDWR),
    "open /dev/net/tun": lambda: opened("/dev/net/tun", os.O_RDWR),
    "open /dev/mem": lambda: opened("/dev/mem", os.O_RDWR),
    "open a path of 5,000 bytes": lambda: opened("/" + "x/" * 2500, os.O_RDONLY),
    # Peers.
    "connect by TCP": lambda: connected(socket.AF_INET, ("127.0.0.1", facts["tcp"])),
    "send by UDP": lambda: connected(socket.AF_INET, ("127.0.0.1", 9), socket.SOCK_DGRAM),
    "connect by IPv6": lambda: connected(socket.AF_INET6, ("::1", facts["tcp"])),
    "connect a Unix socket": lambda: connected(socket.AF_UNIX, facts["unix"]),
    "connect an abstract socket": lambda: connected(socket.AF_UNIX, facts["abstract"]),
    "send to a Unix socket": lambda: connected(
        socket.AF_UNIX, facts["unix"], socket.SOCK_DGRAM
    ),
    "a pair of datagram sockets": lambda: socket.socketpair(type=socket.SOCK_DGRAM),
    "connect by vsock": lambda: connected(socket.AF_VSOCK, (2, 1)),
    "open a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "open a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "bind a Unix socket": lambda: libc.syscall(
        NUMBERS["bind"], 0, struct.pack("<H108s", 1, path(HOME, "/bound")), 110
    ),
    # Programs and processes.
    "execute a program": lambda: os.execv("/bin/true", ["true"]),
    "spawn a program": spawned,
    "fork": forked,
    "clone3": call("clone3", struct.pack("<11Q", *[0] * 11), 88),
    "signal a process": lambda: os.kill(facts[VICTIM], signal.SIGTERM),
    "signal every process": lambda: os.kill(-1, signal.SIGCONT),
    "signal the parent": lambda: os.kill(os.getppid(), signal.SIGCONT),
    "signal a process by a pidfd": lambda: os.close(os.pidfd_open(facts["victim"])),
    "have signals sent to a process": fcntl_owner,
    "read another's memory": lambda: opened(f"/proc/{facts[VICTIM]}/mem", os.O_RDWR),
    "look at another's descriptors": fds_of_victim,
    "read another's environment": lambda: opened(f"/proc/{facts[VICTIM]}/environ", os.O_RDONLY),
    "limit another": lambda: libc.syscall(
        NUMBERS["prlimit64"], facts[VICTIM], 7, 0, bytearray(16)
    ),
    # The kernel.
    "make another machine": lambda: libc.syscall(NUMBERS["ioctl"], kvm_descriptor(), 0xAE01, 0),
    "type on the terminal": lambda: libc.syscall(NUMBERS["ioctl"], 0, 0x5412, b"x"),
    "memory to write and execute": lambda: mmap.mmap(
        -1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    ).close(),
    "make memory executable": call("mprotect", 0, 4096, 5),
    "become another user": lambda: os.setresuid(1, 1, 1),
    "get capabilities": call(
        "capset", struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *[0xFFFFFFFF] * 6)
    ),
    "set the host's name": lambda: socket.sethostname("taken"),
    "set the clock": call("settimeofday", bytearray(16), 0),
    # Those that end the process.
    "trace a process": call("ptrace", 16, 1, 0, 0),
    "process_vm_readv": call("process_vm_readv", 1, 0, 0, 0, 0, 0),
    "take a descriptor": call("pidfd_getfd", 0, 0, 0),
    "load a program into the kernel": call("bpf", 0, 0, 0),
    "use io_uring": call("io_uring_setup", 1, bytearray(120)),
    "use userfaultfd": call("userfaultfd", 0),
    "use keys": call("keyctl", 0, 0, 0, 0, 0),
    "load a module": call("init_module", 0, 0, 0),
    "load a kernel": call("kexec_load", 0, 0, 0, 0),
    "mount": call("mount", b"none\0", b"/\0", b"tmpfs\0", 0, 0),
    "make namespaces": call("unshare", 0x10000000),
    "join a namespace": call("setns", 0, 0),
    "change the root": call("chroot", b"/\0"),
    "open by a handle": call("open_by_handle_at", 0, 0, 0),
    "count events": call("perf_event_open", 0, 0, 0, 0, 0),
    "ports of the host": call("iopl", 3),
}


def threads() -> list[list[str]]:
    """What /proc says of each thread: seccomp's mode, no_new_privs, capabilities."""
    found = []
    for name in os.listdir("/proc/self/task"):
        lines = Path(f"/proc/self/task/{name}/status").read_text().splitlines()
        said = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        found.append([said[key] for key in ("Seccomp", "NoNewPrivs", "CapEff", "CapBnd")])
    return found


def elsewhere() -> list[str]:
    """What becomes of a probe in each thread that was there before anything was given up."""
    import gc

    from vmm.machine.origin import Origin

    callers = [
        caller for each in gc.get_objects() if isinstance(each, Origin) for caller in each.threads()
    ]
    lease = sys.modules.get("vmm.snapshot.lease")
    if lease is not None and lease._watcher:
        callers.append(lease.in_watcher)
    found: list[str] = []
    for caller in callers:
        caller(lambda: found.append(outcome(PROBES["read a file"])))
    return found


def intrude(fd: int) -> None:
    for name in facts["probes"]:
        result = outcome(PROBES[name])
        os.write(fd, json.dumps([name, result]).encode() + b"\n")
    os.write(fd, json.dumps(["elsewhere", elsewhere()]).encode() + b"\n")
    os.write(fd, json.dumps(["threads", threads()]).encode() + b"\n")


def main(fd: int, words: list[str]) -> int:
    write = DebugExit.write

    def intruded(self: DebugExit, *arguments: Any) -> Any:
        intrude(fd)
        return write(self, *arguments)

    DebugExit.write = intruded  # type: ignore[method-assign]
    from vmm.cli import main as vmm

    return vmm(words)


if __name__ == "__main__":
    facts.update(json.loads(sys.argv[2]))
    sys.exit(main(int(sys.argv[1]), sys.argv[3:]))
