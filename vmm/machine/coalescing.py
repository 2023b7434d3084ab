"""Console output without an exit a byte: THR writes wait in KVM's ring of coalesced writes.

A polling console driver (Linux's printk) writes up to 16 bytes between two looks at LSR; with the
ring only the look exits. Every exit empties the ring before it is handled, so the UART sees the
guest's accesses in order. The one exception is that look itself: with a write in the ring, what
LSR says is known without it (all is sent), and the ring may fill; that makes it half as long. A
write that no exit follows is brought out by a thread: within ACTIVE_PERIOD while the console is
busy, within IDLE_PERIOD else.

It starts once the guest has printed a little: registering the port costs KVM a grace period
(milliseconds), and a guest that prints nothing should not pay for it.
"""

from __future__ import annotations

import threading

from vmm import layout
from vmm.devices.uart import LSR
from vmm.kvm import constants
from vmm.kvm.coalesced import CoalescedRing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.devices.uart import Uart
    from vmm.kvm import Vm
    from vmm.machine.vcpu_thread import VcpuThread

THRESHOLD = 256
"""Bytes of output after which it starts."""
ACTIVE_PERIOD = 0.02
IDLE_PERIOD = 0.25
"""Seconds between two looks at the ring by the thread."""


class ConsoleCoalescing:
    """Coalesces the writes to one UART's THR; idle until `THRESHOLD` bytes went through `saw`."""

    def __init__(self, vm: Vm, uart: Uart, threads: list[VcpuThread]) -> None:
        self._vm = vm
        self._uart = uart
        self._threads = threads
        self._seen = 0
        self._busy = False
        self._ring: CoalescedRing | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._offered = bool(vm.check_extension(constants.CAP_COALESCED_PIO))

    def saw(self, size: int) -> None:
        """The guest printed `size` bytes; called by the console's sink, on whatever thread."""
        self._seen += size
        if self._seen >= THRESHOLD and self._offered:
            self._offered = False
            self._begin()

    def drain(self) -> None:
        """Give the UART what is in the ring; from any thread."""
        ring = self._ring
        if ring is not None:
            ring.drain()

    def poll(self) -> int:
        """LSR as a driver sees it that has just sent a byte, which may still be in the ring; -1 if
        the read is not that simple."""
        ring = self._ring
        if self._busy and ring is not None and ring.pending():
            return self._uart.sending()
        return -1

    def close(self) -> None:
        """Stop; before the vCPUs are closed, after their threads ended."""
        with self._lock:  # the console's thread may just begin it, or be about to
            self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _begin(self) -> None:
        with self._lock:
            if self._stop.is_set():
                return
            ring = self._ring = CoalescedRing(self._threads[0].vcpu, self._deliver)
            for thread in self._threads:
                thread.coalesce(ring, layout.PORT_UART + LSR, self.poll)
            self._vm.coalesce(layout.PORT_UART, 1, pio=True)
            self._thread = threading.Thread(target=self._watch, name="vmm-coalesced", daemon=True)
            self._thread.start()

    def _deliver(self, addr: int, data: bytes, pio: bool) -> None:
        self._uart.write_many(data)

    def _watch(self) -> None:
        while not self._stop.wait(ACTIVE_PERIOD if self._busy else IDLE_PERIOD):
            before = self._seen
            self.drain()
            # Not busy first, then once more: a write after that is followed by a look that drains.
            self._busy = self._seen != before
            self.drain()
