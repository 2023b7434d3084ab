"""Values and errors as JSON, for calls whose arguments are a program's and results a machine's.

`pack` and `unpack` keep None, booleans, numbers, text, lists and tables with text for keys; bytes,
ranges, tuples and sets as `{"$bytes": hex}` and the like. An error goes as the name of its class
and its message, and comes out as one of `ERRORS`.
"""

from __future__ import annotations

from vmm import errors
from vmm.console.tail import ConsoleClosed
from vmm.isolated.wire import WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        errors.VmmError,
        errors.UsageError,
        errors.SnapshotError,
        errors.BootError,
        errors.StateError,
        errors.GuestMemoryError,
        errors.AgentError,
        errors.HostError,
        errors.KvmError,
        ConsoleClosed,
        TimeoutError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
    )
}
ATTRIBUTES = {"KvmError": ("ioctl", "errno", "hint"), "GuestMemoryError": ("gpa", "size")}
"""What else of an error goes along."""
MESSAGE_MAX = 16 << 10
"""Characters of an error's message."""
_SCALARS = (bool, int, float, str)


def pack(value: object, special: Callable[[object], object] | None = None) -> Any:
    """`value` as what JSON has. TypeError where there is no such form; `special` is asked then."""
    if value is None or isinstance(value, _SCALARS):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": value.hex()}
    if isinstance(value, range):
        return {"$range": [value.start, value.stop, value.step]}
    if isinstance(value, tuple):
        return {"$tuple": [pack(each, special) for each in value]}
    if isinstance(value, (list, set, frozenset)):
        return [pack(each, special) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: pack(each, special) for key, each in value.items()}
    if special is not None:
        return special(value)
    raise TypeError(f"{value!r} cannot be handed to the machine's process")


def unpack(value: Any, special: Callable[[str, Any], object] | None = None) -> Any:
    """The value. Raises WireError."""
    if isinstance(value, list):
        return [unpack(each, special) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key.startswith("$"):
            return _special(key, inner, special)
    return {key: unpack(each, special) for key, each in value.items()}


def _special(key: str, inner: Any, special: Callable[[str, Any], object] | None) -> object:
    try:
        if key == "$bytes":
            return bytes.fromhex(inner)
        if key == "$range":
            return range(*map(int, inner))
        if key == "$tuple" and isinstance(inner, list):
            return tuple(unpack(each, special) for each in inner)
    except (TypeError, ValueError):
        raise WireError(f"{key} with what it does not have") from None
    if special is not None:
        return special(key, inner)
    raise WireError(f"{key[:20]} is no kind of value")


def pack_error(err: BaseException) -> list[object]:
    """[class, message, attributes]; of a class that is not in ERRORS the nearest one that is."""
    kind = next((each for each in type(err).__mro__ if each.__name__ in ERRORS), None)
    text = str(err)
    if isinstance(err, KeyError):
        text = str(err.args[0]) if err.args else ""
    if kind is None:
        return ["OSError" if isinstance(err, OSError) else "VmmError", _of_os(err, text), {}]
    name = kind.__name__
    told = {each: getattr(err, each, None) for each in ATTRIBUTES.get(name, ())}
    return [name, text[:MESSAGE_MAX], told]


def _of_os(err: BaseException, text: str) -> object:
    if isinstance(err, OSError):
        return [err.errno, err.strerror, err.filename if isinstance(err.filename, str) else None]
    return f"{type(err).__name__}: {text}"[:MESSAGE_MAX]


def unpack_error(told: Any) -> Exception:
    """The error. Raises WireError."""
    if not isinstance(told, list) or len(told) != 3 or not isinstance(told[2], dict):
        raise WireError("an error that is none")
    name, text, attributes = told
    if name == "OSError" and isinstance(text, list) and len(text) == 3:
        number, what, path = text
        if isinstance(number, int) and isinstance(what, str) and isinstance(path, str | None):
            return OSError(number, what, path)
    kind = ERRORS.get(name) if isinstance(name, str) else None
    if kind is None or not isinstance(text, str) or len(text) > MESSAGE_MAX:
        raise WireError("an error of no known kind")
    err = kind.__new__(kind)
    Exception.__init__(err, text)
    for each in ATTRIBUTES.get(name, ()):
        value = attributes.get(each)
        if not isinstance(value, int | str):
            raise WireError("an error without its attributes")
        setattr(err, each, value)
    return err
