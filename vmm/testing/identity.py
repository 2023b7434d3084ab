"""What a value is, by its content: a digest that is the same in every process of a test session.

A snapshot may be shared only where all that went into it is the same. `repr` and names do not say
so: two conftest.py files each have a `vmm_prepare.<locals>.prepare`, a parameter is in a closure,
an image changes behind its name. Here a function is its code, its defaults, what it has closed
over, and the globals its code names; a file is its path, inode, size and times.

What cannot be told by content (a socket, a generator) is itself alone: another object of its kind,
or one in another process, differs, which costs a boot and gives no test another's machine.
Directories of more than ENTRIES files count by their names alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import stat
import sys
import sysconfig
import threading
import types
import uuid
import weakref
from collections.abc import Callable, Iterable

DEPTH = 40
"""Values in values in values: deeper ones are not told."""
ENTRIES = 500
"""Files of a directory that are looked at, hidden ones and caches left out."""
VALUES = 100_000
"""Values looked at in all."""
GUESTS = ("/proc/", "/sys/", "/dev/", "/run/")
"""Absolute paths in a program's text that are looked at in no case: these files always change."""
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
UNTOLD = ("PYTEST_", "COV_", "_")
"""Variables with these beginnings differ between the tests and workers of one session."""

_SHARED = (str, bytes, int, float, complex, tuple, frozenset, types.CodeType, type(None))
"""Values of which it is chance whether two are one object."""
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_DESCRIPTORS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
_OF_CLASSES = {
    *("__dict__", "__weakref__", "__doc__", "__annotations__", "__annotate__", "__module__"),
    *("_abc_impl", "__abstractmethods__", "__annotations_cache__", "__slotnames__"),
}
_LIBRARIES = tuple(
    {
        os.path.join(os.path.realpath(path), "")
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
        if (path := sysconfig.get_paths().get(name))
    }
    | {os.path.join(os.path.realpath(os.path.dirname(os.path.dirname(__file__))), "")}
)
"""Where code is that no test of the session changes: it counts by its name."""


def digest(values: Iterable[object]) -> str:
    """Hexadecimal, the same for the same values."""
    whole = _Digest()
    for value in values:
        try:
            whole.add(value)
        except Exception:  # an object of another's may do anything when it is looked at
            whole.state.update(uuid.uuid4().bytes)
    return whole.state.hexdigest()


class _Digest:
    def __init__(self) -> None:
        self.state = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # so that no id is used again
        self._depth = 0
        self._values = 0

    def _word(self, *parts: object) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            self.state.update(b"%d:" % len(data) + data)

    def add(self, value: object) -> None:
        """Take `value` in, and what it is made of."""
        self._values += 1
        if self._depth > DEPTH or self._values > VALUES:
            self._unlike_all(value)
            return
        if not isinstance(value, _SHARED):
            if id(value) in self._seen:
                self._word("again", self._seen[id(value)])
                return
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
        self._depth += 1
        try:
            self._add(value)
        finally:
            self._depth -= 1

    def _add(self, value: object) -> None:
        kind = type(value)
        self._word(kind.__module__, kind.__qualname__)
        if value is None or value is ... or isinstance(value, (bool, int, float, complex)):
            self._word(repr(value))
        elif isinstance(value, str):
            self._word(value)
            self._named(value)
        elif isinstance(value, (bytes, bytearray, memoryview)):
            self._word(hashlib.sha256(value).digest())
        elif isinstance(value, os.PathLike):
            self._word(os.fspath(value))
            self._file(os.fspath(value), tree=True)
        elif isinstance(value, (list, tuple)):
            self._all(value)
        elif isinstance(value, (set, frozenset)):
            self._all(sorted(digest([part]) for part in value))
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._all(part for item in value.items() for part in item)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._all((value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._all((value.func, value.args, value.keywords))
        elif isinstance(value, (staticmethod, classmethod)):
            self.add(value.__func__)
        elif isinstance(value, property):
            self._all((value.fget, value.fset, value.fdel))
        elif isinstance(value, types.CellType):
            self._cell(value)
        elif isinstance(value, types.ModuleType):
            self._word(value.__name__)
        elif isinstance(value, types.BuiltinFunctionType):
            self._word(value.__qualname__)
            if not isinstance(value.__self__, types.ModuleType):
                self.add(value.__self__)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, re.Pattern):
            self._all((value.pattern, value.flags))
        elif isinstance(value, _DESCRIPTORS):
            self._word(value.__name__)
        elif isinstance(value, logging.Logger):
            self._word(value.name)
        elif kind.__module__ in ("types", "typing"):
            self._word(repr(value))
        elif isinstance(value, _LOCKS):
            pass
        else:
            self._object(value)

    def _all(self, values: Iterable[object]) -> None:
        self._word("(")
        for value in values:
            self.add(value)
        self._word(")")

    def _unlike_all(self, value: object) -> None:
        self._word(type(value).__qualname__, _token(value))

    # --- programs -------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        self._word(function.__module__, function.__qualname__)
        if of_a_library(code.co_filename):
            self._all(function.__closure__ or ())
            return
        self._code(code)
        self._all((function.__defaults__, function.__kwdefaults__))
        self._all(item for item in sorted(vars(function).items()) if item[0] != "pytestmark")
        names = _names(code)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._word(name)
            self._cell(cell, names)
        self._globals(function.__globals__, names)

    def _code(self, code: types.CodeType) -> None:
        self._word(code.co_filename, code.co_qualname, code.co_code, *code.co_names)
        self._word(*code.co_varnames, *code.co_freevars, code.co_flags)
        self._all(code.co_consts)

    def _globals(self, values: dict[str, object], names: set[str]) -> None:
        for name in sorted(names & values.keys()):
            self._word(name)
            self._used(values[name], names)
        if names & ENVIRONMENT:
            self._all(
                f"{name}={value}"
                for name, value in sorted(os.environ.items())
                if not name.startswith(UNTOLD)
            )

    def _used(self, value: object, names: set[str]) -> None:
        """Take `value` in as far as a program that names `names` uses it."""
        if isinstance(value, types.ModuleType):
            self._word("module", value.__name__)
            if not of_a_library(getattr(value, "__file__", None) or "built-in"):
                for name in sorted(names & vars(value).keys()):
                    self._word(name)
                    self.add(vars(value)[name])
        elif _is_request(value):
            self._request(value, names)
        else:
            self.add(value)

    def _cell(self, cell: types.CellType, names: set[str] | None = None) -> None:
        try:
            value = cell.cell_contents
        except ValueError:
            self._word("empty")
            return
        self._used(value, names or set())

    def _request(self, request: object, names: set[str]) -> None:
        """pytest's `request`: its parameter; and its test, where the program may look at that."""
        self.add(getattr(request, "param", None))
        asked = names & {name for name in dir(request) if not name.startswith("_")}
        if asked - {"param"}:
            self._word(getattr(getattr(request, "node", None), "nodeid", uuid.uuid4()))

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            self._word(base.__module__, base.__qualname__)
            if of_a_library(_file_of(base)):
                continue
            for name, value in sorted(vars(base).items()):
                if name not in _OF_CLASSES:
                    self._word(name)
                    self.add(value)

    def _object(self, value: object) -> None:
        if _is_request(value):
            self._request(value, set(dir(value)))
            return
        if type(value).__module__.startswith("_pytest."):
            function = getattr(value, "_fixture_function", None)  # what @pytest.fixture makes
            if function is None:
                self._unlike_all(value)
            else:
                self.add(function)
            return
        self.add(type(value))
        try:
            parts = value.__reduce_ex__(2)  # as for a pickle, which needs all that is in it, too
        except Exception:
            self._unlike_all(value)
            return
        if isinstance(parts, tuple):
            made_of = [part for part in parts[1:3] if part is not None]
            self._all([*made_of, *(list(part) for part in parts[3:5] if part is not None)])
        else:
            self._word(parts)
        if hasattr(value, "__dict__"):
            self.add(vars(value))

    # --- files ------------------------------------------------------------------------------------

    def _named(self, text: str) -> None:
        """The files that `text` names: as a whole, or as an option's value does (`FILE,snapshot`,
        `path=FILE`). An absolute directory is more likely to be one in the guest."""
        if not 0 < len(text) <= 4096 or "\0" in text or "\n" in text:
            return
        words = {text, *text.split(",")}
        words |= {word.partition("=")[2] for word in words}
        for word in sorted(words):
            if word and not word.startswith(GUESTS):
                self._file(word, tree=not os.path.isabs(word) and word.strip("./") != "")

    def _file(self, path: str | bytes, *, tree: bool) -> None:
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return
        if stat.S_ISREG(found.st_mode):
            self._status(found)
        elif stat.S_ISDIR(found.st_mode) and tree:
            self._directory(os.fsdecode(path))
        elif stat.S_ISBLK(found.st_mode):
            self._word(uuid.uuid4())  # it may have changed, and does not tell

    def _directory(self, path: str) -> None:
        found: list[tuple[str, os.stat_result]] = []
        for root, directories, files in os.walk(path):
            directories[:] = sorted(name for name in directories if not _is_cache(name))
            for name in sorted(files):
                if len(found) >= ENTRIES:
                    return
                file = os.path.join(root, name)
                with contextlib.suppress(OSError):
                    found.append((os.path.relpath(file, path), os.lstat(file)))
        for file, status in found:
            self._word(file)
            self._status(status)

    def _status(self, found: os.stat_result) -> None:
        self._word(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


_tokens: dict[int, tuple[Callable[[], object], str]] = {}


def _token(value: object) -> str:
    """A name of `value` that no other object ever has."""
    reference, token = _tokens.get(id(value), (None, ""))
    if reference is None or reference() is not value:
        token = uuid.uuid4().hex
        try:
            reference = weakref.ref(value)
        except TypeError:
            reference = functools.partial(_itself, value)
        _tokens[id(value)] = (reference, token)
    return token


def _itself(value: object) -> object:
    return value


def _names(code: types.CodeType) -> set[str]:
    """Every name of globals and attributes in `code` and the functions in it."""
    names = set(code.co_names)
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            names |= _names(value)
    return names


def _is_cache(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


@functools.lru_cache(maxsize=1000)
def of_a_library(path: str) -> bool:
    """Whether code in the file `path` is vmm's, Python's, or of an installed package."""
    if path == "built-in" or path.startswith("<frozen"):
        return True
    path = os.path.realpath(path)
    if "/site-packages/" in path or "/dist-packages/" in path:
        return True
    return path.startswith(_LIBRARIES)


def _file_of(kind: type) -> str:
    """The file a class is from, by its functions: a conftest's module may have been replaced."""
    for value in vars(kind).values():
        function: Callable[..., object] | object = getattr(value, "__func__", value)
        if isinstance(function, types.FunctionType):
            return function.__code__.co_filename
    module = sys.modules.get(kind.__module__)
    if kind.__module__ == "builtins" or module is None:
        return "built-in" if module is not None else ""
    return getattr(module, "__file__", None) or "built-in"


def _is_request(value: object) -> bool:
    kind = type(value)
    return kind.__module__.startswith("_pytest.") and kind.__name__.endswith("Request")
