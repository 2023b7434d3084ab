"""A guest's console put together: a back end, the tail of its output, the terminal, the pump."""

from __future__ import annotations

from vmm.console.backends import open_backend
from vmm.console.tail import ConsoleTail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.console.hvc import HvcLine
    from vmm.console.input import InputPump
    from vmm.console.terminal import Terminal
    from vmm.devices.uart import Uart

HELP_PATIENCE = 0.5
"""Seconds the help waits for room on the terminal."""


class Console:
    """`spec` is what `--console` takes: auto, none, file:PATH, pty.

    Made before the machine starts (so that wrong values are told early), attached to its UART
    when it does, closed when it ends. The terminal is raw from `attach` to `close`; call both
    on the main thread if its signals should put the terminal back.
    """

    def __init__(self, spec: str = "none") -> None:
        self.backend = open_backend(spec)
        self.tail = ConsoleTail()
        self.before_output: Callable[[], object] | None = None
        """Called once, before the next output is shown."""
        self._terminal: Terminal | None = None
        self._pump: InputPump | None = None
        self._uart: Uart | None = None
        self._to: Uart | HvcLine | None = None

    def send(self, data: bytes) -> None:
        """Type `data`; what the guest cannot take yet waits. Once attached, from any thread."""
        if self._to is not None:
            self._to.receive(data)

    def sink(self, data: bytes) -> None:
        """Output of the guest; a UART's sink."""
        self.tail.write(data)
        before = self.before_output
        if before is not None:
            self.before_output = None
            before()
        self.backend.write(data)

    def attach(
        self,
        uart: Uart,
        on_end: Callable[[], None] | None = None,
        line: HvcLine | None = None,
    ) -> None:
        """Serve `uart`; `on_end` is called, from another thread, when Ctrl-A x is typed.

        Input goes to `line` where it is given."""
        self.backend.begin()
        uart.sink = self.sink
        self._uart = uart
        to = self._to = line or uart
        self.tail.before_wait = lambda: uart.flush(wait=False)
        if self.backend.name == "none":
            return

        # Imported here: a machine without a person at its console starts without them.
        from vmm.console.input import InputPump

        if not self.backend.interactive:
            self._pump = InputPump(to, self.backend.input_fd, ready=self.backend.ready)
            self._pump.start()
            return

        from vmm.console.escape import HELP, HELP_TEXT, EscapeParser
        from vmm.console.terminal import Terminal

        def act(action: str) -> None:
            if action == HELP:
                # Patience for a guest that is printing; a reader that is stuck stays without.
                if self.backend.ready(HELP_PATIENCE):
                    self.backend.write(HELP_TEXT.encode())
            elif on_end is not None:
                on_end()

        self._terminal = Terminal(self.backend.input_fd)
        self._terminal.__enter__()
        parser = EscapeParser()
        self._pump = InputPump(to, self.backend.input_fd, parser, act, self.backend.ready)
        self._pump.start()

    def reclaim(self) -> None:
        """After SIGCONT: whoever had the terminal meanwhile may have changed its modes."""
        if self._terminal is not None:
            self._terminal.reclaim()

    def hold(self) -> None:
        """The machine pauses: do not let its vCPUs wait for a stuck reader."""
        self.backend.hold()

    def go_on(self) -> None:
        """The machine goes on."""
        self.backend.go_on()

    def end(self) -> None:
        """The machine is about to stop: do not let its vCPUs wait for a stuck reader."""
        self.backend.end()

    def revive(self) -> None:
        """After `end`, and `close` of the tail: there will be more output."""
        self.backend.revive()
        self.tail.reopen()

    def close(self) -> None:
        """Give the terminal back and end the thread; what was put out stays in `tail`."""
        self.end()
        if self._pump is not None:
            self._pump.stop()
            self._pump = None
        if self._uart is not None:
            self._uart.flush()
            self.backend.write(b"")  # what a pause has had it keep
        self.tail.close()
        if self._terminal is not None:
            self._terminal.restore()
            self._terminal = None
        self.backend.close()
