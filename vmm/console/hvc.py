"""Input of a machine whose console is virtio's (`--console hvc`): to the UART until it is up."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.uart import Uart
    from vmm.virtio.console_ports import ConsolePort


class HvcLine:
    """What `InputPump` knows of a UART, for the port of a virtio console and the UART before it."""

    def __init__(self, uart: Uart, port: ConsolePort) -> None:
        self._uart = uart
        self._port = port

    @property
    def backlog(self) -> int:
        """Bytes of input the guest has not read."""
        return self._port.backlog if self._port.open else self._uart.backlog

    def receive(self, data: bytes) -> None:
        """Input for the guest; from any thread."""
        if self._port.open:
            self._port.type(data)
        else:
            self._uart.receive(data)

    def send_break(self) -> None:
        """A break: Linux's hvc driver has a key of its own for it."""
        if self._port.open:
            from vmm.virtio.console_ports import SYSRQ

            self._port.type(SYSRQ)
        else:
            self._uart.send_break()

    def notify_pending(self, callback: Callable[[], None] | None) -> None:
        """See `Uart.notify_pending`."""
        self._uart.notify_pending(callback)

    def flush(self, wait: bool = True) -> bool:
        """See `Uart.flush`."""
        return self._uart.flush(wait)
