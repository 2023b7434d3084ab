"""Mutations of data that somebody else may have written: plain values, JSON text, bytes.

Everything follows from a `random.Random`, so that a seed is enough to have the same again.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

Path = tuple[Any, ...]

NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 16, 63, 64, 127, 128, 255, 256, 4095, 4096, 4097, 0x7FFF, 0x8000, 0xFFFF),
    *(0x10000, 0xA0000, 0x100000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, 0xFEE00000),
    *(0xD0000000, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), 1 << 70),
]
"""Where widths, signs, pages and address ranges end."""
TEXTS = [
    *("", "x", ".", "..", "/", "../..", "../../etc/passwd", "/etc/passwd", "a/b", "\0", "a\0b"),
    *("\ud800", "\udcff", "é" * 300, "x" * 5000, "\n", "%s%n", "{}", "1", "-1", "0x10", "true"),
    *("file:/etc/passwd", "none", "hvc", "1e999", "nan", "memory", "state.json", "manifest.json"),
]


def deep(levels: int) -> Any:
    """Lists and dicts within one another."""
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def odd(rng: random.Random) -> Any:
    """A value that nobody expects; plain data, floats and deep nesting among it."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(TEXTS)
    if kind == 4:
        return rng.choice([None, True, False, 0.5, -0.0, 1e300, float("inf"), float("nan")])
    if kind == 5:
        return rng.choice([[], {}, [1], {"a": 1}, [[]], [None] * 300, {"": 0}, {"$": 1}])
    if kind == 6:
        return rng.choice([10**400, -(10**400), deep(20), deep(200)])
    return [rng.randrange(1 << 16) for _ in range(rng.choice([1, 2, 5, 300]))]


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """The place of each value in `value`, that of the whole first."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from paths(item, (*path, number))


def pick(value: Any, rng: random.Random) -> Path:
    """A place in `value`: going down step by step, so that a list of 1,000 items is not 1,000
    times as likely as what stands beside it."""
    path: Path = ()
    while isinstance(value, (dict, list)) and value and (not path or rng.random() < 0.85):
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        path, value = (*path, key), value[key]
    return path


def at(value: Any, path: Path) -> Any:
    """What is at `path` in `value`."""
    for key in path:
        value = value[key]
    return value


def mutated(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy of plain data with one thing changed, and what that was."""
    path = pick(value, rng)
    if not path:
        return odd(rng), "the whole"
    value = copy.deepcopy(value)
    parent, key = at(value, path[:-1]), path[-1]
    old = parent[key]
    how = rng.random()
    if how < 0.1:
        del parent[key]
        return value, f"{path} deleted"
    if how < 0.2 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(old))
        return value, f"{path} twice"
    if how < 0.2:
        other = rng.choice([*parent, "x", "__class__", ""])
        parent[other] = old
        return value, f"{path} as {other!r} too"
    if how < 0.5 and isinstance(old, int):
        parent[key] = rng.choice([old + 1, old - 1, -old, old ^ 1 << rng.randrange(64), old << 8])
    elif how < 0.6 and isinstance(old, (bytes, str, list)) and old:
        cut = rng.randrange(len(old))
        parent[key] = rng.choice([old[:cut], old[cut:], old + old, old[::-1], old[:1] * 70])
    elif how < 0.85 and isinstance(old, bytes):
        parent[key] = scrambled(old, rng)
    else:
        parent[key] = odd(rng)
    return value, f"{path}: {repr(old)[:60]} -> {repr(parent[key])[:60]}"


def scrambled(data: bytes, rng: random.Random) -> bytes:
    """`data` with some bits, bytes or words changed; now and then cut short or longer."""
    made = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        if not made:
            break
        place = rng.randrange(min(len(made), rng.choice([8, 64, 256, len(made)])))
        if rng.random() < 0.5:
            made[place] ^= 1 << rng.randrange(8)
        else:
            width = rng.choice([1, 2, 4, 8])
            word = rng.choice(NUMBERS) & (1 << 8 * width) - 1
            made[place : place + width] = word.to_bytes(width, "little")[: len(made) - place]
    how = rng.random()
    if how < 0.05:
        del made[rng.randrange(len(made) + 1) :]
    elif how < 0.1:
        made += rng.randbytes(rng.choice([1, 8, 16, 4096]))
    return bytes(made)


def text(value: Any, rng: random.Random) -> bytes:
    """`value` as JSON text that is broken, or that parsers understand in several ways."""
    whole = json.dumps(value)
    how = rng.randrange(6)
    if how == 0 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return f'{{{json.dumps(key)}: {json.dumps(odd(rng))}, {whole[1:]}'.encode()
    if how == 1:
        place = rng.randrange(len(whole))
        word = rng.choice(["NaN", "Infinity", "-", "1e999", "é"])
        return f"{whole[:place]}{word}{whole[place:]}".encode()
    if how == 2:
        return (b"[" * rng.choice([10, 1000, 100_000])) + b"1"
    if how == 3:
        return whole.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))
    if how == 4:
        return b"1" * rng.choice([10, 4299, 5000])
    return scrambled(whole.encode(), rng)
