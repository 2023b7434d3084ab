"""Calls from the program to its machine's process, and what comes from there unasked.

Nothing that comes is trusted: a frame that breaks the rules ends the process, as does one that does
not come in time.
"""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from contextlib import suppress

from vmm.errors import HostError, StateError
from vmm.forked import drop_in_child
from vmm.isolated import nursery, values, wire
from vmm.isolated.wire import Channel, LateError, Patience, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    class Owner(Protocol):
        """What hears of a machine's process."""

        def absorb(self, stamp: list[Any]) -> None:
            """The machine's state, as of a stamp whose shape was checked."""

        def happened(self, frame: dict[str, Any], data: bytes) -> None:
            """A frame that came unasked. Raises WireError where it is none."""

        def lost(self, why: str) -> None:
            """The process has ended, or was ended: `why` in words."""


QUICK = 1.0
"""Seconds a call may take that has nothing to do but to park vCPUs, or to end them."""
USUAL = 10.0
"""Seconds any other call may take."""
LONG = 600.0
"""Seconds a call may take that reads or writes all of memory or a disk, or makes the machine."""
CATCH_UP = 1.0
"""Seconds a call waits at most for events that happened before it was answered."""
IDLE_MAX = 4
"""Connections kept for the next calls."""
CALLS_MAX = 256
"""Calls under way at once."""
END_WITHIN = 0.4


class MachineProcess:
    """The process of one machine, made by `make`.

    Attributes:
        process: it.
        over: why it takes no calls any more; empty while it does.
    """

    def __init__(self) -> None:
        self.process = nursery.start()
        self._functions: dict[object, float] = {}
        """When each function of the program, which runs now, was called."""
        self.over = ""
        self._owner: Callable[[], Owner | None] = lambda: None
        self._idle: list[Channel] = []
        self._calls = threading.BoundedSemaphore(CALLS_MAX)
        self._lock = threading.Lock()
        self._done = 0
        """The number of the last frame that came unasked and was dealt with."""
        self._telling = False
        """A frame is being dealt with; a listener that it is told may take its time."""
        self._caught_up = threading.Condition()
        self._reader: threading.Thread | None = None

    def make(self, message: dict[str, Any]) -> dict[str, Any]:
        """Have it make the machine; what it says of that. Raises what making the machine raises."""
        patience = Patience(LONG)
        try:
            self.process.control.send(message, patience=patience)
            answer, _, fds = self.process.control.receive(patience)
            wire.close_all(fds)
        except WireError as err:
            self.process.kill()
            self.process.wait(END_WITHIN)
            raise HostError(f"the machine's process {self._how(str(err))}") from None
        if not isinstance(answer, dict):
            raise WireError("an answer that is none")
        if "error" in answer:
            raise values.unpack_error(answer["error"])
        facts = answer.get("ok")
        if not isinstance(facts, dict):
            raise WireError("an answer that is none")
        return facts

    def listen(self, owner: Callable[[], Owner | None]) -> None:
        """Begin to hear events; `owner` gives who is told, or None once nobody is."""
        self._owner = owner
        self._reader = threading.Thread(target=self._read, name="vmm-isolated", daemon=True)
        self._reader.start()

    # --- functions of the program -----------------------------------------------------------------

    def function_begins(self) -> object:
        """A function of the program is called; what `function_ends` wants."""
        token = object()
        self._functions[token] = time.monotonic()
        return token

    def function_ends(self, token: object) -> None:
        """It has returned."""
        del self._functions[token]

    def _waits_for_the_program(self) -> bool:
        """Whether a function of the program runs for longer than one wait: many quick calls are no
        reason for the process to be late."""
        since = time.monotonic() - wire.SLICE
        return any(begun < since for begun in list(self._functions.values()))

    # --- calls ------------------------------------------------------------------------------------

    def call(
        self,
        name: str,
        *args: Any,
        data: bytes | memoryview = b"",
        fds: Sequence[int] = (),
        seconds: float = 0.0,
        want: int = 0,
    ) -> Any:
        """What the call `name` gives: plain data, bytes, or `want` descriptors (a list).

        Args:
            seconds: it may take; 0: USUAL.

        Raises:
            HostError: the process has gone, or did not answer in time and was killed.
            Exception: what the call raises there.
        """
        if self.over:
            raise self.gone(name)
        seconds = seconds or USUAL
        patience = Patience(seconds, self._waits_for_the_program)
        with self._calls:
            channel = self._channel(name, patience)
            came: list[int] = []
            answered = False
            try:
                channel.send({"call": name, "args": args}, data, fds, patience)
                answer, out, came = channel.receive(patience)
                answered = True
                result = self._result(answer, out, came, want)
            except LateError:
                channel.close()
                self.end(f"did not answer {name} within {seconds:g} s, and was killed")
                raise self.gone(name) from None
            except WireError as err:
                wire.close_all(came)
                channel.close()
                self._broken(str(err))
                raise self.gone(name) from None
            except BaseException:
                if answered:  # what it raised there
                    self._keep(channel)
                else:  # Ctrl-C: its answer is still to come
                    channel.close()
                raise
            self._keep(channel)
        return result

    def _result(self, answer: Any, out: bytes, came: list[int], want: int) -> Any:
        if not isinstance(answer, dict) or len(came) not in (0, want):
            raise WireError("an answer that is none")
        mark = answer.get("mark")
        if type(mark) is not int:
            raise WireError("an answer without its mark")
        self._catch_up(mark)
        self._absorb(answer.get("stamp"))
        if "error" in answer:
            wire.close_all(came)
            err = values.unpack_error(answer["error"])
            came.clear()
            raise err
        if want:
            if len(came) != want:
                raise WireError("an answer without its descriptors")
            return came
        return answer.get("ok", out)

    def _channel(self, name: str, patience: Patience) -> Channel:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        ours, theirs = wire.pair()
        drop_in_child(ours)
        try:
            with self._lock:
                self.process.control.send({"connect": 1}, fds=[theirs.fileno()], patience=patience)
        except (WireError, LateError) as err:
            ours.close()
            self._broken(str(err))
            raise self.gone(name) from None
        finally:
            theirs.close()
        return Channel(ours)

    def _keep(self, channel: Channel) -> None:
        with self._lock:
            if len(self._idle) < IDLE_MAX and not self.over:
                self._idle.append(channel)
                return
        channel.close()

    def _catch_up(self, mark: int) -> None:
        """Wait until what happened before was dealt with; not for long: a listener may be slow.
        Raises LateError where the process does not tell of it."""
        if threading.current_thread() is self._reader:
            return
        with self._caught_up:
            for _ in range(round(CATCH_UP / wire.SLICE)):
                if self._done >= mark or self.over:
                    return
                self._caught_up.wait(wire.SLICE)
            if self._done < mark and not self._telling:
                raise LateError("its events do not come")

    def _absorb(self, stamp: Any) -> None:
        """Hand a stamp on: [number, state, why paused, None or [kind, message, status, report]]."""
        if (
            not isinstance(stamp, list) or len(stamp) != 4 or type(stamp[0]) is not int
            or stamp[1] not in STATES or not _text(stamp[2])
        ):  # fmt: skip
            raise WireError("a state that is none")
        end = stamp[3]
        if end is not None and not (
            isinstance(end, list) and len(end) == 4 and _text(end[0]) and _text(end[1])
            and type(end[2]) is int and 0 <= end[2] <= 255 and _text(end[3])
        ):  # fmt: skip
            raise WireError("an end that is none")
        owner = self._owner()
        if owner is not None:
            owner.absorb(stamp)

    # --- what comes unasked -----------------------------------------------------------------------

    def _read(self) -> None:
        channel = self.process.stream
        poll = select.poll()
        why = ""
        try:
            poll.register(channel.sock, select.POLLIN)
            while not self.over:
                poll.poll()
                frame, data, fds = channel.receive(Patience(USUAL))
                wire.close_all(fds)
                if not isinstance(frame, dict) or type(frame.get("n")) is not int:
                    raise WireError("a frame that is none")
                if "stamp" in frame:
                    self._absorb(frame["stamp"])
                owner = self._owner()
                if owner is not None:
                    self._telling = True
                    owner.happened(frame, data)
                    self._telling = False
                del owner
                with self._caught_up:
                    self._done = frame["n"]
                    self._caught_up.notify_all()
        except (WireError, LateError) as err:
            why = str(err)
        except (OSError, ValueError) as err:  # the socket is closed: this process is done with it
            why = str(err)
        self._broken(why)

    def _broken(self, why: str) -> None:
        """A connection has ended, or what came on it breaks the rules: the process ends too."""
        if self.over:
            return
        if not self.process.wait(END_WITHIN / 4):
            self.process.kill()
            self.process.wait(END_WITHIN)
        self.end(self._how(why))

    def _how(self, why: str) -> str:
        how = self.process.how()
        if self.process.was_killed:
            return f"broke the rules ({why}), and was killed"
        said = [line for line in self.process.said().splitlines() if line.strip()]
        return f"{how}: {said[-1].strip()[:500]}" if said else how

    def end(self, why: str) -> None:
        """Kill it; whoever waits for it is told `why`."""
        with self._lock:
            if self.over:
                return
            self.over = why
            idle, self._idle = self._idle, []
        self.process.kill()
        for channel in idle:
            channel.close()
        with suppress(OSError):
            self.process.stream.sock.shutdown(socket.SHUT_RDWR)
        with self._caught_up:
            self._caught_up.notify_all()
        owner = self._owner()
        if owner is not None:
            owner.lost(why)

    def gone(self, name: str) -> HostError:
        """That it has gone."""
        return HostError(f"{name}: the machine's process {self.over or 'has gone'}")

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> bool:
        """Let go of a process that is done, or kill it; whether no listener is held up."""
        self.process.control.close()
        if not self.process.wait(END_WITHIN):
            self.process.kill()
            self.process.wait(QUICK)
        reader = self._reader
        done = True
        if reader is not None and reader is not threading.current_thread():
            reader.join(END_WITHIN)
            done = not reader.is_alive()
        with self._lock:
            self.over = self.over or "is closed"
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()
        self.process.close()
        return done


STATES = ("created", "running", "paused", "stopped", "closed")
TEXT_MAX = 128 << 10


def _text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= TEXT_MAX


def moment(value: object) -> float:
    """The time of an event: what the process says, where that can be."""
    now = time.monotonic()
    if isinstance(value, float) and math.isfinite(value) and now - 3600 < value <= now:
        return value
    return now


def need(value: object, kind: type | tuple[type, ...]) -> Any:
    """`value`, where it is of `kind` (True is no number). Raises WireError."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise WireError(f"{type(value).__name__} where something else belongs")
    return value


def closed(name: str) -> StateError:
    """That the machine is closed."""
    return StateError(f"{name}: the machine is closed")
