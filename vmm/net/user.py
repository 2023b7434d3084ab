"""`--net user`: the host's network without privileges, through a passt of our own.

passt (https://passt.top) is our child at the other end of a socketpair: nothing is in a file
system, and it ends with its last client, however we end. The guest gets the host's addresses by
DHCP, and reaches the host itself at the gateway's address.
"""

from __future__ import annotations

import os
import select
import signal
import time
from _socket import AF_UNIX, SOCK_STREAM, socketpair

from vmm.errors import HostError, UsageError
from vmm.net.stream import StreamBackend
from vmm.virtio import net_spec as n
from vmm.virtio.spec import bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "passt"
MTU = 65520
"""passt's own choice: the largest packet that its frames hold, in whole words."""
START_WITHIN = 20.0
"""Seconds."""
END_WITHIN = 2.0
PORT_WITHIN = 1.0
"""Seconds to wait for a port in use."""
_SOCKET_FD = 3
_DATA_VALID = n.HEADER.pack(n.HDR_F_DATA_VALID, n.HDR_GSO_NONE, 0, 0, 0, 0, 0)
"""passt has made the checksum, and what it came through does not damage frames."""


class _PortInUse(UsageError):
    """passt could not bind a port of the host's."""


class PasstBackend(StreamBackend):
    """A passt child, ready to serve.

    Args:
        forward: (protocol, address, host port, guest port) each: what connects there on the host
            reaches the guest.
        mtu: bytes, 0 for the largest.

    Raises:
        HostError, UsageError: passt is missing, or does not start; one line says why.
    """

    # It does not look at the guest's checksums, and what it gives has right ones.
    features = bits(n.F_CSUM, n.F_GUEST_CSUM)

    def __init__(self, forward: Sequence[tuple[str, str, int, int]] = (), *, mtu: int = 0) -> None:
        program, limit = _find(PROGRAM), time.monotonic() + PORT_WITHIN
        while True:
            try:
                self._start(program, forward, mtu)
                return
            except _PortInUse:
                # A killed monitor's passt may be about to end, and lets its ports go then.
                if time.monotonic() > limit:
                    raise
                time.sleep(0.05)

    def _start(self, program: str, forward: Sequence[tuple[str, str, int, int]], mtu: int) -> None:
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        try:
            self.pid, ready, errors = _spawn(program, theirs.fileno(), _arguments(forward, mtu))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        super().__init__(ours, mtu=mtu or MTU, peer=f"passt ({self.pid})")
        self._port.header = _DATA_VALID
        try:
            _wait_ready(ready, errors, forward)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(ready)
            os.close(errors)

    def close(self) -> None:
        super().close()
        pid, self.pid = self.pid, 0
        if pid:
            _end(pid)


def _find(program: str) -> str:
    from shutil import which

    found = which(program)
    if found is None:
        raise HostError(
            "--net user: passt is not installed; install it (apt-get install passt), or use "
            "--net tap or --net none"
        )
    return found


def _arguments(forward: Sequence[tuple[str, str, int, int]], mtu: int) -> list[str]:
    # --pid: what it writes there once it is ready. In the foreground it stays our child.
    words = ["--foreground", "--quiet", "--stderr", "--fd", str(_SOCKET_FD)]
    words += ["--pid", "/proc/self/fd/1"]
    if mtu:
        words += ["--mtu", str(mtu)]
    for protocol, address, host, guest in forward:
        words += [f"--{protocol}-ports", f"{address}/{host}:{guest}"]
    return words


def _spawn(program: str, sock: int, arguments: list[str]) -> tuple[int, int, int]:
    """Start passt: its pid, a descriptor that tells when it is ready, its standard error."""
    ready, told = os.pipe2(os.O_CLOEXEC)
    errors = os.memfd_create("passt-stderr", os.MFD_CLOEXEC)
    try:
        os.fchmod(told, 0o666)  # as root it becomes nobody before it opens it
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, told, 1),
            (os.POSIX_SPAWN_DUP2, errors, 2),
            (os.POSIX_SPAWN_DUP2, sock, _SOCKET_FD),
        ]
        pid = os.posix_spawn(
            program,
            [PROGRAM, *arguments],
            os.environ,
            file_actions=actions,
            setpgroup=0,  # the terminal's Ctrl-C is for us, and the guest, to handle
        )
    except OSError as err:
        os.close(ready)
        os.close(errors)
        raise HostError(f"--net user: {program}: {err.strerror}") from err
    except BaseException:
        os.close(ready)
        os.close(errors)
        raise
    finally:
        os.close(told)
    return pid, ready, errors


def _wait_ready(ready: int, errors: int, forward: Sequence[tuple[str, str, int, int]]) -> None:
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    if not poll.poll(START_WITHIN * 1000):
        raise HostError(f"--net user: passt was not ready within {START_WITHIN:g} s")
    if os.read(ready, 64):
        return
    os.lseek(errors, 0, os.SEEK_SET)
    said = _complaint(os.read(errors, 1 << 16).decode(errors="replace"))
    if forward and "bind" in said:
        raise _PortInUse(f"--net user: forward: passt: {said}; is the port in use, or below 1024?")
    raise HostError(f"--net user: passt: {said}")


def _complaint(text: str) -> str:
    """The line that says why passt ended."""
    noise = ("Failed to send", "No routable interface", "Don't run as root", "UNIX domain socket")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(noise)]
    return lines[-1] if lines else "it ended without a word"


def _end(pid: int) -> None:
    """Wait for passt, which has lost its client; kill it if it takes too long."""
    limit = time.monotonic() + END_WITHIN
    pause = 0.001
    try:
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > limit:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
    except (ChildProcessError, ProcessLookupError):
        pass  # somebody waits for all children
