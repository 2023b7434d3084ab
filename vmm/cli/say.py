"""What the command says: answers on standard output, lines that begin with `vmm:` on error.

Written straight to the descriptors. Nothing is left in a buffer for the interpreter to fail on
at its end (status 120, which is a guest's panic here); a line about odd text (a file name, a
guest's own words) stays one line.
"""

from __future__ import annotations

import os

from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.machine import Machine

STDOUT, STDERR = 1, 2
LONGEST = 1000
"""Characters of a line; what is over is cut out of its middle."""
CHUNK = 4096
"""Bytes that a pipe or terminal which says it is ready takes without waiting (PIPE_BUF)."""
PATIENCE_MS = 1000
"""How long a line waits for who reads standard error. Lines that guests bring about come in vCPUs'
and devices' threads, and the last one before the end: none of them may wait for ever."""
_stuck = False
"""Nobody read it for that long: lines are dropped until somebody does."""
before_line: Callable[[], object] | None = None
"""Called before something is written to standard error: a status line takes itself away."""


def say(message: str) -> None:
    """One line on standard error."""
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    if not message.isprintable():
        message = "".join(map(_visible, message))
    write_error(f"vmm: {message}\n")


def end_guests_line(machine: Machine) -> None:
    """Before a line of ours: end the line the guest has left unfinished on the same terminal."""
    last = machine.console.bytes()[-1:]
    shown = machine.config.console == "auto" and os.isatty(STDOUT) and os.isatty(STDERR)
    if shown and last not in (b"", b"\n"):
        write_error("\n")


def write_error(text: str) -> None:
    """`text` as it is on standard error; nothing happens where nobody listens, and what nobody
    reads is dropped."""
    global _stuck
    if before_line is not None:
        before_line()
    import select

    poll = select.poll()
    poll.register(STDERR, select.POLLOUT)
    data = text.encode("utf-8", "backslashreplace")
    try:
        while data:
            if not poll.poll(0 if _stuck else PATIENCE_MS):
                _stuck = True
                return
            _stuck = False
            data = data[os.write(STDERR, data[:CHUNK]) :]
    except OSError:
        return


def answer(text: str) -> None:
    """`text` on standard output, what the person asked for.

    Raises:
        BrokenPipeError: the reader has gone.
        HostError: it cannot be written (a full disk, a closed descriptor).
    """
    try:
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(STDOUT, data) :]
    except BrokenPipeError:
        raise
    except OSError as err:
        raise HostError(f"standard output: {err.strerror}") from None


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
