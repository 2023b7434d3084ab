"""Sizes as people write them."""

from __future__ import annotations

from vmm.errors import UsageError

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str, option: str, default_suffix: str = "M") -> int:
    """Bytes of `256M`, `1.5G`, `4GiB`, `262144K`; a bare number is in `default_suffix` units.

    Suffixes are powers of 1024, any case, with or without `B` or `iB`; `B` alone is bytes.

    Raises:
        UsageError: naming `option`, the text and what would work.
    """
    number = text.strip().upper()
    suffix = default_suffix
    if number.endswith("B"):
        number = number[:-1]
        suffix = ""
        if number.endswith("I") and number[-2:-1] in _SUFFIXES:
            number = number[:-1]
    if number and number[-1] in "KMGT":
        number, suffix = number[:-1], number[-1]
    try:
        if not number or number.strip("0123456789.") or len(number) > 20:
            raise ValueError
        value = float(number) if "." in number else int(number)
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a size; write for example 256M or 2G") from None
    return int(value * _SUFFIXES[suffix])


def parse_seconds(text: str) -> float:
    """A number of seconds, in ASCII and without underscores: `30`, `0.5`. Raises ValueError."""
    if not text.isascii() or "_" in text or text != text.strip():
        raise ValueError(f"{text!r} is not a number of seconds")
    return float(text)


def put_once(values: dict[str, str], key: str, value: str, what: str) -> None:
    """Set a key of an option's value, `what` as it was given.

    Raises:
        UsageError: it has been given with another value.
    """
    if values.setdefault(key, value) != value:
        raise UsageError(f"{what}: {key}= is given twice; leave one of the two out")


def format_size(size: int) -> str:
    """`256 MiB`, `5 GiB`, `12 KiB`: the largest unit that loses at most a tenth of one."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift:
            value = size / (1 << shift)
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
    return f"{size} bytes"
