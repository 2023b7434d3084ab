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
    """What `dumps` was given. Raises ValueError, whatever `data` is."""
    try:
        return json.loads(
            data, object_pairs_hook=_unpack, parse_float=_no_number, parse_constant=_no_number
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text[:20]} is not plain data")


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


def _unpack(pairs: list[tuple[str, object]]) -> object:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    if BYTES in value:
        text = value[BYTES]
        if not isinstance(text, str) or len(value) > 1:
            raise ValueError("bytes that are no text")
        return b64decode(text, validate=True)
    if DICT in value:
        return _unpack_dict(value[DICT])
    return value


def _unpack_dict(given: object) -> dict[object, object]:
    if not isinstance(given, list):
        raise ValueError("a dict that is no list of pairs")
    found: dict[object, object] = {}
    for pair in given:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], (int, str)):
            raise ValueError("a dict whose items are not key and value")
        if pair[0] in found:
            raise ValueError("a key is given twice")
        found[pair[0]] = pair[1]
    return found
