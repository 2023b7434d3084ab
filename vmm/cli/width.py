"""How wide a text for a person may be, and texts made to fit."""

from __future__ import annotations

import os

from vmm.cli.say import STDOUT

USUAL, NARROWEST, WIDEST = 80, 32, 100
"""Columns: where standard output is no terminal, and the bounds of what a terminal is believed."""


def columns() -> int:
    """Columns of standard output: COLUMNS of the environment, the terminal's, or USUAL."""
    said = os.environ.get("COLUMNS", "")
    wide = int(said) if said.isascii() and said.isdecimal() and len(said) < 6 else 0
    if not wide:
        try:
            wide = os.get_terminal_size(STDOUT).columns
        except (OSError, ValueError):
            wide = 0
    return min(max(wide, NARROWEST), WIDEST) if wide else USUAL


def fit(text: str, width: int) -> str:
    """`text` with its longer lines folded at spaces to `width`, continued under their words. A
    paragraph without indents in which a line is longer is filled anew."""
    from textwrap import wrap

    lines: list[str] = []
    for line in _filled(text.split("\n"), width):
        if len(line) <= width:
            lines.append(line)
            continue
        words = line.lstrip()
        first = line[: min(len(line) - len(words), width // 2)]
        hanging = len("usage: ") if words.startswith("usage: ") else len(first) + 2 * bool(first)
        lines += wrap(
            words, width, initial_indent=first, subsequent_indent=" " * hanging,
            break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def _filled(lines: list[str], width: int) -> list[str]:
    """`lines`, where those of a paragraph that does not fit are one."""
    found: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        plain = line and not line[0].isspace() and not line.startswith("usage: ")
        if plain and not line.endswith(":"):
            paragraph.append(line)
            continue
        if paragraph:
            whole = max(map(len, paragraph)) <= width
            found += paragraph if whole else [" ".join(paragraph)]
            paragraph = []
        found.append(line)
    return found[:-1]
