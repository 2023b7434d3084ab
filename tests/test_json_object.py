"""vmm/json_object.py: whatever another program sends, it is an object or a ValueError."""

from __future__ import annotations

import pytest

from vmm import json_object


def test_an_object() -> None:
    assert json_object.read(b'{"a": [1, null]}') == {"a": [1, None]}
    assert json_object.read("{}") == {}


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"7", b"null", b'"a"', b"{", b"\xff{}", b"\0", b"[" * 100_000,
     b'{"a":' * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"{} {}"],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_anything_else(text: bytes) -> None:
    with pytest.raises(ValueError):
        json_object.read(text)
