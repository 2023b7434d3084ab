"""A 16550A serial port, after National Semiconductor's PC16550D data sheet (June 1995).

Input waits on the host side until the guest can lose none of it: bytes move into the 16-byte
FIFO only while the guest receives, that is while it holds RTS (a sender with hardware handshake
waits for the same), has the receive interrupt on, or polls LSR. So what is piped in before Linux
opens its console is still there after its driver has cleared the FIFOs.

Time does not pass in the wire: a byte written is sent at once (THRE and TEMT always read 1), and
the character time-out of the FIFO has always elapsed.

Output is batched. The sink gets what is buffered
  - at a newline, or when OUTPUT_LIMIT bytes wait;
  - at any access other than a THR write and an LSR read: drivers end each burst with one
    (Linux: IER at the end of a console write, IIR in the interrupt handler);
  - at the second LSR read without a THR write in between: the guest waits for something;
  - at `flush()`. A callback (`notify_pending`), called once when output starts to wait, lets a
    host thread call that a little later: the net under a guest that writes half a line and halts.
"""

from __future__ import annotations

from _thread import allocate_lock

from vmm.devices.device import Device, no_irq, state_bytes, state_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import IrqLine
    from vmm.shapes import Shape

# Registers (table II of the data sheet); RBR, THR, IER with DLAB 0, DLL, DLM with DLAB 1.
RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7

IER_ERBFI = 0x01
IER_ETBEI = 0x02
IER_ELSI = 0x04
IER_EDSSI = 0x08

IIR_NONE = 0x01
IIR_MODEM_STATUS = 0x00
IIR_THR_EMPTY = 0x02
IIR_DATA = 0x04
IIR_LINE_STATUS = 0x06
IIR_TIMEOUT = 0x0C
IIR_FIFO = 0xC0

FCR_ENABLE = 0x01
FCR_RX_RESET = 0x02
FCR_TRIGGER_SHIFT = 6
TRIGGERS = (1, 4, 8, 14)

LCR_DLAB = 0x80

MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08
MCR_LOOP = 0x10
MCR_MASK = 0x1F

LSR_DR = 0x01
LSR_OE = 0x02
LSR_BI = 0x10
LSR_THRE = 0x20
LSR_TEMT = 0x40
LSR_FIFO_ERROR = 0x80
LSR_ERRORS = 0x1E

MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80
MSR_TERI = 0x04

FIFO_SIZE = 16
QUEUE_MAX = 16 << 20
"""Bytes of input that a state may hold for a guest that reads none."""
OUTPUT_LIMIT = 4096
"""Bytes of output that wait at most; a pipe takes as many in one piece (PIPE_BUF)."""


def no_sink(data: bytes) -> None:
    """Output that goes nowhere."""


class Uart(Device):
    """Eight ports. `irq` is its interrupt line, `sink` takes output and must not raise."""

    LENGTH = 8

    def __init__(
        self,
        irq: IrqLine = no_irq,
        sink: Callable[[bytes], None] = no_sink,
        name: str = "uart",
    ) -> None:
        super().__init__(name)
        self.sink = sink
        self.on_thri: Callable[[bool], None] | None = None
        """Told when IER.ETBEI changes: while it is set, THR writes must come in one by one, as
        each raises an interrupt; while not, they may be coalesced and given to `write_many`."""
        self._on_pending: Callable[[], None] | None = None
        self._irq = irq
        self._lock = allocate_lock()
        self._sink_lock = allocate_lock()  # taken before _lock, held over the sink: keeps order
        self._thri_lock = allocate_lock()
        self._level = 0
        self._out = bytearray()
        self._told = False
        self._queue = bytearray()  # input the guest has not been given yet
        self._queue_flags = bytearray()  # LSR_BI for each byte of it that is a break
        self._divisor = 12  # 9600 baud; the data sheet leaves it undefined and resets keep it
        self._scr = 0
        self._clear()

    def _clear(self) -> None:
        """Registers as after a master reset (data sheet, table III)."""
        self._fifo = bytearray()
        self._flags = bytearray()
        self._errors = 0
        self._ier = self._fcr = self._lcr = self._mcr = 0
        self._msr = MSR_CTS | MSR_DSR | MSR_DCD
        self._plain = True  # a THR write does nothing but send: no DLAB, no loopback, no interrupt
        self._thri = False
        self._wrote = False  # THR written since LSR was last read
        self._polled = False  # the last access was a read of LSR
        self._polling = False  # ... and the one before it: the guest waits for LSR to change

    # --- the host's side ----------------------------------------------------------------------

    @property
    def ier(self) -> int:
        """The interrupt enable register."""
        return self._ier

    @property
    def backlog(self) -> int:
        """Bytes of input the guest has not read."""
        return len(self._queue) + len(self._fifo)

    def receive(self, data: bytes) -> None:
        """Input for the guest; from any thread."""
        with self._lock:
            self._queue += data
            self._queue_flags += bytes(len(data))
            self._fill()

    def send_break(self) -> None:
        """A break condition after the input so far: a NUL with LSR.BI (Linux: SysRq)."""
        with self._lock:
            self._queue.append(0)
            self._queue_flags.append(LSR_BI)
            self._fill()

    def notify_pending(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called when output starts to wait, once until the next `flush`.

        It is called with the device locked: it may wake a thread, but not call back. After
        `notify_pending(None)` returns, it is not called any more.
        """
        with self._lock:
            self._on_pending = callback
            self._told = False

    def flush(self, wait: bool = True) -> bool:
        """Give waiting output to the sink; from any thread.

        Without `wait`, False and nothing done while another thread is in the sink.
        """
        if not self._sink_lock.acquire(wait):
            return False
        try:
            with self._lock:
                self._told = False
                data = bytes(self._out)
                self._out.clear()
            if data:
                self.sink(data)
        finally:
            self._sink_lock.release()
        return True

    def sending(self) -> int:
        """LSR between two bytes of output, where the first may not be here yet; -1 if more shows
        in it than that, and `read` must tell."""
        return -1 if self._fifo or self._errors else LSR_THRE | LSR_TEMT

    # --- the guest's side -----------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == LSR and self._wrote and size == 1 and not self._fifo and not self._errors:
            # A driver between two bytes of output: the most frequent read by far. No lock:
            # input that comes in now is there at the next read.
            self._wrote = False
            self._polled = True
            return LSR_THRE | LSR_TEMT
        if size != 1:
            return sum(
                (self.read(offset + i, 1) if offset + i < 8 else 0xFF) << (8 * i)
                for i in range(size)
            )
        with self._lock:
            if offset == LSR:
                value = self._read_lsr()
                flush = self._polling or not self._wrote
                self._wrote = False
            else:
                value = self._read_other(offset)
                flush = True
            flush = flush and bool(self._out)
        if flush:
            self.flush()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            for i in range(min(size, 8 - offset)):
                self.write(offset + i, 1, (value >> (8 * i)) & 0xFF)
            return
        thri = False
        with self._lock:
            if offset == THR and self._plain:
                self._wrote = True
                self._polled = self._polling = False
                self._out.append(value)
                if not self._told:
                    self._pending()
                flush = value == 0x0A or len(self._out) >= OUTPUT_LIMIT
            elif offset == THR and not self._lcr & LCR_DLAB:
                self._transmit(value)
                flush = value == 0x0A or len(self._out) >= OUTPUT_LIMIT
            else:
                thri = self._write_other(offset, value)
                flush = bool(self._out)
        if flush:
            self.flush()
        if thri and self.on_thri is not None:
            with self._thri_lock:  # two vCPUs: the last call must tell the last value
                self.on_thri(bool(self._ier & IER_ETBEI))

    def write_many(self, data: bytes) -> None:
        """The same as a write of each byte to register 0 in turn, in one go."""
        with self._lock:
            plain = self._plain
            if plain and data:
                self._wrote = True
                self._polled = self._polling = False
                self._out += data
                self._pending()
                flush = 0x0A in data or len(self._out) >= OUTPUT_LIMIT
        if not plain:
            for value in data:
                self.write(THR, 1, value)
        elif data and flush:
            self.flush()

    def _transmit(self, value: int) -> None:
        self._wrote = True
        self._polled = self._polling = False
        if self._mcr & MCR_LOOP:
            self._loop_back(value)
        else:
            self._out.append(value)
            self._pending()
        if self._ier & IER_ETBEI and not self._thri:
            # Sent already, so THR is empty again. If the interrupt is still pending, the line
            # stays high: its dip would be zero long.
            self._thri = True
            self._update()

    def _pending(self) -> None:
        if not self._told and self._on_pending is not None:
            self._told = True
            self._on_pending()

    def _read_lsr(self) -> int:
        if self._polled and not self._polling:
            self._polling = True
            self._fill()
        self._polled = True
        value = LSR_THRE | LSR_TEMT | self._errors
        if self._fifo:
            value |= LSR_DR
        if self._fcr & FCR_ENABLE and (self._errors & ~LSR_OE or any(self._flags)):
            value |= LSR_FIFO_ERROR
        if self._errors:
            self._errors = 0
            self._update()
        return value

    def _read_other(self, offset: int) -> int:
        if offset == RBR and not self._lcr & LCR_DLAB:
            self._polled = False
            return self._read_rbr()
        self._polled = self._polling = False
        if self._lcr & LCR_DLAB and offset in (DLL, DLM):
            return self._divisor >> (8 * offset) & 0xFF
        if offset == IER:
            return self._ier
        if offset == IIR:
            value = self._source()
            if value == IIR_THR_EMPTY:
                self._thri = False
                self._update()
            return value | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == MSR:
            value = self._msr
            self._msr &= 0xF0
            self._update()
            return value
        return self._scr if offset == SCR else 0xFF

    def _read_rbr(self) -> int:
        if not self._fifo:
            return 0
        value = self._fifo[0]
        del self._fifo[0], self._flags[0]
        self._fill()
        self._show()
        self._update()
        return value

    def _write_other(self, offset: int, value: int) -> bool:
        """Write any register but THR; whether IER.ETBEI changed."""
        self._polled = self._polling = False
        if self._lcr & LCR_DLAB and offset in (DLL, DLM):
            shift = 8 * offset
            self._divisor = self._divisor & ~(0xFF << shift) | value << shift
        elif offset == IER:
            changed = (self._ier ^ value) & IER_ETBEI
            self._ier = value & 0x0F
            if changed:
                # Turning it on while THR is empty raises it (Linux tests for this); off, drops it.
                self._thri = bool(value & IER_ETBEI)
            self._sort()
            self._fill()
            self._update()
            return bool(changed)
        elif offset == FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self._lcr = value
            self._sort()
        elif offset == MCR:
            self._mcr = value & MCR_MASK
            self._sort()
            self._modem()
            self._fill()
            self._update()
        elif offset == SCR:
            self._scr = value
        return False

    def _write_fcr(self, value: int) -> None:
        if (self._fcr ^ value) & FCR_ENABLE or value & FCR_RX_RESET:
            self._fifo.clear()
            self._flags.clear()
            self._errors = 0
        # The other bits are not programmed unless FCR0 is written 1.
        self._fcr = value & 0xC9 if value & FCR_ENABLE else 0
        self._fill()
        self._update()

    # --- inside -------------------------------------------------------------------------------

    def _sort(self) -> None:
        """Bring `_plain` up to date."""
        self._plain = not (self._lcr & LCR_DLAB or self._mcr & MCR_LOOP or self._ier & IER_ETBEI)

    def _fill(self) -> None:
        """Move waiting input into the FIFO, if the guest receives."""
        if not self._queue or self._mcr & MCR_LOOP:
            return
        if not (self._mcr & MCR_RTS or self._ier & IER_ERBFI or self._polling):
            return
        room = (FIFO_SIZE if self._fcr & FCR_ENABLE else 1) - len(self._fifo)
        if room > 0:
            was_empty = not self._fifo
            self._fifo += self._queue[:room]
            self._flags += self._queue_flags[:room]
            del self._queue[:room], self._queue_flags[:room]
            if was_empty:
                self._show()
            self._update()

    def _show(self) -> None:
        """A byte came to the top of the FIFO: its errors show in LSR."""
        if self._flags and self._flags[0]:
            self._errors |= self._flags[0]
            self._flags[0] = 0

    def _loop_back(self, value: int) -> None:
        if len(self._fifo) >= (FIFO_SIZE if self._fcr & FCR_ENABLE else 1):
            self._errors |= LSR_OE
            if not self._fcr & FCR_ENABLE:
                self._fifo[0] = value  # without the FIFO, the newer byte destroys the older
        else:
            self._fifo.append(value)
            self._flags.append(0)
        self._update()

    def _modem(self) -> None:
        """Modem inputs: a ready peer, or in loopback the modem outputs (data sheet, 8.7)."""
        lines = MSR_CTS | MSR_DSR | MSR_DCD
        if self._mcr & MCR_LOOP:
            lines = (
                (MSR_CTS if self._mcr & MCR_RTS else 0)
                | (MSR_DSR if self._mcr & MCR_DTR else 0)
                | (MSR_RI if self._mcr & MCR_OUT1 else 0)
                | (MSR_DCD if self._mcr & MCR_OUT2 else 0)
            )
        changed = (self._msr ^ lines) & 0xF0
        if lines & MSR_RI:
            changed &= ~MSR_RI  # TERI is the trailing edge only
        self._msr = lines | self._msr & 0x0F | changed >> 4

    def _source(self) -> int:
        """The interrupt of the highest priority (data sheet, table V), as IIR tells it."""
        ier = self._ier
        if ier & IER_ELSI and self._errors:
            return IIR_LINE_STATUS
        if ier & IER_ERBFI and self._fifo:
            if not self._fcr & FCR_ENABLE:
                return IIR_DATA
            trigger = TRIGGERS[self._fcr >> FCR_TRIGGER_SHIFT]
            return IIR_DATA if len(self._fifo) >= trigger else IIR_TIMEOUT
        if ier & IER_ETBEI and self._thri:
            return IIR_THR_EMPTY
        if ier & IER_EDSSI and self._msr & 0x0F:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update(self) -> None:
        level = 0 if self._source() == IIR_NONE else 1
        if level != self._level:
            self._level = level
            self._irq(level)

    # --- state ----------------------------------------------------------------------------------

    _SAVED = ("ier", "fcr", "lcr", "mcr", "msr", "scr", "errors")

    def save(self) -> dict[str, object]:
        self.flush()
        with self._lock:
            state: dict[str, object] = {key: getattr(self, f"_{key}") for key in self._SAVED}
            state["divisor"] = self._divisor
            state["thri"] = int(self._thri)
            state["fifo"] = bytes(self._fifo)
            state["fifo_flags"] = bytes(self._flags)
            state["queue"] = bytes(self._queue)
            state["queue_flags"] = bytes(self._queue_flags)
            return state

    def shape(self) -> Shape:
        from vmm.shapes import U8, U16, Data, Flag, Table, Whole

        fifo, queue = Data(0, FIFO_SIZE), Data(0, QUEUE_MAX)
        return Table(
            {
                **dict.fromkeys(self._SAVED, Whole(0, U8)),
                "divisor": Whole(0, U16),
                "thri": Flag(),
                "fifo": fifo,
                "fifo_flags": fifo,
                "queue": queue,
                "queue_flags": queue,
            }
        )

    def restore(self, state: dict[str, object]) -> None:
        with self._lock:
            self._clear()
            for key in self._SAVED:
                setattr(self, f"_{key}", state_int(state, key, 0xFF))
            self._ier &= 0x0F
            self._mcr &= MCR_MASK
            self._errors &= LSR_ERRORS
            self._divisor = state_int(state, "divisor", 0xFFFF)
            self._thri = bool(state_int(state, "thri", 1))
            self._fifo = bytearray(state_bytes(state, "fifo")[:FIFO_SIZE])
            self._flags = _flags(state_bytes(state, "fifo_flags"), len(self._fifo))
            self._queue = bytearray(state_bytes(state, "queue"))
            self._queue_flags = _flags(state_bytes(state, "queue_flags"), len(self._queue))
            self._sort()
            self._update()
        if self.on_thri is not None:
            with self._thri_lock:
                self.on_thri(bool(self._ier & IER_ETBEI))

    def reset(self) -> None:
        """A master reset; input the guest was not given yet stays."""
        self.flush()
        with self._lock:
            self._clear()
            self._update()
        if self.on_thri is not None:
            with self._thri_lock:
                self.on_thri(False)

    def close(self) -> None:
        self.flush()


def _flags(data: bytes, count: int) -> bytearray:
    """`count` bytes of LSR error flags, out of a state that may hold anything."""
    return bytearray(byte & LSR_BI for byte in data[:count].ljust(count, b"\0"))
