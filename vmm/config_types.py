"""What kind of value each keyword of a configuration takes: one table a class, checked at once.

A value of another kind would be found out late, far from here, or not at all: text is a sequence
too, and made eight disks of `drives="disk.img"`.
"""

from __future__ import annotations

from os import PathLike

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., None])

    Kind = tuple[tuple[type, ...], str]

TEXT = ((str,), "text")
FLAG = ((bool,), "True or False")
WHOLE = ((int,), "a whole number")
NUMBER = ((int, float), "a number")
PATH = ((str, PathLike), "a path (text or os.PathLike)")
SIZE = ((int, str), "a whole number of bytes, or text as '512M'")
RATE = ((int, str), "a whole number, or text as '10M'")
FLAG_OR_TEXT = ((bool, str), "True, False or text")
NUMBER_BITS = 4096
"""More has no use, and soon more digits than Python prints."""
NONE = type(None)
CHECKED_LATER = ("kernel", "initrds", "append", "drives")
"""Keywords whose text is looked at where it is used."""
CALLABLE = "a function that makes a device"
"""Of `devices`."""


def maybe(kind: Kind) -> Kind:
    """`kind`, or None."""
    return ((*kind[0], NONE), f"{kind[1]}, or None")


def check(values: Mapping[str, object], kinds: Mapping[str, Kind], what: str = "") -> None:
    """UsageError, in a line that names the keyword, where a value is not of its kind.

    Args:
        values: by keyword; those without a kind are passed over.
        what: put before the keyword: the option, as far as it says which part this is.
    """
    for name, (types, described) in kinds.items():
        value = values[name]
        if isinstance(value, types) and (bool in types or not isinstance(value, bool)):
            if isinstance(value, (str, PathLike)) and name not in CHECKED_LATER:
                _check_text(f"{what}{name}", value)
            if isinstance(value, int) and value.bit_length() > NUMBER_BITS:
                raise UsageError(f"{what}{name} is a number of {value.bit_length()} bits")
            continue
        raise UsageError(f"{what}{name}={shown(value)} is not {described}")


def listed(name: str, values: object, kind: Kind | str) -> tuple[Any, ...]:
    """`values` as a tuple, each of `kind`: one of those above, or the name of a class whose
    instances are taken beside text.

    Raises:
        UsageError: it is no list, or one of it is of another kind.
    """
    if isinstance(values, (str, bytes, PathLike)) or hasattr(values, "keys"):
        raise UsageError(f"{name}={shown(values)} is not a list; write {name}=[{shown(values)}]")
    found: tuple[object, ...]
    try:
        found = tuple(values)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"{name}={shown(values)} is not a list") from None
    for number, value in enumerate(found):
        if kind == CALLABLE:
            good, described = callable(value), CALLABLE
        elif isinstance(kind, str):
            good = isinstance(value, str) or is_a(value, kind)
            described = f"text, or a {kind}"
            if kind == "Drive":  # a disk is mostly its path alone
                good, described = good or isinstance(value, PathLike), "text, a path, or a Drive"
        else:
            good, described = isinstance(value, kind[0]), kind[1]
        if not good:
            hint = "; a table is for MachineConfig.from_dict" if isinstance(value, dict) else ""
            raise UsageError(f"{name}[{number}]={shown(value)} is not {described}{hint}")
        if isinstance(value, (str, PathLike)) and name not in CHECKED_LATER:
            _check_text(f"{name}[{number}]", value)
    return found


def _check_text(what: str, value: str | PathLike[str]) -> None:
    """UsageError: a character that neither a path nor another text for the system can have."""
    text = str(value)
    if text.isascii() and "\0" not in text:
        return
    what = repr(what)[1:-1]  # which may begin with the same text
    if "\0" in text:
        raise UsageError(f"{what}={shown(text)} has a NUL character in it")
    try:
        text.encode("utf-8", "surrogateescape")  # bytes of a command line that are not UTF-8
    except UnicodeEncodeError:
        raise UsageError(f"{what}={shown(text)} has half a character (a surrogate) in it") from None


def is_a(value: object, name: str) -> bool:
    """Whether `value` is of the class of that name, which need not be loaded."""
    return any(kind.__name__ == name for kind in type(value).__mro__)


def known_keywords(init: F) -> F:
    """`init`, an `__init__`, which raises UsageError for a keyword it does not have."""
    code = init.__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]

    def checked(self: object, *positional: object, **keywords: object) -> None:
        for name in keywords:
            if name not in names:
                raise _unknown(name, names)
        init(self, *positional, **keywords)

    checked.__wrapped__ = init  # type: ignore[attr-defined]  # for inspect.signature and help()
    checked.__doc__ = init.__doc__
    return checked  # type: ignore[return-value]


def _unknown(name: str, names: tuple[str, ...]) -> UsageError:
    from difflib import get_close_matches

    near = get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return UsageError(f"{name}: no such keyword; {hint}")


def shown(value: object) -> str:
    """`value` in a line."""
    try:
        text = repr(value).replace("\n", "\\n")
    except Exception:  # also of an integer of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."
