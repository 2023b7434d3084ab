"""A machine looked at when its test fails: in bounded time, and left as it was found."""

from __future__ import annotations

import time
import unicodedata
from contextlib import suppress

from vmm import VmmError, report
from vmm.testing.bounded import LateError, vcpu_stacks, within

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm import Machine
    from vmm.events import Event
    from vmm.testing.recorder import Recorder

LOOK_WITHIN = 2.0
"""Seconds in which every vCPU comes out of the guest, or its registers are left out."""
CONSOLE_LINES, EVENTS, CALLS = 40, 20, 10
"""How much of each a failure report shows."""


class Look:
    """What `machine` is now.

    Attributes:
        name: what reports call it.
        time: when, seconds of CLOCK_MONOTONIC.
        state: its state, and why it ended or is paused.
        console: the last of its output.
        events: the last of its events.
        registers: of every vCPU, as text; or the report it ended with, then `reported` is True; or
            why there are none.
    """

    def __init__(self, machine: Machine, name: str, recorder: Recorder | None = None) -> None:
        self.machine = machine
        self.name = name
        self.recorder = recorder
        self.time = time.monotonic()
        self.state = machine.state
        self.console = ""
        self.events: list[Event] = []
        self.registers = ""
        self.reported = False
        self._abandoned = False
        self._paused = False
        if recorder is not None:
            recorder.settle()
        try:
            within(LOOK_WITHIN, self._gather)
        except LateError:
            self._abandoned = True
            stacks = "\n".join(vcpu_stacks(machine)) or "its vCPUs have ended"
            self.registers = f"not to be had within {LOOK_WITHIN:g} s\n{stacks}"
            if self._paused:
                with suppress(LateError, VmmError):
                    within(LOOK_WITHIN, self._resume)
        except Exception as err:
            self.registers = f"not to be had: {type(err).__name__}: {err}"

    def _gather(self) -> None:
        machine = self.machine
        if machine.state == "running":
            machine.flush()
        self.console = machine.console.text()
        self.events = machine.event_log  # before the pause for the registers is in it
        exit = machine.exit
        if exit is not None:
            self.state += f" ({exit.message}, status {exit.status})"
        elif machine.paused_for:
            self.state += f" ({machine.paused_for})"
        if exit is not None and exit.report:
            self.registers, self.reported = exit.report, True
        elif machine.state != "closed":
            self._read_registers()

    def _read_registers(self) -> None:
        machine = self.machine
        texts = []
        try:
            if machine.state == "running":
                self._paused = True
                machine.pause()
            machine.wait_parked()
            if self._abandoned:
                return
            for vcpu in machine.vcpus:
                regs, sregs = report.registers(vcpu.get_regs(), vcpu.get_sregs())
                texts.append(f"vCPU {vcpu.number}: {report.mode(regs, sregs)[0]}")
                texts += report.register_lines(regs, sregs)
        except VmmError as err:  # it ended just now
            texts.append(str(err))
        finally:
            if self._paused and not self._abandoned:
                self._resume()
        self.registers = "\n".join(texts)

    def _resume(self) -> None:
        if self.machine.state == "paused":
            with suppress(VmmError):
                self.machine.resume()

    def sections(self) -> list[tuple[str, str]]:
        """(title, text) for a terminal: console, calls, events, registers."""
        found = []
        lines = self.console.replace("\r", "").splitlines()[-CONSOLE_LINES:]
        if lines:
            text = "\n".join(map(printable, lines))
            found.append((f"{self.name}: console, last {len(lines)} lines", text))
        started = self.machine.started_at or (self.recorder.marks["asked"] if self.recorder else 0)
        log = [f"{e.time - started:+10.3f} s  {printable(e)}" for e in self.events[-EVENTS:]]
        text = "\n".join([*log, f"state: {printable(self.state)}"])
        found.append((f"{self.name}: events", text))
        calls = list(self.recorder.calls)[-CALLS:] if self.recorder else []
        if calls:
            texts = []
            for call in calls:
                took = f"{call.ended - call.begun:.3f} s" if call.ended else "goes on"
                what = f"{call.what} {call.words}: {call.result or 'done'}, {took}"
                texts.append(f"{call.begun - started:+10.3f} s  {one_line(what)}")
            found.append((f"{self.name}: calls, last {len(calls)}", "\n".join(texts)))
        if self.registers:
            title = "failure report" if self.reported else "registers"
            found.append((f"{self.name}: {title}", self.registers))
        return found


def one_line(value: object) -> str:
    """`printable`, in one line."""
    return printable(value).replace("\n", "\u240a")


def printable(value: object) -> str:
    """Text of a guest for a terminal or a page: characters that would do something there (escape
    sequences, changes of direction) become visible, and do nothing."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\t\n":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return f"\\u{code:04x}"
    return character
