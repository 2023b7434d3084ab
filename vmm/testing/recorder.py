"""What a test does with a machine and what the machine prints, with times, in bounded memory."""

from __future__ import annotations

import functools
import subprocess
import time
from bisect import bisect_right
from collections import deque

from vmm.console.tail import ConsoleTail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm import Machine
    from vmm.agent.process import GuestProcess

HEAD, TAIL = 256 << 10, 1 << 20
"""Bytes of the console's first and last output that are kept."""
WRITES = 20_000
"""Of so many of the writes that made each the time is known."""
CALLS = 1000
WORDS_MAX = 400
"""Characters of a command, or of its output, that are kept."""


class Call:
    """One call on a machine: a command, a copied file, a wait for the console.

    Attributes:
        what: `run`, `popen`, `put`, `get`, `send`, `wait`.
        words: its arguments, for a person.
        begun, ended: seconds of CLOCK_MONOTONIC; `ended` is None while it goes on.
        result: how it ended, in a few words.
        failed: it raised, or the command's status is not 0.
        output: the beginning of what a command wrote.
        process: what `popen` gave.
    """

    __slots__ = ("begun", "ended", "failed", "output", "process", "result", "what", "words")

    def __init__(self, what: str, words: str) -> None:
        self.what = what
        self.words = words
        self.begun = time.monotonic()
        self.ended: float | None = None
        self.result = ""
        self.failed = False
        self.output = ""
        self.process: GuestProcess | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain data, `event` being `call`."""
        return {
            "event": "call", "time": self.begun, "call": self.what, "arguments": self.words,
            "ended": self.ended, "result": self.result, "failed": self.failed,
            "output": self.output,
        }  # fmt: skip


class Recorder:
    """The record of one machine.

    Attributes:
        marks: when the machine was asked for (`asked`), was built (`built`), printed its first byte
            (`first byte`), and its agent first answered (`agent`); seconds of CLOCK_MONOTONIC.
        calls: the last calls.
        on_clones: told of the machine's clones, and when they were asked for.
    """

    def __init__(self, asked: float) -> None:
        self.marks = {"asked": asked}
        self.on_clones: Callable[[list[Machine], float], object] | None = None
        self.calls: deque[Call] = deque(maxlen=CALLS)
        self._head = bytearray()
        self._tail = ConsoleTail(TAIL)
        self._first_writes: list[tuple[int, float]] = []  # position, time
        self._writes: deque[tuple[int, float]] = deque(maxlen=WRITES)

    def follow(self, machine: Machine) -> None:
        """Record what `machine`, which was built just now, prints, and the calls on it."""
        self.marks["built"] = time.monotonic()
        assert machine.event_log is not None  # asked for: from now on the log keeps more
        self._hook(machine.console, "write", self._console)
        for name in ("run", "popen", "put", "get", "send"):
            self._hook(machine, name, functools.partial(self._call, name, machine))
        self._hook(machine, "clone", self._clone)
        self._hook(machine, "wait_for_agent", functools.partial(self._agent, machine))
        self._hook(machine.console, "wait_for", functools.partial(self._call, "wait", machine))

    @staticmethod
    def _hook(thing: Any, name: str, hook: Callable[..., Any]) -> None:
        original = getattr(thing, name)

        @functools.wraps(original)
        def hooked(*args: Any, **options: Any) -> Any:
            __tracebackhide__ = True
            return hook(original, *args, **options)

        setattr(thing, name, hooked)

    # --- the console ------------------------------------------------------------------------------

    def _console(self, write: Callable[[bytes], None], data: bytes) -> None:
        now = time.monotonic()
        position = self._tail.position
        if not position:
            self.marks["first byte"] = now
        if len(self._head) < HEAD:
            self._head += data[: HEAD - len(self._head)]
            if len(self._first_writes) < WRITES:
                self._first_writes.append((position, now))
        self._writes.append((position, now))
        self._tail.write(data)
        write(data)

    def console(self) -> bytes:
        """Its output; where there was too much, a line in the middle says what is left out."""
        head, missing, tail = self._parts()
        return head + (b"\n[... %d bytes are left out ...]\n" % missing if missing else b"") + tail

    def _parts(self) -> tuple[bytes, int, bytes]:
        """The first output, how many bytes are missing after it, and the last output."""
        tail = self._tail.bytes()
        begin = self._tail.position - len(tail)
        head = bytes(self._head[:begin])
        return head, begin - len(head), tail

    def lines(self) -> list[tuple[float, str]]:
        """(time, text) of the lines that are kept: when each began to be printed, as far as that
        is known."""
        head, missing, tail = self._parts()
        if not missing:
            return _timed(head + tail, 0, [*self._first_writes, *self._writes])
        found = _timed(head, 0, self._first_writes)
        found.append((found[-1][0], f"[... {missing} bytes are left out ...]"))
        return found + _timed(tail, len(head) + missing, list(self._writes))

    def settle(self) -> None:
        """Note how the commands of `popen` have ended, as far as the test knows; others go on."""
        for call in list(self.calls):
            if call.process is not None:
                status = call.process.returncode
                if status is None:
                    call.ended, call.result = None, "has not ended"
                else:
                    call.ended = call.ended or time.monotonic()
                    call.result, call.failed = f"status {status}", status != 0

    # --- calls ------------------------------------------------------------------------------------

    def _agent(
        self, machine: Machine, wait: Callable[..., None], *args: Any, **options: Any
    ) -> None:
        __tracebackhide__ = True
        wait(*args, **options)
        self.marks.setdefault("agent", time.monotonic())

    def _clone(
        self, clone: Callable[..., list[Machine]], *args: Any, **options: Any
    ) -> list[Machine]:
        __tracebackhide__ = True
        asked = time.monotonic()
        clones = clone(*args, **options)
        if self.on_clones is not None:
            self.on_clones(clones, asked)
        return clones

    def _call(
        self, what: str, machine: Machine, function: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        __tracebackhide__ = True
        call = Call(what, _words(args))
        self.calls.append(call)
        try:
            result = function(*args, **options)
        except BaseException as err:
            call.failed = True
            call.result = f"{type(err).__name__}: {err}"[:WORDS_MAX]
            raise
        else:
            if isinstance(result, subprocess.CompletedProcess):
                call.failed = result.returncode != 0
                call.result = f"status {result.returncode}"
                call.output = _output(result)
            elif what == "popen":
                call.process = result
            elif isinstance(result, str):
                call.result = result[:WORDS_MAX]
            return result
        finally:
            call.ended = time.monotonic()
            if what in ("run", "popen", "put", "get") and _answers(machine):
                self.marks.setdefault("agent", call.ended)


def _timed(data: bytes, position: int, writes: list[tuple[int, float]]) -> list[tuple[float, str]]:
    """The lines of `data`, the first of which is at `position`, with the times of `writes`."""
    writes = sorted(writes)
    found = []
    lines = data.split(b"\n")
    for number, raw in enumerate(lines):
        if raw or number < len(lines) - 1:
            at = bisect_right(writes, (position, float("inf"))) - 1
            found.append((writes[max(at, 0)][1], _text(raw.rstrip(b"\r"))))
        position += len(raw) + 1
    return found


def _answers(machine: Machine) -> bool:
    try:
        return machine._agent().ready
    except Exception:
        return False


def _words(args: tuple[Any, ...]) -> str:
    """The first arguments of a call, for a person."""
    import os
    import shlex

    if not args:
        return ""
    first = args[0]
    if isinstance(first, (list, tuple)):
        text = shlex.join(_text(word) for word in first[:100])
    elif isinstance(first, (str, bytes, os.PathLike)):
        text = " ".join(_text(word) for word in args[:2] if not isinstance(word, (int, float)))
    else:
        text = repr(first)
    return text[:WORDS_MAX]


def _output(result: subprocess.CompletedProcess[Any]) -> str:
    parts = [_text(part).rstrip() for part in (result.stdout, result.stderr) if part]
    return "\n".join(part[:WORDS_MAX] for part in parts if part)


def _text(value: object) -> str:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value[: 4 * TAIL]).decode("utf-8", "replace")
    return str(value)
