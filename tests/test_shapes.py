"""vmm/shapes.py: what has a shape, and the line about what has not."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.support import mutate
from vmm.errors import ShapeError
from vmm.shapes import (
    Data,
    Each,
    Either,
    Flag,
    Items,
    Maybe,
    Pairs,
    Shape,
    Table,
    Text,
    Whole,
    check,
)  # fmt: skip

TABLE = Table({"a": Whole(0, 7)}, {"b": Flag()}, lambda value: "both" if "b" in value else "")


@pytest.mark.parametrize(
    ("shape", "good", "bad"),
    [
        (Shape(), [None, 1, {}], []),
        (Whole(0, 7), [0, 7], [-1, 8, True, 1.0, "1", None, 1 << 70, 10**5000, float("nan"), []]),
        (Flag(), [True, False, 1, 0], [2, -1, "1", None, 1.0, 0.0, [], {}]),
        (Text(3), ["", "abc", "\udcff"], ["abcd", b"a", None, 1, "\0", "\ud800", "a\ud800"]),
        (Text(9, ("a", "b")), ["a"], ["c", "", "ab"]),
        (Data(2), [b"ab"], [b"", b"abc", "ab", bytearray(2), None, 2]),
        (Data(0, 2), [b"", b"ab"], [b"abc"]),
        (Maybe(Whole(0, 1)), [None, 0], [2, "x"]),
        (Items(Whole(0, 1), 2), [[0, 1]], [[], [0], [0, 1, 1], [0, 2], (0, 1), None, {}]),
        (Items(Whole(0, 1), 0, 2), [[], [0], [0, 1]], [[0, 0, 0]]),
        (Each([Whole(0, 1), Flag()]), [[0, True]], [[0], [0, 1, 1], [2, True], "ab"]),
        (TABLE, [{"a": 1}, {"a": 1, "x": 2}], [{}, {"a": 8}, {"a": 1, "b": True}, [], None]),
        (Pairs(Text(1), Whole(0, 1), 2), [{}, {"a": 1}], [{"ab": 1}, {"a": 2}, {1: 1}, []]),
        (Pairs(Whole(0, 9), Shape(), 1), [{1: None}], [{1: 1, 2: 2}, {True: 1}, {"1": 1}]),
        (Either(Whole(0, 1), Text(1)), [0, "a"], [2, "ab", None]),
    ],
)
def test_shapes(shape: Shape, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check(shape, value, "it")
    for value in bad:
        with pytest.raises(ShapeError, match=r"^it\b") as caught:
            check(shape, value, "it")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_the_line_names_the_place() -> None:
    shape = Table({"queues": Items(Table({"size": Whole(0, 5)}), 0, 3)})
    with pytest.raises(ShapeError, match=r"^state\.queues\[1\]\.size is 'x', not a whole number"):
        check(shape, {"queues": [{"size": 1}, {"size": "x"}]}, "state")
    with pytest.raises(ShapeError, match=r"^state\.queues\[0\]: size is missing"):
        check(shape, {"queues": [{}]}, "state")
    more = shape.with_more(name=Text(5))
    with pytest.raises(ShapeError, match=r"^state: name is missing"):
        check(more, {"queues": []}, "state")


def test_whatever_is_there() -> None:
    """No other exception gets out, and no long line."""
    rng = random.Random(5)
    shapes: list[Shape] = [
        Whole(0, 7), Flag(), Text(10), Data(0, 5), Items(Text(3), 0, 3), Each([Flag(), Flag()]),
        TABLE, Pairs(Text(3), Whole(0, 3), 5), Either(Flag(), Text(3)), Maybe(TABLE),
    ]  # fmt: skip
    for _ in range(20_000):
        try:
            check(rng.choice(shapes), mutate.odd(rng), "it")
        except ShapeError as err:
            assert "\n" not in str(err) and len(str(err)) < 400
