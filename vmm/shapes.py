"""Shapes of plain data that somebody else may have written: a file's, a snapshot's.

A shape is declared once, beside what writes the data, and checked before anything is done with
what was read:

    QUEUE = Table({"size": Whole(0, 0xFFFF), "name": Text(64)})
    check(QUEUE, value, "state.json: queue 0")      # ShapeError, in a line that names the place

What a shape does not name is ignored: a later version may have put it there.
"""

from __future__ import annotations

from vmm.errors import ShapeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

U8, U16, U32, U64 = 0xFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
SHOWN_MAX = 60
"""Characters of a value in a message."""


class Shape:
    """Base of all shapes: any value has it."""

    def check(self, value: object, where: str) -> None:
        """Raise ShapeError, which begins with `where`, if `value` has another shape."""


class Whole(Shape):
    """An integer from `low` to `high`."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def check(self, value: object, where: str) -> None:
        if type(value) is not int or not self.low <= value <= self.high:
            raise _wrong(value, where, f"a whole number from {self.low} to {self.high}")


class Flag(Shape):
    """True or false; 1 and 0 are taken too."""

    def check(self, value: object, where: str) -> None:
        if value not in (True, False) or not isinstance(value, int):
            raise _wrong(value, where, "true or false")


class Text(Shape):
    """Text of at most `most` characters, which the system can take as a name."""

    def __init__(self, most: int, choices: tuple[str, ...] = ()) -> None:
        self.most = most
        self.choices = choices

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, str) or len(value) > self.most:
            raise _wrong(value, where, f"text of at most {self.most} characters")
        if self.choices and value not in self.choices:
            raise _wrong(value, where, f"one of {', '.join(self.choices)}")
        if "\0" in value:
            raise _wrong(value, where, "text without NUL characters")
        if not value.isascii():
            try:
                value.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise _wrong(value, where, "text of whole characters") from None


class Data(Shape):
    """Bytes: `least` to `most` of them, or exactly `least`."""

    def __init__(self, least: int, most: int | None = None) -> None:
        self.least = least
        self.most = least if most is None else most

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, bytes) or not self.least <= len(value) <= self.most:
            many = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
            raise _wrong(value, where, f"{many} bytes")


class Maybe(Shape):
    """None, or what has the shape `item`."""

    def __init__(self, item: Shape) -> None:
        self.item = item

    def check(self, value: object, where: str) -> None:
        if value is not None:
            self.item.check(value, where)


class Items(Shape):
    """A list of `least` to `most` items of one shape, or of exactly `least`."""

    def __init__(self, item: Shape, least: int, most: int | None = None) -> None:
        self.item = item
        self.least = least
        self.most = least if most is None else most

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            many = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
            raise _wrong(value, where, f"a list of {many} items")
        for number, item in enumerate(value):
            self.item.check(item, f"{where}[{number}]")


class Each(Shape):
    """A list whose items have a shape each."""

    def __init__(self, items: list[Shape]) -> None:
        self.items = items

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, list) or len(value) != len(self.items):
            raise _wrong(value, where, f"a list of {len(self.items)} items")
        for number, (item, shape) in enumerate(zip(value, self.items, strict=True)):
            shape.check(item, f"{where}[{number}]")


class Table(Shape):
    """A dict with all of `needed`, perhaps some of `optional`; `rule` looks at it as a whole, and
    returns what is wrong with it, or an empty string."""

    def __init__(
        self,
        needed: Mapping[str, Shape],
        optional: Mapping[str, Shape] | None = None,
        rule: Callable[[dict[str, object]], str] | None = None,
    ) -> None:
        self.needed = dict(needed)
        self.optional = dict(optional or {})
        self.rule = rule

    def with_more(self, **more: Shape) -> Table:
        """The same, with more keys that are needed."""
        return Table({**self.needed, **more}, self.optional, self.rule)

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, where, "a table")
        for key, shape in self.needed.items():
            if key not in value:
                raise ShapeError(f"{where}: {key} is missing")
            shape.check(value[key], f"{where}.{key}")
        for key, shape in self.optional.items():
            if key in value:
                shape.check(value[key], f"{where}.{key}")
        if self.rule is not None:
            wrong = self.rule(value)
            if wrong:
                raise ShapeError(f"{where}: {wrong}")


class Pairs(Shape):
    """A dict of at most `most` keys of one shape to values of another."""

    def __init__(self, key: Shape, item: Shape, most: int) -> None:
        self.key = key
        self.item = item
        self.most = most

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, dict) or len(value) > self.most:
            raise _wrong(value, where, f"a table of at most {self.most} keys")
        for key, item in value.items():
            self.key.check(key, f"{where}: key")
            self.item.check(item, f"{where}.{key}")


class Either(Shape):
    """One of several shapes."""

    def __init__(self, *shapes: Shape) -> None:
        self.shapes = shapes

    def check(self, value: object, where: str) -> None:
        for shape in self.shapes[:-1]:
            try:
                shape.check(value, where)
            except ShapeError:
                continue
            return
        self.shapes[-1].check(value, where)


def check(shape: Shape, value: object, where: str) -> None:
    """Raise ShapeError, in a line that begins with `where`, if `value` has another shape."""
    shape.check(value, where)


def _wrong(value: object, where: str, wanted: str) -> ShapeError:
    if isinstance(value, (dict, list, bytes)):
        shown = f"{type(value).__name__} of {len(value)}"
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        shown = f"a number of {value.bit_length()} bits"
    else:
        shown = repr(value[: SHOWN_MAX + 1] if isinstance(value, str) else value)
        if len(shown) > SHOWN_MAX:
            shown = shown[: SHOWN_MAX - 3] + "..."
    return ShapeError(f"{where} is {shown}, not {wanted}")
