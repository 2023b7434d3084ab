"""The host's side of the socket device: UNIX sockets, as Firecracker and cloud-hypervisor have it.

A program connects to PREFIX, writes `CONNECT port\\n`, reads `OK hostport\\n`, and is connected to
that port of the guest; a connection that is closed instead was refused. A guest that connects to
port P of CID 2 reaches the program that listens on PREFIX_P. This process itself can do both
without a name in the file system: `dial`, and `bind`.
"""

from __future__ import annotations

import socket

from vmm import descriptors
from vmm.errors import UsageError
from vmm.forked import drop_in_child
from vmm.virtio import unix
from vmm.virtio.vsock_packet import OP_RESPONSE, PORT_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.virtio.vsock import Vsock
    from vmm.virtio.vsock_stream import Stream

LINE_MAX = 32
"""Bytes of a client's first line."""
CLIENTS_MAX = 256
"""Clients that have not said it yet. For one more, the one that came first is closed."""
ANSWER_WITHIN = 20.0
"""Seconds a guest has to answer; its driver may still be starting."""
RETRY, RETRY_MAX = 0.02, 0.32
"""Seconds between tries where a listener's backlog is full, or descriptors have run out: twice as
long each time. A guest may have a thousand connections that wait so."""
TRIES = 10
"""Some two seconds' worth."""


class VsockHost:
    """Listens on `path` from construction to `close`; a socket nobody listens on is replaced.

    Without a path only this process reaches the guest, and is reached.

    Raises:
        UsageError: the socket cannot be made there, or another monitor has it.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._clients: dict[socket.socket, bytes] = {}
        self._bound: dict[int, Callable[[socket.socket, int], None]] = {}
        self._direct: set[Stream] = set()
        self._device: Vsock | None = None
        self._listener: socket.socket | None = None
        self._identity = unix.NOBODY
        if path is not None:
            check_path(path)
            self._listener, self._identity = unix.listen(path, f"--vsock path={path}")

    def attach(self, device: Vsock) -> None:
        """Serve `device`."""
        self._device = device

    def start(self) -> None:
        """Take clients: the guest has a driver. On the loop."""
        if self._device is not None and self._listener is not None:
            self._device.watch(self._listener.fileno(), self._accept)

    def stop(self) -> None:
        """Leave clients waiting: the guest's driver is gone."""
        self._direct.clear()
        if self._device is not None and self._listener is not None:
            self._device.watch(self._listener.fileno(), None)
        for sock in list(self._clients):
            self._leave(sock)
            sock.close()

    def close(self) -> None:
        """Remove the socket, unless another has taken its place; harmless twice."""
        self.stop()
        if self._listener is not None and self.path is not None:
            self._listener.close()
            unix.remove(self.path, self._identity)
            self._identity = unix.NOBODY

    # --- this process -----------------------------------------------------------------------------

    def dial(self, port: int) -> socket.socket:
        """Connect to the guest's `port`, from any thread; returns at once, with a blocking socket.

        What is written waits for the guest to accept. A connection that it refuses, or cannot take
        (its driver is gone), ends.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            drop_in_child(end)
        device = self._device
        if device is None:
            theirs.close()
            return ours
        theirs.setblocking(False)
        done = False

        def dial() -> None:
            nonlocal done
            stream = device.dial(port, theirs)
            if stream is not None:
                done = True
                self._direct.add(stream)
                device.later(ANSWER_WITHIN, lambda: self._answered_yet(stream))

        def call() -> None:
            device.locked(dial)
            if not done:
                theirs.close()

        device.call(call)
        return ours

    def bind(self, port: int, function: Callable[[socket.socket, int], None] | None) -> None:
        """Have `function` called when the guest connects to `port` of CID 2; None: no more.

        It gets a blocking socket, its own from then on, and the guest's port. It is called on the
        device's loop, with its lock, and must not block. It comes before a listener on PREFIX_port.
        """
        if function is None:
            self._bound.pop(port, None)
        else:
            self._bound[port] = function

    def is_bound(self, port: int) -> bool:
        """Whether a function of this process has `port`."""
        return port in self._bound

    # --- a program connects to the guest ----------------------------------------------------------

    def _accept(self) -> None:
        device = self._device
        assert device is not None and self._listener is not None
        try:
            sock = self._listener.accept()[0]
        except BlockingIOError:
            return
        except OSError:  # descriptors have run out: not again at once
            device.watch(self._listener.fileno(), None)
            device.later(10 * RETRY, self.start)
            return
        if descriptors.scarce(sock.fileno()):
            sock.close()
            return
        if len(self._clients) >= CLIENTS_MAX:
            silent = next(iter(self._clients))
            self._leave(silent)
            silent.close()
        sock.setblocking(False)
        drop_in_child(sock)
        self._clients[sock] = b""
        device.watch(sock.fileno(), lambda: self._hear(sock))
        self._hear(sock)

    def _leave(self, sock: socket.socket) -> None:
        if self._clients.pop(sock, None) is not None and self._device is not None:
            self._device.watch(sock.fileno(), None)

    def _hear(self, sock: socket.socket) -> None:
        """Read the first line and no byte more."""
        if sock not in self._clients:
            return
        line = self._clients[sock]
        try:
            seen = sock.recv(LINE_MAX, socket.MSG_PEEK)
            end = seen.find(b"\n") + 1
            line += sock.recv(end or len(seen)) if seen else b""
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        if seen and not end and len(line) < LINE_MAX:
            self._clients[sock] = line
            return
        self._leave(sock)
        port = connect_port(line) if seen else None
        device = self._device
        assert device is not None
        stream = device.dial(port, sock) if port is not None else None
        if stream is None:
            sock.close()
        else:
            device.later(ANSWER_WITHIN, lambda: self._answered_yet(stream))

    def _answered_yet(self, stream: Stream) -> None:
        self._direct.discard(stream)
        if not stream.open and not stream.gone:
            stream.reset()

    def answered(self, stream: Stream) -> None:
        """The guest has accepted what a program asked for."""
        if stream in self._direct:
            self._direct.discard(stream)
            stream.accepted()
            return
        line = b"OK %d\n" % stream.host_port
        try:
            if stream.sock is not None and stream.sock.send(line) == len(line):
                stream.accepted()
                return
        except OSError:
            pass
        stream.reset()

    # --- the guest connects to a program ------------------------------------------------------

    def connect(self, stream: Stream, tries: int = TRIES) -> None:
        """Connect `stream` to who listens on its port, or refuse it."""
        device = self._device
        if stream.gone or device is None:
            return
        function = self._bound.get(stream.host_port)
        if function is not None:
            try:
                ours, theirs = socket.socketpair()
            except OSError:  # descriptors have run out
                self._refuse(stream)
                return
            if descriptors.scarce(max(ours.fileno(), theirs.fileno())):
                ours.close()
                theirs.close()
                self._refuse(stream)
                return
            theirs.setblocking(False)
            for end in (ours, theirs):
                drop_in_child(end)
            stream.sock = theirs
            device.reply(stream, OP_RESPONSE)
            stream.accepted()
            function(ours, stream.guest_port)
            return
        if self.path is None:
            stream.reset()
            return
        sock = None
        try:
            sock = socket.socket(socket.AF_UNIX)
            if descriptors.scarce(sock.fileno()):
                sock.close()
                self._refuse(stream)
                return
            drop_in_child(sock)
            sock.setblocking(False)
            unix.connect(sock, f"{self.path}_{stream.host_port}")
        except OSError as err:
            if sock is not None:
                sock.close()
            full = isinstance(err, BlockingIOError)  # a full backlog
            again = full and tries > 0
            wait = min(RETRY * 2 ** (TRIES - tries), RETRY_MAX)
            if not again or not device.later(wait, lambda: self.connect(stream, tries - 1)):
                stream.reset()
            return
        stream.sock = sock
        device.reply(stream, OP_RESPONSE)
        stream.accepted()

    def _refuse(self, stream: Stream) -> None:
        """Refuse what the guest has asked for: descriptors are scarce, and others need them."""
        if self._device is not None:
            self._device.complain(
                f"the guest's connection to port {stream.host_port} is refused: this process has "
                f"three quarters of the {descriptors.limit()} files open that it may (`ulimit -n`)"
            )
        stream.reset()


def connect_port(line: bytes) -> int | None:
    """The port of `CONNECT port\\n`, None if it is not that."""
    words = line.split()
    if not line.endswith(b"\n") or len(words) != 2 or words[0].upper() != b"CONNECT":
        return None
    if not words[1].isdigit() or int(words[1]) > PORT_MAX:
        return None
    return int(words[1])


def check_path(path: str) -> None:
    """UsageError where no socket can have this name."""
    if not path or "\0" in path:
        raise UsageError("--vsock: no path; say for example --vsock cid=3,path=/tmp/vm.vsock")
    unix.check_path(f"--vsock path={path}", path, len("_4294967295"))
