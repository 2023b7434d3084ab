"""vmm.devices.uart against the PC16550D data sheet and Linux's 8250 driver."""

from __future__ import annotations

import threading

import pytest

from vmm.devices.uart import (
    FCR,
    FIFO_SIZE,
    IER,
    IIR,
    LCR,
    LSR,
    MCR,
    MSR,
    OUTPUT_LIMIT,
    RBR,
    SCR,
    THR,
    Uart,
)

RTS = 0x02


class Wired:
    """A UART with its wires in hand."""

    def __init__(self) -> None:
        self.levels: list[int] = []
        self.sent: list[bytes] = []
        self.uart = Uart(self.levels.append, self.sent.append)

    def r(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def w(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    @property
    def line(self) -> int:
        return self.levels[-1] if self.levels else 0

    @property
    def output(self) -> bytes:
        return b"".join(self.sent)


@pytest.fixture
def dev() -> Wired:
    return Wired()


@pytest.fixture
def fifo(dev: Wired) -> Wired:
    """FIFO on, trigger 8, receiving, receive interrupt on: as Linux has an open tty."""
    dev.w(FCR, 0x81)
    dev.w(MCR, 0x0B)
    dev.w(IER, 0x05)
    return dev


# --- registers ---------------------------------------------------------------------------------


def test_master_reset_values(dev: Wired) -> None:
    got = [dev.r(offset) for offset in (IER, IIR, LCR, MCR, LSR, MSR)]
    assert got == [0x00, 0x01, 0x00, 0x00, 0x60, 0xB0]


@pytest.mark.parametrize(("offset", "mask"), [(IER, 0x0F), (LCR, 0xFF), (SCR, 0xFF), (MCR, 0x0F)])
def test_registers_keep_the_bits_they_have(dev: Wired, offset: int, mask: int) -> None:
    dev.w(LCR, 0)
    dev.w(offset, 0xFF & ~0x10)
    assert dev.r(offset) == mask & ~0x10 & 0xFF
    dev.w(offset, 0)
    assert dev.r(offset) == 0


def test_dlab_shows_the_divisor(dev: Wired) -> None:
    dev.w(LCR, 0x83)
    dev.w(0, 0x01)
    dev.w(1, 0x02)
    assert (dev.r(0), dev.r(1)) == (0x01, 0x02)
    dev.w(LCR, 0x03)
    assert dev.r(IER) == 0
    assert dev.output == b"", "a divisor is not sent"


def test_wide_accesses_reach_each_register(dev: Wired) -> None:
    dev.uart.write(6, 2, 0x5A00)  # MSR is not written, SCR is
    assert dev.uart.read(6, 2) == 0x5AB0
    assert dev.uart.read(7, 4) == 0xFFFFFF5A


# --- Linux's probe (drivers/tty/serial/8250/8250_port.c, autoconfig) ---------------------------


def test_linux_finds_a_16550a(dev: Wired) -> None:
    dev.w(IER, 0)
    assert dev.r(IER) & 0x0F == 0
    dev.w(IER, 0x0F)
    assert dev.r(IER) & 0x0F == 0x0F
    dev.w(IER, 0)
    dev.w(MCR, 0x10 | 0x0A)
    assert dev.r(MSR) & 0xF0 == 0x90, "loopback: RTS gives CTS, OUT2 gives DCD"
    dev.w(MCR, 0)
    dev.w(LCR, 0xBF)
    dev.w(2, 0)  # EFR on chips that have it
    dev.w(LCR, 0)
    dev.w(FCR, 0x01)
    assert dev.r(IIR) >> 6 == 3, "16550A: FIFO bits both set"
    dev.w(LCR, 0x80)
    assert dev.r(2) != 0, "no EFR: not a 16650"
    dev.w(LCR, 0)
    dev.w(FCR, 0x01 | 0x20)
    assert dev.r(IIR) & 0xE0 == 0xC0, "no 64-byte FIFO: not a 16750"
    dev.w(IER, 0x40)
    assert dev.r(IER) & 0x40 == 0, "no UUE: not an XScale"


def test_linux_trusts_the_thre_interrupt(dev: Wired) -> None:
    """serial8250_do_startup: UART_BUG_THRE and UART_BUG_TXEN must not be found."""
    dev.w(IER, 0x02)
    assert dev.r(IIR) & 0x0F == 0x02
    dev.w(IER, 0)
    dev.w(IER, 0x02)
    assert dev.r(IIR) & 0x0F == 0x02, "raised again when turned on again"
    dev.w(IER, 0)
    dev.w(IER, 0x02)
    assert dev.r(LSR) & 0x40
    assert dev.r(IIR) & 0x01 == 0


# --- transmit ----------------------------------------------------------------------------------


def test_thre_interrupt_is_cleared_by_iir_and_raised_by_thr(dev: Wired) -> None:
    dev.w(IER, 0x02)
    assert dev.line == 1
    assert dev.r(IIR) == 0x02
    assert dev.line == 0
    assert dev.r(IIR) == 0x01
    dev.w(THR, ord("x"))
    assert dev.line == 1
    assert dev.r(IIR) == 0x02
    dev.w(THR, ord("y"))
    dev.w(IER, 0)
    assert dev.line == 0
    assert dev.levels == [1, 0, 1, 0, 1, 0], "told of changes only"


def test_a_line_goes_out_at_its_newline(dev: Wired) -> None:
    for byte in b"login":
        dev.w(THR, byte)
    assert dev.sent == []
    dev.w(THR, ord("\n"))
    assert dev.sent == [b"login\n"]


@pytest.mark.parametrize(
    "after",
    [
        pytest.param([(IER, 1)], id="IER write: end of a Linux console write"),
        pytest.param([(IIR, None)], id="IIR read: interrupt handler"),
        pytest.param([(LSR, None), (LSR, None)], id="two LSR reads: polls for input"),
    ],
)
def test_a_prompt_goes_out_at_once(dev: Wired, after: list[tuple[int, int | None]]) -> None:
    for byte in b"$ ":
        dev.r(LSR)
        dev.w(THR, byte)
    assert dev.sent == []
    for offset, value in after:
        if value is None:
            dev.r(offset)
        else:
            dev.w(offset, value)
    assert dev.sent == [b"$ "]


def test_output_without_any_newline_is_bounded(dev: Wired) -> None:
    for _ in range(OUTPUT_LIMIT):
        dev.w(THR, ord("a"))
    assert dev.output == b"a" * OUTPUT_LIMIT


def test_notify_pending_tells_once_until_flush(dev: Wired) -> None:
    told: list[int] = []
    dev.uart.notify_pending(lambda: told.append(1))
    dev.w(THR, ord("a"))
    dev.w(THR, ord("b"))
    assert told == [1]
    dev.uart.flush()
    assert dev.output == b"ab"
    dev.w(THR, ord("c"))
    assert told == [1, 1]
    dev.uart.notify_pending(None)
    dev.uart.flush()
    dev.w(THR, ord("d"))
    assert told == [1, 1]


def test_write_many_is_as_single_writes() -> None:
    for setup in ([], [(IER, 2)], [(LCR, 0x80)], [(FCR, 1), (MCR, 0x10)]):
        one, many = Wired(), Wired()
        for offset, value in setup:
            one.w(offset, value)
            many.w(offset, value)
        for byte in b"ab\ncd":
            one.w(THR, byte)
        many.uart.write_many(b"ab\ncd")
        one.uart.flush()
        many.uart.flush()
        assert one.uart.save() == many.uart.save(), setup
        assert one.output == many.output, setup
        assert one.line == many.line


def test_on_thri_is_told_when_coalescing_must_stop(dev: Wired) -> None:
    told: list[bool] = []
    dev.uart.on_thri = told.append
    for value in (0x01, 0x03, 0x07, 0x05, 0x00):
        dev.w(IER, value)
    assert told == [True, False]


# --- receive -----------------------------------------------------------------------------------


def test_receive_interrupt_and_data(fifo: Wired) -> None:
    fifo.uart.receive(b"ok")
    assert fifo.line == 1
    assert fifo.r(IIR) == 0xCC, "below the trigger: character time-out"
    assert fifo.r(LSR) & 1
    assert bytes([fifo.r(RBR), fifo.r(RBR)]) == b"ok"
    assert fifo.line == 0
    assert (fifo.r(LSR) & 1, fifo.r(IIR)) == (0, 0xC1)


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_levels(fifo: Wired, fcr: int, trigger: int) -> None:
    fifo.w(FCR, fcr)
    fifo.uart.receive(bytes(trigger))
    assert fifo.r(IIR) == 0xC4
    fifo.r(RBR)
    assert fifo.r(IIR) == (0xCC if trigger > 1 else 0xC1)


def test_input_beyond_the_fifo_waits_and_nothing_is_lost(fifo: Wired) -> None:
    text = bytes(range(256)) * 10
    fifo.uart.receive(text)
    assert fifo.uart.backlog == len(text)
    got = bytearray()
    while fifo.r(LSR) & 1:
        got.append(fifo.r(RBR))
    assert got == text
    assert fifo.uart.backlog == 0


def test_without_fifo_one_byte_at_a_time(dev: Wired) -> None:
    dev.w(MCR, RTS)
    dev.w(IER, 0x01)
    dev.uart.receive(b"ab")
    assert dev.r(IIR) == 0x04
    assert dev.r(RBR) == ord("a")
    assert dev.line == 1
    assert dev.r(RBR) == ord("b")
    assert dev.line == 0


def test_input_survives_linux_opening_its_console(dev: Wired) -> None:
    """serial8250_do_startup clears the FIFOs and reads RX twice; then RTS is raised."""
    dev.uart.receive(b"poweroff\n")
    for _ in range(2):
        for value in (0x01, 0x07, 0x00):
            dev.w(FCR, value)
        for offset in (LSR, RBR, IIR, MSR):
            dev.r(offset)
    dev.w(FCR, 0x81)
    dev.w(IER, 0x05)
    dev.w(MCR, 0x0B)
    got = bytearray()
    while dev.r(LSR) & 1:
        got.append(dev.r(RBR))
    assert got == b"poweroff\n"


def test_a_polling_guest_gets_input(dev: Wired) -> None:
    dev.uart.receive(b"hi")
    got = bytearray()
    for _ in range(8):
        if dev.r(LSR) & 1:
            got.append(dev.r(RBR))
    assert got == b"hi"


def test_fifo_reset_drops_what_is_in_it(fifo: Wired) -> None:
    fifo.uart.receive(b"0123456789abcdefREST")
    fifo.w(FCR, 0x83)
    assert fifo.r(RBR) == ord("R")


def test_empty_rbr_reads_zero(fifo: Wired) -> None:
    assert fifo.r(RBR) == 0


def test_break_is_a_nul_with_bi_in_its_place(fifo: Wired) -> None:
    fifo.uart.receive(b"a")
    fifo.uart.send_break()
    fifo.uart.receive(b"h")
    assert fifo.r(LSR) & 0x91 == 0x81, "an error is in the FIFO, not at its top"
    assert fifo.r(RBR) == ord("a")
    assert fifo.r(IIR) == 0xC6, "line status first"
    assert fifo.r(LSR) & 0x11 == 0x11
    assert fifo.r(LSR) & 0x91 == 0x01, "cleared by the read"
    assert (fifo.r(RBR), fifo.r(RBR)) == (0, ord("h"))
    assert fifo.line == 0


def test_interrupt_priorities(fifo: Wired) -> None:
    fifo.w(IER, 0x0F)
    fifo.w(MCR, 0x1F)
    fifo.w(MCR, 0x0B)  # RI falls: a modem status delta
    fifo.w(IER, 0x0D)
    fifo.w(IER, 0x0F)
    fifo.uart.send_break()
    order = []
    for clear in (LSR, RBR, IIR, MSR, IIR):
        order.append(fifo.r(IIR) & 0x0F)
        fifo.r(clear)
    assert order == [0x06, 0x0C, 0x02, 0x00, 0x01]
    assert fifo.line == 0


# --- loopback, modem status ------------------------------------------------------------------


def test_loopback_returns_what_is_sent(fifo: Wired) -> None:
    fifo.w(MCR, 0x1B)
    for byte in b"loop":
        fifo.w(THR, byte)
    fifo.uart.receive(b"outside")
    assert bytes(fifo.r(RBR) for _ in range(4)) == b"loop"
    assert fifo.r(LSR) & 1 == 0, "the wire is cut"
    fifo.uart.flush()
    assert fifo.output == b""
    fifo.w(MCR, 0x0B)
    assert bytes(fifo.r(RBR) for _ in range(7)) == b"outside"


def test_loopback_overrun(fifo: Wired) -> None:
    fifo.w(MCR, 0x10)
    for byte in range(FIFO_SIZE + 1):
        fifo.w(THR, byte)
    assert fifo.r(LSR) & 0x02
    assert fifo.r(LSR) & 0x02 == 0
    assert [fifo.r(RBR) for _ in range(FIFO_SIZE)] == list(range(FIFO_SIZE))


@pytest.mark.parametrize(
    ("mcr", "msr"), [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1F, 0xF0)]
)
def test_loopback_modem_lines(dev: Wired, mcr: int, msr: int) -> None:
    dev.w(MCR, mcr)
    assert dev.r(MSR) & 0xF0 == msr


def test_modem_deltas_raise_and_a_read_clears(dev: Wired) -> None:
    dev.w(MCR, 0x1F)
    dev.r(MSR)
    dev.w(IER, 0x08)
    assert dev.line == 0
    dev.w(MCR, 0x1B)  # OUT1 falls: RI's trailing edge
    assert dev.line == 1
    assert dev.r(IIR) == 0x00
    assert dev.r(MSR) == 0xB4
    assert dev.line == 0
    dev.w(MCR, 0x1F)
    assert dev.r(MSR) == 0xF0, "RI's leading edge tells nothing"


# --- life cycle ------------------------------------------------------------------------------


def test_save_and_restore_in_the_middle_of_input(fifo: Wired) -> None:
    fifo.uart.receive(b"0123456789abcdefgh")
    fifo.uart.send_break()
    fifo.r(RBR)
    fifo.w(SCR, 0x42)
    state = fifo.uart.save()
    other = Wired()
    other.uart.restore(state)
    assert other.uart.save() == state
    assert other.line == 1
    got = bytearray()
    while (lsr := other.r(LSR)) & 1:
        got.append(other.r(RBR))
    assert got == b"123456789abcdefgh\0"
    assert other.r(SCR) == 0x42
    assert lsr & 0x60 == 0x60


def test_reset_keeps_unread_host_input(fifo: Wired) -> None:
    fifo.uart.receive(b"x" * 20)
    fifo.uart.reset()
    assert fifo.line == 0
    assert (fifo.r(IER), fifo.r(MCR), fifo.r(IIR)) == (0, 0, 1)
    assert fifo.uart.backlog == 4


def test_vcpus_and_input_at_the_same_time() -> None:
    dev = Wired()
    dev.w(FCR, 0x81)
    dev.w(MCR, 0x0B)
    count = 3000

    def vcpu(byte: int) -> None:
        for _ in range(count):
            dev.r(LSR)
            dev.w(THR, byte)

    def host() -> None:
        for _ in range(count):
            dev.uart.receive(b"i")

    threads = [threading.Thread(target=vcpu, args=(byte,)) for byte in b"AB"]
    threads.append(threading.Thread(target=host))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dev.uart.flush()
    assert (dev.output.count(b"A"), dev.output.count(b"B")) == (count, count)
    assert dev.uart.backlog == count
