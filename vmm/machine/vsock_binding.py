"""Functions of the program as servers on vsock ports: the guest connects to CID 2, they answer."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

from vmm.errors import StateError, UsageError
from vmm.events import Stopped
from vmm.virtio.vsock import Vsock
from vmm.virtio.vsock_packet import PORT_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.events import Event
    from vmm.machine.machine import Machine

    Handler = Callable[[socket.socket], object]

CONNECTIONS_MAX = 256
"""Connections of one port at a time; what a guest asks for beyond is closed at once."""
PATIENCE = 0.4
"""Seconds the handlers have to return once their machine is closed; one that does not goes on."""


def device_of(machine: Machine) -> Vsock:
    """The machine's socket device. StateError where it has none."""
    virtio = machine.platform.virtio
    for transport in virtio.transports if virtio is not None else ():
        if isinstance(transport.device, Vsock):
            return transport.device
    raise StateError("bind_vsock: this machine has no socket device; make it with vsock='cid=3'")


def claim(machine: Machine, port: int, serve: Callable[[socket.socket], None]) -> Vsock:
    """Have `serve` called with each connection to `port`, on the device's loop; it must not block.

    Raises:
        StateError: there is no socket device, or the machine has ended.
        UsageError: the port cannot be, or is taken.
    """
    if machine.state in ("stopped", "closed"):
        raise StateError(f"bind_vsock: the machine is {machine.state}, not created or started")
    if machine.isolated:
        return machine.claim_vsock(port, serve)  # type: ignore[attr-defined, no-any-return]
    device = device_of(machine)
    if not 0 <= port <= PORT_MAX:
        raise UsageError(f"bind_vsock: {port} is not a port from 0 to {PORT_MAX}")
    if device.host.is_bound(port):
        raise UsageError(f"bind_vsock: port {port} is bound already")
    device.host.bind(port, lambda sock, guest_port: serve(sock))
    return device


def failed(machine: Machine, port: int, err: Exception) -> None:
    """A handler has raised: that ends the machine, unless only its connection has ended."""
    if isinstance(err, (ConnectionError, EOFError)):
        return
    err.add_note(f"in the function bound to vsock port {port}")
    machine.monitor_failed(err)


class VsockServer:
    """Calls `handler` with each connection's socket in a thread of its own, and closes it then."""

    def __init__(self, machine: Machine, port: int, handler: Handler) -> None:
        self._machine = machine
        self._port = port
        self._handler = handler
        self._threads: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._unbound = self._closed = False
        self._device = claim(machine, port, self._serve)
        self._leave = machine.subscribe(self._stopped, Stopped)
        machine.on_close(self.close)

    def unbind(self) -> None:
        """Take no more connections; those there are stay."""
        with self._lock:
            if not self._unbound:
                self._unbound = True
                self._device.host.bind(self._port, None)

    def close(self) -> None:
        """The machine is closed: wait for the handlers, whose connections have ended."""
        self.unbind()
        self._leave()
        self._closed = True
        self._end()
        until = time.monotonic() + PATIENCE
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(max(until - time.monotonic(), 0))

    def _stopped(self, event: Event) -> None:
        self._end()

    def _end(self) -> None:
        with self._lock:
            for sock in self._threads.values():
                with suppress(OSError):  # it is closed already
                    sock.shutdown(socket.SHUT_RDWR)

    def _serve(self, sock: socket.socket) -> None:
        """On the device's loop."""
        thread = threading.Thread(
            target=self._run, args=(sock,), name=f"vsock-{self._port}", daemon=True
        )
        with self._lock:
            full = self._closed or len(self._threads) >= CONNECTIONS_MAX
            if not full:
                self._threads[thread] = sock
        if full:
            sock.close()
            return
        try:
            thread.start()
        except RuntimeError:  # the host has no more threads for us
            self._forget(thread, sock)

    def _run(self, sock: socket.socket) -> None:
        try:
            self._handler(sock)
        except Exception as err:
            failed(self._machine, self._port, err)
        finally:
            self._forget(threading.current_thread(), sock)

    def _forget(self, thread: threading.Thread, sock: socket.socket) -> None:
        with self._lock:
            self._threads.pop(thread, None)
        sock.close()
