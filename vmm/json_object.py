"""A JSON object that another program sent or wrote. Whoever that is may be hostile."""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def read(text: bytes | str) -> dict[str, Any]:
    """The object that `text` is.

    Raises:
        ValueError: it is no JSON, nested too deeply, or another value than an object.
    """
    try:
        found = json.loads(text)
    except RecursionError:  # no ValueError, and 1,000 brackets are enough for one
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(found)[:40]} is no object")
    return found
