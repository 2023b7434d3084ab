"""What is at the host's end of a console port: the machine's console, a socket, a file."""

from __future__ import annotations

from contextlib import suppress

from vmm.errors import ShapeError, UsageError
from vmm.fifo import Output
from vmm.forked import drop_in_child
from vmm.virtio import unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmm.shapes import Shape
    from vmm.virtio.console import VirtioConsole
    from vmm.virtio.queue import Chain

INPUT_MAX = 16 << 10
"""Bytes kept of what a program has written; the rest waits in its socket."""
STATE_INPUT_MAX = 16 << 20
"""The same of a state, which has what was typed at the console too."""
CHUNK = 4096
"""Bytes the console's back end takes at once without waiting, when it says it is ready."""
ACCEPT_AGAIN = 0.2
"""Seconds between tries to take a client while this process has no descriptors left."""
RETRY = 0.02
"""Seconds between looks at a port that takes nothing and cannot tell when it will."""
PORT_OPEN = 6
"""The control message (5.3.6.2)."""
SYSRQ = b"\x0f"
"""What Linux's hvc driver takes for a break (drivers/tty/hvc/hvc_console.c)."""


class Port:
    """A port whose output goes nowhere; base of the others. Used with the device's lock held.

    Attributes:
        number: in the device.
        ready: the guest's driver has it.
        open: a program in the guest has it open.
        connected: somebody is at the host's end.
        chain, done: output under way, and how much of it is out.
        waits: for the host's end to take output.
    """

    def __init__(self, number: int, name: str = "") -> None:
        self.number = number
        self.name = name
        self.ready = self.open = False
        self.connected = True
        self.chain: Chain | None = None
        self.done = 0
        self.waits = False
        self._input = bytearray()
        self.device: VirtioConsole

    def attach(self, device: VirtioConsole) -> None:
        """It is a port of `device`."""
        self.device = device

    def start(self) -> None:
        """The device has a driver. On the loop."""

    def stop(self) -> None:
        """It has none any more. On the loop."""

    def forget(self) -> None:
        """The device was reset."""
        self.ready = self.open = self.waits = False
        self.chain, self.done = None, 0
        self._input.clear()

    def write(self, data: memoryview) -> int:
        """Output: how many bytes were taken; 0: none now."""
        return len(data)

    def wait_to_write(self) -> None:
        """`write` took nothing: have the device transmit when it might."""
        self.device.later(RETRY, self._again)

    def _again(self) -> None:
        if self.waits:
            self.device.transmit(self)

    @property
    def backlog(self) -> int:
        """Bytes of input the guest has not read."""
        return len(self._input)

    def has_input(self) -> bool:
        """Whether there is something to read, and somebody to read it."""
        return self.open and bool(self._input)

    def read_into(self, chain: Chain) -> int:
        """Input: the bytes put into `chain`."""
        done = chain.write(self._input)
        del self._input[:done]
        return done

    def drained(self) -> None:
        """The guest has taken input, or has no buffers left."""

    def guest_opened(self, opened: bool) -> None:
        """A program in the guest opens or closes it."""
        self.open = opened
        if opened:
            self.device.receive(self)

    def save(self) -> dict[str, object]:
        """As plain data."""
        return {
            "ready": self.ready,
            "open": self.open,
            "connected": self.connected,
            "done": self.done,
            "input": bytes(self._input),
        }

    def shape(self) -> Shape:
        """Of what `save` gives."""
        from vmm.shapes import Data, Flag, Table, Whole

        return Table(
            {
                "ready": Flag(),
                "open": Flag(),
                "connected": Flag(),
                "done": Whole(0, 1 << 62),
                "input": Data(0, STATE_INPUT_MAX),
            }
        )

    def restore(self, state: dict[str, object]) -> None:
        """Take over what `save` gave, but for who is connected. Raises ShapeError."""
        done, data = state["done"], state["input"]
        if not isinstance(done, int) or not isinstance(data, bytes):
            raise ShapeError(f"state of console port {self.number}: no position, or no input")
        self.ready, self.open, self.done = bool(state["ready"]), bool(state["open"]), done
        self._input[:] = data

    def close(self) -> None:
        """Give back host resources; harmless twice."""


class ConsolePort(Port):
    """Port 0: the machine's console.

    Args:
        sink: takes output; may wait only where `may_write` was False.
        may_write: whether a short write would not wait.
    """

    def __init__(
        self, sink: Callable[[bytes], None], may_write: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__(0)
        self._sink = sink
        self._may_write = may_write

    def write(self, data: memoryview) -> int:
        if not self._may_write():
            return 0
        part = bytes(data[:CHUNK])
        self._sink(part)
        return len(part)

    def type(self, data: bytes) -> None:
        """Input; from any thread."""
        device = self.device
        with device.slots[0].lock:
            self._input += data  # whether or not it can be delivered now
            device.locked(device.receive, self)


class SocketPort(Port):
    """A port on a listening UNIX socket, for one program at a time.

    What the guest writes while nobody is connected is lost, as on a serial line; what a program
    writes before the guest has opened the port waits in its socket.
    """

    def __init__(self, number: int, name: str, path: str) -> None:
        super().__init__(number, name)
        option = f"--port name={name},socket={path}"
        unix.check_path(option, path)
        self.path = path
        self.connected = False
        self._listener, self._identity = unix.listen(path, option)
        self._client: socket.socket | None = None
        self._reading = self._started = False

    def start(self) -> None:
        self._started = True
        self.device.watch(self._listener.fileno(), self._accept)

    def _listen(self) -> None:
        """Take a client, where there is none."""
        if self._started and self._client is None:
            self.device.watch(self._listener.fileno(), self._accept)

    def stop(self) -> None:
        self._started = False
        self.device.watch(self._listener.fileno(), None)
        self._hang_up()

    def _accept(self) -> None:
        try:
            client = self._listener.accept()[0]
        except BlockingIOError:  # gone again: the next one will be told
            return
        except OSError:  # no descriptors are left: not again at once
            self.device.watch(self._listener.fileno(), None)
            self.device.later(ACCEPT_AGAIN, self._listen)
            return
        client.setblocking(False)
        drop_in_child(client)
        self._client = client
        self.connected = True
        self.device.watch(self._listener.fileno(), None)  # the next one waits
        if self.ready:
            self.device.message(self.number, PORT_OPEN, 1)
        self._watch()

    def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        self.device.watch(client.fileno(), None)
        self.device.watch_writing(client.fileno(), None)
        client.close()
        self.connected = self._reading = False
        if self.ready:
            self.device.message(self.number, PORT_OPEN, 0)
        if self._started:
            self.start()
        self._again()

    def _watch(self) -> None:
        """Look for input, and for the end of the connection, while there is room for input."""
        wanted = self._client is not None and len(self._input) < INPUT_MAX
        if self._client is not None and wanted is not self._reading:
            self._reading = wanted
            self.device.watch(self._client.fileno(), self._readable if wanted else None)

    def _readable(self) -> None:
        if self._client is None:
            return
        try:
            data = self._client.recv(INPUT_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            return
        self._input += data
        self.device.receive(self)
        self._watch()

    def drained(self) -> None:
        self._watch()

    def write(self, data: memoryview) -> int:
        if self._client is None:
            return len(data)
        try:
            return self._client.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # the end of the connection will be read

    def wait_to_write(self) -> None:
        client = self._client
        if client is None:
            return

        def writable() -> None:
            self.device.watch_writing(client.fileno(), None)
            self._again()

        self.device.watch_writing(client.fileno(), writable)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._listener.close()
        unix.remove(self.path, self._identity)
        self._identity = unix.NOBODY


class FilePort(Port):
    """A port whose output goes into a file, truncated when the machine is made, or a FIFO (see
    vmm.fifo)."""

    def __init__(self, number: int, name: str, path: str) -> None:
        super().__init__(number, name)
        try:
            self._out = Output(path)
        except OSError as err:
            raise UsageError(
                f"--port name={name},file={path}: {err.strerror}; give a file that can be "
                "written, in a directory that exists"
            ) from err

    def write(self, data: memoryview) -> int:
        try:
            return self._out.write(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # a full disk ends the log, not the guest

    def close(self) -> None:
        with suppress(OSError):
            self._out.close()
