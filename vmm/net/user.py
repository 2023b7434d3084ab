"""`--net user`: the host's network without privileges, through a passt of our own.

passt (https://passt.top) is our child at the other end of a socketpair: nothing is in a file
system, and it ends with its last client, however we end. The guest gets the host's addresses by
DHCP. The host's loopback is out of its reach (vmm.net.loopback), unless `host-loopback=on` has it
reached at the gateway's address.
"""

from __future__ import annotations

import os
import select
import time
from _socket import AF_UNIX, SOCK_STREAM, socket, socketpair

from vmm.child import Child
from vmm.errors import HostError, UsageError
from vmm.net.loopback import HEAD, Guard, gateways, local_resolver
from vmm.net.port import collect
from vmm.net.stream import StreamBackend, StreamPort
from vmm.sandbox.helper import Confinement
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
END_WITHIN = 0.2
ENDS_WITHIN = 0.5
"""Seconds that a passt which has hung up has to end, for how it did to be told."""
PORT_WITHIN = 1.0
"""Seconds to wait for a port in use."""
_DATA_VALID = n.HEADER.pack(n.HDR_F_DATA_VALID, n.HDR_GSO_NONE, 0, 0, 0, 0, 0)
"""passt has made the checksum, and what it came through does not damage frames."""

CAP_SETGID, CAP_SETUID, CAP_NET_BIND_SERVICE = 6, 7, 10
_CONFINEMENT = Confinement(
    None, keep=(CAP_SETGID, CAP_SETUID, CAP_NET_BIND_SERVICE), sockets=True, tcp=True
)
"""passt goes to an empty root of its own, under a seccomp filter of its own, before it looks at
what the guest sends. As root it becomes nobody; the last capability is for ports below 1024."""


class _PortInUse(UsageError):
    """passt could not bind a port of the host's."""


class PasstPort(StreamPort):
    """Frames to and from passt; those that `guard` refuses are dropped."""

    guard: Guard

    def write(self, views: Sequence[memoryview]) -> bool:
        # A copy of what is looked at goes to passt: the guest can change its memory at any time.
        start = n.HEADER_SIZE + HEAD
        first = views[0]
        if len(first) >= start:
            head = bytes(first[n.HEADER_SIZE : start])
        else:
            head = bytes(collect(views, start)[n.HEADER_SIZE :])
        if self.guard.refuses(head):
            self.dropped += 1
            return True
        return self.append(head, views, n.HEADER_SIZE + len(head))


class PasstBackend(StreamBackend):
    """A passt child, ready to serve.

    Args:
        forward: (protocol, address, host port, guest port) each: what connects there on the host
            reaches the guest.
        mtu: bytes, 0 for the largest.
        host_loopback: the guest reaches what listens on the host's loopback, at the gateway's
            address and by the loopback's own.

    Raises:
        HostError, UsageError: passt is missing, or does not start; one line says why.
    """

    # It does not look at the guest's checksums, and what it gives has right ones.
    features = bits(n.F_CSUM, n.F_GUEST_CSUM)

    def __init__(
        self,
        forward: Sequence[tuple[str, str, int, int]] = (),
        *,
        mtu: int = 0,
        host_loopback: bool = False,
    ) -> None:
        program, limit = _find(PROGRAM), time.monotonic() + PORT_WITHIN
        mapped = local_resolver()
        self._guard = None if host_loopback else Guard(gateways() if mapped else frozenset())
        words = [] if host_loopback or mapped else ["--no-map-gw"]
        while True:
            try:
                self._start(program, forward, mtu, words)
                return
            except _PortInUse:
                # A killed monitor's passt may be about to end, and lets its ports go then.
                if time.monotonic() > limit:
                    raise
                time.sleep(0.05)

    def _start(
        self,
        program: str,
        forward: Sequence[tuple[str, str, int, int]],
        mtu: int,
        more: list[str],
    ) -> None:
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        try:
            words = [*more, *_arguments(forward, mtu, theirs)]
            child, ready = _spawn(program, theirs.fileno(), words)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._child = child
        port = StreamPort(ours, _DATA_VALID)
        if self._guard is not None:
            port = PasstPort(ours, _DATA_VALID)
            port.guard = self._guard
        super().__init__(ours, mtu=mtu or MTU, peer=f"passt ({child.pid})", port=port)
        try:
            _wait_ready(ready, child, forward)
            self._greeting = len(child.text())
        except BaseException:
            self.close()
            raise
        finally:
            os.close(ready)

    @property
    def pid(self) -> int:
        """passt's process; 0 when it has ended and that was seen."""
        return self._child.pid

    def why_gone(self) -> str:
        if not self._child.wait(ENDS_WITHIN):
            return super().why_gone()
        said = _complaint(self._child.text()[self._greeting :], "")
        return f"it {self._child.how()}" + (f" ({said})" if said else "")

    def close(self) -> None:
        super().close()
        self._child.wait(END_WITHIN)  # it has lost its client
        self._child.close()


def _find(program: str) -> str:
    from shutil import which

    found = which(program)
    if found is None:
        raise HostError(
            "--net user: passt is not installed; install it (apt-get install passt), or use "
            "--net tap or --net none"
        )
    return found


def _arguments(forward: Sequence[tuple[str, str, int, int]], mtu: int, sock: socket) -> list[str]:
    # --pid: what it writes there once it is ready. In the foreground it stays our child.
    words = ["--foreground", "--quiet", "--stderr", "--fd", str(sock.fileno())]
    words += ["--pid", "/proc/self/fd/1"]
    if mtu:
        words += ["--mtu", str(mtu)]
    for protocol, address, host, guest in forward:
        words += [f"--{protocol}-ports", f"{address}/{host}:{guest}"]
    return words


def _spawn(program: str, sock: int, arguments: list[str]) -> tuple[Child, int]:
    """Start passt: its process, and a descriptor that tells when it is ready."""
    ready, told = os.pipe2(os.O_CLOEXEC)
    try:
        os.fchmod(told, 0o666)  # as root it becomes nobody before it opens it
        child = Child(
            [program, *arguments], _CONFINEMENT, pass_fds=[sock], stdout=told, keeper=False
        )
    except HostError as err:
        os.close(ready)
        raise HostError(f"--net user: {err}") from err
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(told)
    return child, ready


def _wait_ready(ready: int, child: Child, forward: Sequence[tuple[str, str, int, int]]) -> None:
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    if not poll.poll(START_WITHIN * 1000):
        raise HostError(f"--net user: passt was not ready within {START_WITHIN:g} s")
    if os.read(ready, 64):
        return
    said = _complaint(child.text())
    if forward and "bind" in said:
        raise _PortInUse(f"--net user: forward: passt: {said}; is the port in use, or below 1024?")
    raise HostError(f"--net user: passt: {said}")


def _complaint(text: str, otherwise: str = "it ended without a word") -> str:
    """The line that says why passt ended."""
    noise = ("Failed to send", "No routable interface", "Don't run as root", "UNIX domain socket")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(noise)]
    return lines[-1] if lines else otherwise
