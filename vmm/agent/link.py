"""The way to the agent of one machine: whether it is there, and connections to it.

The agent listens on a port of the guest's socket device, and calls the host when it does; that
connection stays, so its end tells that the agent, the device or the guest has gone. Both ports are
below 1024: in the guest only root can pretend to be the agent.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from contextlib import suppress

from vmm.agent import wire
from vmm.errors import AgentError
from vmm.guest_text import visible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.virtio.vsock import Vsock

PORT, HELLO_PORT = 901, 902
CID = 3
"""Of a guest that has the device for the agent's sake only."""
BOOT_WITHIN = 300.0
"""Seconds a guest has from the first call to its agent's answer; an emulated host needs them."""
LOOK = 0.5
"""Seconds between looks at what the agent has said on the console."""
COMPLAINT = b"vmm-agent: cannot"


class Link:
    """Connections to the agent behind `device`; all methods from any thread.

    Args:
        device: the socket device.
        console: the last of the guest's console.
    """

    def __init__(self, device: Vsock, console: Callable[[], bytes]) -> None:
        self._device = device
        self._console = console
        self._changed = threading.Condition()
        self._hello: socket.socket | None = None
        self._ready = False
        self._seeded = False
        self._wrong: AgentError | None = None
        self._ended = ""
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._waiters: list[Callable[[], object]] = []
        device.host.bind(PORT, self._called)

    # --- the agent's call, on the device's loop ---------------------------------------------------

    def _called(self, sock: socket.socket, guest_port: int) -> None:
        if guest_port != HELLO_PORT:
            sock.close()
            return
        self._hang_up()
        sock.setblocking(False)
        self._hello = sock
        self._device.watch(sock.fileno(), self._hear)

    def _hear(self) -> None:
        sock = self._hello
        if sock is None:
            return
        try:
            data = sock.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            return
        if self._ready:
            return  # it has nothing more to say
        try:
            if len(data) != wire.HELLO.size:
                raise AgentError(f"the guest's agent says {len(data)} bytes for a greeting")
            wire.check_hello(data)
        except AgentError as err:
            self._hang_up(err)
            return
        if not self._seeded:
            # Before the first connection, so that copies of one machine draw numbers of their own;
            # not after a rollback, which is the same machine. 32 bytes fit an empty socket.
            self._seeded = True
            with suppress(OSError):
                sock.send(os.urandom(wire.SEED))
        # The loop passes the seed on before a timer that is due: the agent has it before the
        # connections of whoever waits here.
        if not self._device.later(0, self._answered):
            self._answered()

    def _answered(self) -> None:
        if self._hello is None:
            return
        with self._changed:
            self._ready = True
            self._wrong = None
            self._tell()

    def _hang_up(self, wrong: AgentError | None = None) -> None:
        sock, self._hello = self._hello, None
        if sock is not None:
            self._device.watch(sock.fileno(), None)
            sock.close()
        with self._changed:
            self._ready = False
            self._wrong = wrong
            if wrong is not None:
                self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    # --- the machine ------------------------------------------------------------------------------

    def end(self, why: str) -> None:
        """The machine has ended: nothing waits for its agent any more."""
        with self._changed:
            self._ended = self._ended or why
            self._ready = False
            sockets = list(self._sockets)
            self._tell()
        for sock in sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give back the agent's call; once the device is closed, and its loop ended."""
        sock, self._hello = self._hello, None
        if sock is not None:
            sock.close()

    def revive(self) -> None:
        """The machine has not ended after all; the agent calls again where its call was cut."""
        with self._changed:
            self._ended = ""
            self._ready = self._hello is not None

    def cut(self) -> None:
        """The guest is at another point of its life: its agent is there once it calls again."""
        with self._changed:
            self._ready = False

    # --- for commands -----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the agent is there; AgentError where it never will be."""
        with self._changed:
            if self._ended:
                raise AgentError(f"the machine ended before its agent answered: {self._ended}")
            if self._wrong is not None:
                raise self._wrong
            if self._ready:
                return True
        said = self._console()
        at = said.rfind(COMPLAINT)
        if at >= 0:
            line = said[at:].split(b"\n", 1)[0].decode("utf-8", "replace").strip()
            raise AgentError(f"the guest's agent does not run: {visible(line)}")
        return False

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the agent is there.

        Raises:
            AgentError: it will not be, or was not within `timeout` (or BOOT_WITHIN) seconds.
        """
        limit = BOOT_WITHIN if timeout is None else timeout
        until = time.monotonic() + limit
        while not self.ready:
            left = until - time.monotonic()
            if left <= 0:
                raise self.late(limit)
            with self._changed:
                if not (self._ready or self._ended or self._wrong):
                    self._changed.wait(min(left, LOOK))

    def late(self, limit: float) -> AgentError:
        """That the agent did not answer in time, with what may help."""
        lines = self._console().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return AgentError(
            f"the guest's agent has not answered within {limit:g} s; last on the console: "
            f"{visible(last)}"
        )

    def when_ready(self, function: Callable[[], object]) -> None:
        """Have `function` called, from some thread, when `ready` may have changed."""
        with self._changed:
            self._waiters.append(function)

    def connect(self) -> socket.socket:
        """A connection to the agent, which is there; it ends with the machine."""
        sock = self._device.host.dial(PORT)
        with self._changed:
            self._sockets.add(sock)
            ended = self._ended
        if ended:
            sock.close()
            raise AgentError(f"the machine has ended: {ended}")
        return sock

    def power_off(self) -> None:
        """Have the agent power the guest off, if it is there; does not wait for it."""
        with self._changed:
            if not self._ready:
                return
        with suppress(AgentError, OSError), self.connect() as sock:
            sock.sendall(wire.request(wire.POWER_OFF, ["/"]))

    def why_lost(self) -> str:
        """Why a connection has ended."""
        if self._ended:
            return f"the machine ended: {self._ended}"
        return "the connection to the guest's agent is lost"
