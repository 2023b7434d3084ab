"""Words of a guest in messages of ours, which end on terminals and in logs.

An exception's text, or `repr` of a machine, is printed as it is by a traceback: a guest's escape
sequences must not get that far.
"""

from __future__ import annotations

LONGEST = 400
"""Characters that a message repeats."""


def visible(text: str) -> str:
    """`text` in one line, at most LONGEST characters of it; what is not printable (escape
    sequences, changes of direction, ends of lines) as Python's escapes."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ..."
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
