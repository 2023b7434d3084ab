"""vmm.config_schema: a true JSON schema, of all that a configuration has, and our check of it."""

from __future__ import annotations

import inspect
from typing import Any

import jsonschema
import pytest

from vmm import MachineConfig, UsageError
from vmm.config_file import PARTS, part_class, part_properties
from vmm.config_schema import PROPERTIES, SCHEMA, check

VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

GOOD: list[dict[str, Any]] = [
    {},
    {"kernel": "vmlinuz", "memory": "512M", "cpus": 2, "timeout": 1.5},
    {"memory": 1 << 28, "timeout": 3, "balloon": 0, "rng": True},
    {"rng": "rate=64K", "acpi": False, "append": "quiet"},
    {"drives": ["a.img,readonly", {"path": "b.img", "queues": 2, "werror": "stop"}]},
    {"nets": ["user", {"kind": "user", "forward": ["tcp:8080:80"]}, {"kind": "lan", "name": "x"}]},
    {"ports": [{"name": "log", "file": "log"}], "vsock": {"cid": 3, "path": "v"}},
    {"shares": [{"path": "/", "tag": "root"}, "/tmp,tag=tmp"], "vsock": "cid=3,path=v"},
    {"vsock": {"cid": 3}},
]
BAD: list[tuple[object, str]] = [
    ([], "the whole: [] is not a table"),
    ({"memroy": 1}, "memroy: no such key; memory is one"),
    ({"xyzzy": 1}, "xyzzy: no such key; one of kernel, initrds, append"),
    ({"cpus": "2"}, "cpus: '2' is not a whole number"),
    ({"cpus": 2.0}, "cpus: 2.0 is not a whole number"),
    ({"cpus": True}, "cpus: true is not a whole number"),
    ({"timeout": "3"}, "timeout: '3' is not a number"),
    ({"timeout": False}, "timeout: false is not a number"),
    ({"acpi": 1}, "acpi: 1 is not true or false"),
    ({"append": ["a"]}, "append: ['a'] is not text"),
    ({"initrds": "x"}, "initrds: 'x' is not a list"),
    ({"initrds": ["x", 1]}, "initrds[1]: 1 is not text"),
    ({"memory": 1.5}, "memory: 1.5 is not a whole number or text"),
    ({"memory": "512"}, "memory: '512' has no unit; write 512M, or a number without quotes"),
    ({"rng": 3}, "rng: 3 is not true or false or text"),
    ({"drives": [3]}, "drives[0]: 3 is not text or a table"),
    ({"drives": [{}]}, "drives[0]: path is missing"),
    ({"drives": [{"path": "x", "readonly": "yes"}]}, "drives[0].readonly: 'yes' is not true or"),
    ({"drives": [{"path": "x", "read-only": 1}]}, "drives[0].read-only: no such key; readonly is"),
    ({"nets": [{"kind": "user", "forward": [80]}]}, "nets[0].forward[0]: 80 is not text"),
    ({"vsock": {"path": "v"}}, "vsock: cid is missing"),
    ({"append": 10**80}, "append: 10000"),
]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("data", GOOD, ids=str)
def test_good(data: dict[str, Any]) -> None:
    VALIDATOR.validate(data)
    check(data)


@pytest.mark.parametrize(("data", "says"), BAD, ids=str)
def test_bad(data: object, says: str) -> None:
    # 2.0 is a whole number to JSON Schema, which knows one kind of number.
    assert VALIDATOR.is_valid(data) == (data == {"cpus": 2.0})
    with pytest.raises(UsageError) as caught:
        check(data)
    line = str(caught.value)
    assert line.startswith(says)
    assert "\n" not in line and len(line) < 400


def keywords_of(kind: type) -> dict[str, Any]:
    found = inspect.signature(kind).parameters
    return {name: parameter.default for name, parameter in found.items()}


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_its_keys_and_defaults_are_the_keywords() -> None:
    keywords = keywords_of(MachineConfig)
    assert keywords.keys() - {"devices"} == PROPERTIES.keys()
    for key, schema in PROPERTIES.items():
        if "default" in schema:
            assert schema["default"] == plain(keywords[key]), key
        else:
            assert keywords[key] is None or key == "console", key


@pytest.mark.parametrize("key", [*PARTS, "vsock"])
def test_the_keys_and_defaults_of_the_parts(key: str) -> None:
    keywords = keywords_of(part_class(key))
    properties = part_properties(key)
    assert keywords.keys() == properties.keys()
    for name, schema in properties.items():
        assert schema.get("default", inspect.Parameter.empty) == plain(keywords[name]), name
