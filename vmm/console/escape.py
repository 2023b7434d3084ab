"""The escape key of an interactive console: Ctrl-A and one more key.

The keys are those of `qemu -nographic` where it has them.
"""

from __future__ import annotations

ESCAPE = 0x01
"""Ctrl-A."""

END = "end"
HELP = "help"
BREAK = "break"

ACTIONS = {
    ord("x"): END,
    ord("X"): END,
    ord("h"): HELP,
    ord("?"): HELP,
    ord("c"): BREAK,
    ord("b"): BREAK,
}
LITERAL = (ESCAPE, ord("a"))

HELP_TEXT = """
Ctrl-A x   end the machine now
Ctrl-A c   send a break (Linux: the next key is a SysRq)
Ctrl-A a   send Ctrl-A itself (as does Ctrl-A Ctrl-A)
Ctrl-A h   this help
"""


class EscapeParser:
    """Splits what is typed into bytes for the guest and actions for the monitor."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> list[bytes | str]:
        """Bytes for the guest and actions (END, HELP, BREAK), in the order they were typed.

        A key that means nothing after Ctrl-A is swallowed with it. Ctrl-A may be the last byte
        of one call and its key the first of the next.
        """
        if not self._escaped and ESCAPE not in data:
            return [data] if data else []
        parts: list[bytes | str] = []
        plain = bytearray()
        for key in data:
            if not self._escaped:
                if key == ESCAPE:
                    self._escaped = True
                else:
                    plain.append(key)
                continue
            self._escaped = False
            if key in LITERAL:
                plain.append(ESCAPE)
            elif key in ACTIONS:
                if plain:
                    parts.append(bytes(plain))
                    plain.clear()
                parts.append(ACTIONS[key])
        if plain:
            parts.append(bytes(plain))
        return parts
