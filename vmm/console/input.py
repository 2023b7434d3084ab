"""The thread that carries input to a UART, and its waiting output out.

It sleeps in poll(2) until there is input, until the UART says that output waits (then it flushes
it 20 ms later: see vmm.devices.uart on why it may be held back), or until it is stopped.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from vmm.console.escape import EscapeParser
    from vmm.console.hvc import HvcLine
    from vmm.devices.uart import Uart

FLUSH_DELAY = 0.02
"""Seconds output may wait."""
RETRY = 0.2
"""Seconds between looks at an input that cannot be read just now."""
BACKLOG_LIMIT = 64 << 10
"""Bytes of input the guest has not read at which reading pauses; a pipe's writer then waits."""
READ_SIZE = 4096


class InputPump:
    """Serves `uart` from descriptor `fd` (-1: output only).

    With a `parser`, escape keys are looked for: BREAK is sent, other actions go to `on_action`
    on the pump's thread. The end of the input ends the input only. The descriptor stays open.
    Output is flushed only while `ready()`: the escape keys must work when its reader is stuck.
    """

    def __init__(
        self,
        uart: Uart | HvcLine,
        fd: int = -1,
        parser: EscapeParser | None = None,
        on_action: Callable[[str], None] | None = None,
        ready: Callable[[], bool] | None = None,
    ) -> None:
        self._uart = uart
        self._fd = fd
        self._parser = parser
        self._on_action = on_action
        self._ready = ready
        self._wake_fd = -1
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        import threading

        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._uart.notify_pending(self._kick)
        self._thread = threading.Thread(target=self._run, name="vmm-console", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, with output flushed; harmless when repeated."""
        thread = self._thread
        if thread is None:
            return
        import threading

        self._stopping = True
        if thread is threading.current_thread():  # by its own on_action; call again from outside
            return
        self._thread = None
        self._uart.notify_pending(None)
        os.eventfd_write(self._wake_fd, 1)
        thread.join()
        os.close(self._wake_fd)
        self._wake_fd = -1
        self._uart.flush()

    def _kick(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        import select

        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        reading = False
        retry_at = 0.0  # when to look at an input that was set aside
        flush_at = 0.0
        while not self._stopping:
            now = time.monotonic()
            if self._fd >= 0 and not reading and now >= retry_at:
                poll.register(self._fd, select.POLLIN)
                reading = True
            due = [at for at in (flush_at, 0.0 if reading else retry_at) if at]
            ready = poll.poll(max(min(due) - now, 0) * 1000 if due else None)
            if flush_at and time.monotonic() >= flush_at:
                flush_at = 0.0 if self._flush() else time.monotonic() + RETRY
            for fd, _event in ready:
                if fd == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                    flush_at = flush_at or time.monotonic() + FLUSH_DELAY
                elif not self._stopping and not self._read():
                    poll.unregister(fd)
                    reading = False
                    retry_at = time.monotonic() + RETRY if self._fd >= 0 else 0.0

    def _flush(self) -> bool:
        return (self._ready is None or self._ready()) and self._uart.flush(wait=False)

    def _read(self) -> bool:
        """Carry one piece of input; False where there is none for now, or (fd -1) any more."""
        if self._uart.backlog >= BACKLOG_LIMIT:
            return False
        if self._parser is not None:  # a terminal
            from vmm.console.terminal import in_foreground

            if not in_foreground(self._fd):
                return False  # a read would stop the process (SIGTTIN)
        try:
            data = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return True
        except OSError as error:
            import errno

            if error.errno != errno.EIO:  # EIO: a pty with nobody connected; they may come
                self._fd = -1
            return False
        if not data:
            self._fd = -1
            return False
        self._deliver(data)
        return True

    def _deliver(self, data: bytes) -> None:
        from vmm.console.escape import BREAK

        for part in [data] if self._parser is None else self._parser.feed(data):
            if isinstance(part, bytes):
                self._uart.receive(part)
            elif part == BREAK:
                self._uart.send_break()
            elif self._on_action is not None:
                self._on_action(part)
