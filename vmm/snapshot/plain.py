"""Plain data (ints, bytes, strings, None, lists, dicts) as JSON text, and back.

JSON has no bytes, and keys are strings: bytes are `{"$": "base64"}`, a dict with other keys is
`{"$dict": [[key, value], ...]}`. Tuples become lists.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BYTES, DICT = "$", "$dict"


def dumps(value: object) -> bytes:
    """UTF-8 text of `value`; TypeError where it is not plain data."""
    return json.dumps(_pack(value), separators=(",", ":"), allow_nan=False).encode()


def loads(data: bytes) -> Any:
    """What `dumps` was given. Raises ValueError."""
    return json.loads(data, object_hook=_unpack)


def _pack(value: object) -> object:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {BYTES: b64encode(value).decode()}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _pack(item) for key, item in value.items()}
        return {DICT: [[key, _pack(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(item) for item in value]
    if value is None or isinstance(value, (int, str)):  # floats may be NaN, and are no state
        return value
    raise TypeError(f"{value!r} is not plain data")


def _unpack(value: dict[str, object]) -> object:
    if BYTES in value:
        return b64decode(str(value[BYTES]), validate=True)
    if DICT in value:
        pairs = value[DICT]
        if not isinstance(pairs, list):
            raise ValueError("a dict that is no list of pairs")
        return dict(pairs)
    return value
