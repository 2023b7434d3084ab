"""vmm.guest_text: what of a guest's words is in messages."""

from __future__ import annotations

import pytest

from vmm.guest_text import LONGEST, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("as it is: \u00fc \u4e2d", "as it is: \u00fc \u4e2d"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\x9b \u202e \ud800 \U000e0001", "\\x9b \\u202e \\ud800 \\U000e0001"),
        ("x" * LONGEST + "y", "x" * LONGEST + " ..."),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(text).isprintable()
