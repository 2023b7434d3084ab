"""vmm/testing/identity.py: what differs has another digest, in this process and in others."""

from __future__ import annotations

import collections
import datetime
import functools
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm.testing import identity
from vmm.testing.identity import digest

CALLS: list[int] = []
COLOUR = "red"
PLACES = {"a": [1, 2]}


def closure(colour: object) -> Callable[[object], object]:
    def prepare(machine: object) -> object:
        return (machine, colour)

    return prepare


class Holder:
    size = 1

    def __init__(self, colour: str) -> None:
        self.colour = colour

    def prepare(self, machine: object) -> object:
        return (machine, self.colour)


class Slotted:
    __slots__ = ("colour",)

    def __init__(self, colour: str) -> None:
        self.colour = colour


def test_the_same_is_the_same() -> None:
    assert digest([closure("red")]) == digest([closure("red")])
    assert digest([Holder("red").prepare]) == digest([Holder("red").prepare])
    assert digest([functools.partial(print, 1)]) == digest([functools.partial(print, 1)])
    assert digest([{1, 2, "three"}]) == digest([{"three", 2, 1}])
    assert digest([re.compile("a"), None, b"x"]) == digest([re.compile("a"), None, b"x"])


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (closure("red"), closure("blue")),
        (closure(["red", {"x": 1}]), closure(["red", {"x": 2}])),
        (closure(closure("red")), closure(closure("blue"))),
        (closure(Holder("red")), closure(Holder("blue"))),
        (closure(Slotted("red")), closure(Slotted("blue"))),
        (Holder("red").prepare, Holder("blue").prepare),
        (closure(datetime.date(2026, 1, 1)), closure(datetime.date(2026, 1, 2))),
        (closure(collections.deque([1])), closure(collections.deque([2]))),
        (closure(ValueError("red")), closure(ValueError("blue"))),
        (functools.partial(print, "red"), functools.partial(print, "blue")),
        (functools.partial(print, end="red"), functools.partial(print, end="blue")),
        (lambda machine, c="red": (machine, c), lambda machine, c="blue": (machine, c)),
        (lambda machine: machine.a, lambda machine: machine.b),
        (lambda machine: (machine, 1), lambda machine: (machine, True)),
        (lambda machine: [machine for _ in "x"], lambda machine: [machine for _ in "y"]),
        ("ab", b"ab"),
        (["a", "b"], ["ab"]),
        (["a", ["b"]], [["a"], "b"]),
        (1, 1.0),
    ],
)
def test_other_things_differ(one: object, two: object) -> None:
    assert digest([one]) != digest([two])


def test_globals_that_a_function_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(machine: object) -> object:
        return (machine, COLOUR, PLACES, Holder)

    def other(machine: object) -> object:
        return prepare(machine)

    before, around = digest([prepare]), digest([other])
    monkeypatch.setattr(sys.modules[__name__], "COLOUR", "blue")
    assert digest([prepare]) != before
    assert digest([other]) != around  # it calls the one that names it
    monkeypatch.undo()
    assert digest([prepare]) == before
    monkeypatch.setitem(PLACES, "a", [1, 3])
    assert digest([prepare]) != before
    monkeypatch.undo()
    monkeypatch.setattr(Holder, "size", 2)
    assert digest([prepare]) != before


def test_the_environment_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(machine: object) -> object:
        return (machine, os.environ.get("VMM_A_COLOUR"))

    def does_not(machine: object) -> object:
        return (machine, os.sep)

    before = digest([asks]), digest([does_not])
    monkeypatch.setenv("VMM_A_COLOUR", "blue")
    assert digest([asks]) != before[0]
    assert digest([does_not]) == before[1]


@pytest.mark.parametrize("how", ["path", "text", "drive", "tree", "closure"])
def test_files_count_by_what_is_in_them(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree" / "below").mkdir(parents=True)
    file = tmp_path / "tree" / "below" / "disk.img"
    file.write_bytes(b"one")
    value: object = {
        "path": file,
        "text": str(file),
        "drive": [f"{file},snapshot", "cid=3"],
        "tree": "tree",
        "closure": closure(tmp_path / "tree"),
    }[how]
    before = digest([value])
    assert digest([value]) == before
    status = file.stat()
    file.write_bytes(b"two")  # as long as before
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # and as old
    assert digest([value]) != before


def test_what_cannot_be_told_is_itself_alone() -> None:
    one, two = socket.socketpair()
    with one, two:
        assert digest([closure(one)]) == digest([closure(one)])
        assert digest([closure(one)]) != digest([closure(two)])
    deep: list[object] = []
    for _ in range(1000):
        deep = [deep]
    assert digest([deep])  # and ends
    round_: list[object] = []
    round_.append(round_)
    assert digest([round_]) == digest([round_])
    assert digest([threading.Lock()]) == digest([threading.Lock()])


def test_pytests_request_counts_by_its_parameter(request: pytest.FixtureRequest) -> None:
    class OtherRequest(type(request)):  # type: ignore[misc]
        __module__ = "_pytest.fixtures"

        def __init__(self, param: str, nodeid: str) -> None:
            self.param = param
            self._node = type("Node", (), {"nodeid": nodeid})()

        @property
        def node(self) -> object:
            return self._node

    def takes(which: OtherRequest) -> Callable[[object], object]:
        return lambda machine: (machine, which.param)

    def looks(which: OtherRequest) -> Callable[[object], object]:
        return lambda machine: (machine, which.node)

    assert digest([takes(OtherRequest("red", "a"))]) == digest([takes(OtherRequest("red", "b"))])
    assert digest([takes(OtherRequest("red", "a"))]) != digest([takes(OtherRequest("blue", "a"))])
    assert digest([looks(OtherRequest("red", "a"))]) != digest([looks(OtherRequest("red", "b"))])


def test_the_same_in_another_process() -> None:
    """The workers of pytest-xdist share what has the same digest."""
    code = (
        "import functools, logging; from tests.test_testing_identity import *\n"
        "log = logging.getLogger('x')\n"
        "def named(machine):\n    log.info('%s', machine); return {1, 'two', (3, 'x')}, COLOUR\n"
        "print(digest([closure({'a', 'b', 1}), Holder('red').prepare, Slotted('x'),"
        " Path('/bin/sh'), functools.partial(named, 1), named, Holder, re.compile('x'), print]))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert told[0] == told[1] != ""


def test_what_is_a_library() -> None:
    for path in (
        *(os.__file__, functools.__file__, pytest.__file__, identity.__file__, "built-in"),
        *("/usr/lib/python3/dist-packages/x.py", "/home/me/.local/lib/site-packages/x/y.py"),
    ):
        assert identity.of_a_library(path), path
    for path in (__file__, "/home/me/project/tests/conftest.py", "<string>"):
        assert not identity.of_a_library(path), path
