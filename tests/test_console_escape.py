"""vmm.console.escape: what is typed, split into bytes and actions."""

from __future__ import annotations

import pytest

from vmm.console.escape import BREAK, END, HELP, EscapeParser

TABLE: list[tuple[str, list[bytes], list[bytes | str]]] = [
    ("plain", [b"ls\r"], [b"ls\r"]),
    ("nothing", [b""], []),
    ("end", [b"\x01x"], [END]),
    ("help", [b"\x01h"], [HELP]),
    ("break", [b"\x01c"], [BREAK]),
    ("twice is itself", [b"\x01\x01"], [b"\x01"]),
    ("a is itself", [b"\x01a"], [b"\x01"]),
    ("itself in a text", [b"ab\x01\x01cd"], [b"ab\x01cd"]),
    ("order is kept", [b"a\x01cb\x01hc"], [b"a", BREAK, b"b", HELP, b"c"]),
    ("over two reads", [b"a\x01", b"xb"], [b"a", END, b"b"]),
    ("over three reads", [b"\x01", b"", b"\x01"], [b"\x01"]),
    ("unknown is swallowed", [b"a\x01zb"], [b"ab"]),
    ("an x alone is an x", [b"x"], [b"x"]),
    ("after itself no escape", [b"\x01\x01x"], [b"\x01x"]),
    ("all other bytes pass", [bytes(range(2, 256))], [bytes(range(2, 256))]),
]


@pytest.mark.parametrize(("reads", "parts"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_table(reads: list[bytes], parts: list[bytes | str]) -> None:
    parser = EscapeParser()
    assert [part for data in reads for part in parser.feed(data)] == parts
