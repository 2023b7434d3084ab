"""Bugs to plant: the fuzzers' own test is that they find them.

A planted bug is a change of one check, by search and replace, in a copy of the source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Planted:
    """One bug: in `file` each of `changes`, (what stands there once, what comes instead).

    by: the targets that are to find it.
    """

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    by: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The source `text` with the bug; AssertionError where it does not fit any more."""
        for old, new in self.changes:
            assert text.count(old) == 1, f"{self.name}: {text.count(old)} of {old!r} in {self.file}"
            text = text.replace(old, new)
        return text

    def __str__(self) -> str:
        return self.name


def bug(name: str, file: str, by: str, *changes: str) -> Planted:
    """A bug found `by` some targets; `changes` are old and new text in turn."""
    pairs = tuple(zip(changes[::2], changes[1::2], strict=True))
    return Planted(name, file, pairs, tuple(by.split()))
