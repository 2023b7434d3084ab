"""Configurations as plain data and as TOML or JSON files."""

from __future__ import annotations

import os

from vmm.config import HVC, MachineConfig
from vmm.config_paths import PATHS
from vmm.config_schema import PROPERTIES, SCHEMA, SCHEMA_KEY, check
from vmm.errors import UsageError
from vmm.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SUFFIXES = (".toml", ".json")
SIZE_MAX = 1 << 20
"""Bytes of a file; more is taken for another kind of file."""
DOTS_MAX = 200
"""Dots in a line of TOML, outside of text: what tomllib takes for a key grows with their square."""
KEYS = {
    "--initrd": "initrds",
    "--drive": "drives",
    "--net": "nets",
    "--port": "ports",
    "--fs": "shares",
    "--vhost-user-blk": "vhost_user_blks",
    "--no-acpi": "acpi",
    "--cmdline-devices": "cmdline_devices",
    "--verbose": "trace",
    "KERNEL": "kernel",
}
"""The keys of options that are called otherwise than their keys."""


def is_file_name(name: str) -> bool:
    """Whether `name` is that of a configuration, not of a kernel."""
    return name.endswith(SUFFIXES)


def read(path: str) -> dict[str, object]:
    """What the file holds, checked, as keywords of MachineConfig; paths in it are absolute.

    Raises:
        UsageError: in a line that names the file, and the line or the key.
    """
    data = _parse(path)
    try:
        return keywords(data, os.path.dirname(os.path.abspath(path)))
    except UsageError as err:
        raise UsageError(f"{path}: {err}") from None


def _parse(path: str) -> object:
    if not is_file_name(path):
        raise UsageError(f"{path}: a configuration's name ends in {' or '.join(SUFFIXES)}")
    from vmm.fifo import open_stored

    try:
        with open_stored(path) as file:
            raw = file.read(SIZE_MAX + 1)
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}") from None
    if len(raw) > SIZE_MAX:
        raise UsageError(f"{path}: over {SIZE_MAX >> 20} MiB is no configuration")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        line = raw.count(b"\n", 0, err.start) + 1
        raise UsageError(f"{path}: line {line}: not UTF-8 text") from None
    if path.endswith(".json"):
        return _parse_json(path, text)
    import tomllib

    _check_dots(path, text)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        what, _, where = str(err).removesuffix(")").rpartition(" (at ")
        if where == "end of document":
            where = f"line {len(text.splitlines())}"
        raise UsageError(f"{path}: {where}: {what}" if what else f"{path}: {err}") from None
    except (RecursionError, ValueError) as err:
        raise _extreme(path, err) from None


def _check_dots(path: str, text: str) -> None:
    """UsageError: a key of very many parts, with which tomllib is busy for hours."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > DOTS_MAX:
            import re

            if re.sub(r'"(?:[^"\\]|\\.)*"|\'[^\']*\'', "", line).count(".") > DOTS_MAX:
                raise UsageError(f"{path}: line {number}: a key of more than {DOTS_MAX} parts")


def _extreme(path: str, err: Exception) -> UsageError:
    """What both parsers raise of their own on a file nobody wrote by hand."""
    deep = isinstance(err, RecursionError)
    return UsageError(f"{path}: {'nested too deeply' if deep else err}")


def _parse_json(path: str, text: str) -> object:
    import json

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):  # JSON lets the last one win; TOML does not
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"{path}: {twice}: given twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as err:
        raise UsageError(f"{path}: line {err.lineno}, column {err.colno}: {err.msg}") from None
    except (RecursionError, ValueError) as err:
        raise _extreme(path, err) from None


def keywords(data: object, base: str = "") -> dict[str, object]:
    """Keywords of MachineConfig out of plain data; relative paths are taken from `base`.

    UsageError, in a line that begins with the key.
    """
    check(data)
    assert isinstance(data, dict)
    data = {key: value for key, value in data.items() if key != SCHEMA_KEY}
    values: dict[str, object] = {}
    for key, value in data.items():
        try:
            values[key] = _convert(key, value, base)
        except UsageError as err:
            raise UsageError(named(err, key)) from None
    return values


def from_dict(data: Mapping[str, object], base: str = "") -> MachineConfig:
    """See `MachineConfig.from_dict`."""
    try:
        return MachineConfig(**keywords(dict(data), base))  # type: ignore[arg-type]
    except UsageError as err:
        raise UsageError(with_key(err)[1]) from None


def load(path: str) -> MachineConfig:
    """See `MachineConfig.load`."""
    return configure(path, {})


def configure(path: str, given: Mapping[str, object], console: str = "none") -> MachineConfig:
    """The file's configuration, where `given`, other keywords, override it or (lists, `append`) add
    to it, and `console` is the default. UsageError names the file where what is wrong is in that.
    """
    values = {"console": console, **read(path)}
    for key, value in given.items():
        before = values.get(key)
        if isinstance(value, (list, tuple)) and isinstance(before, list):
            values[key] = [*before, *value]
        elif key == "append" and before:
            values[key] = f"{before} {value}"
        else:
            values[key] = value
    try:
        return MachineConfig(**values)  # type: ignore[arg-type]
    except UsageError as err:
        key, line = with_key(err)
        if key in given or not key:
            raise
        raise UsageError(f"{path}: {line}") from None


def with_key(err: UsageError) -> tuple[str, str]:
    """The key that a complaint of MachineConfig is about (empty: none), and the complaint with the
    key in place of the option."""
    text = str(err)
    words = text.split("=")[0].split()  # none, where a key begins with the sign
    option = words[0].rstrip(":") if words else ""
    key = KEYS.get(option, option.removeprefix("--").replace("-", "_"))
    if key not in PROPERTIES:
        return "", text
    return key, named(err, key)


def named(err: UsageError, key: str) -> str:
    """A complaint about an option, as one about `key`."""
    text = str(err)
    for option in ("--" + key.replace("_", "-"), *(o for o, k in KEYS.items() if k == key)):
        if text.startswith(option):
            return f"{key}: {text[len(option) :].lstrip(' :=')}"
    return text if text.startswith(key) else f"{key}: {text}"


def _convert(key: str, value: object, base: str) -> object:
    if key in PARTS:
        assert isinstance(value, (list, tuple))
        made = []
        for number, item in enumerate(value):
            try:
                made.append(_part(key, item, base))
            except UsageError as err:
                line = named(err, key).removeprefix(f"{key}: ")
                raise UsageError(f"{key}[{number}]: {line}") from None
        return made
    if key == "vsock":
        return _part(key, value, base)
    if key in ("memory", "balloon") and isinstance(value, str):
        return parse_size(value, f"{key}:")
    if key in ("kernel", "device", "root", "modules"):
        return _join(base, str(value))
    if key in ("initrds", "rw", "overlay"):
        assert isinstance(value, (list, tuple))
        return [_join(base, str(path)) for path in value]
    if key == "console":
        hvc, comma, where = str(value).partition(",")
        if hvc != HVC or not comma:
            hvc, where = "", str(value)
        if where.startswith("file:") and where != "file:":
            where = "file:" + _join(base, where[5:])
        return f"{hvc},{where}" if hvc else where
    return value


def _join(base: str, path: str) -> str:
    return os.path.join(base, path) if base and path else path


PARTS = ("drives", "nets", "ports", "shares", "vhost_user_blks")


def part_class(key: str) -> type:
    """The class of what `key` holds."""
    if key == "drives":
        from vmm.block.drive import Drive

        return Drive
    if key == "nets":
        from vmm.net.config import Net

        return Net
    if key == "ports":
        from vmm.virtio.console_config import PortConfig

        return PortConfig
    if key == "vsock":
        from vmm.virtio.vsock_config import VsockConfig

        return VsockConfig
    if key == "vhost_user_blks":
        from vmm.block.vhost_user import VhostUserBlk

        return VhostUserBlk
    from vmm.virtio.fs import Share

    return Share


def _part(key: str, value: object, base: str) -> object:
    kind = part_class(key)
    if isinstance(value, str):
        if not base:
            return kind.parse(value)  # type: ignore[attr-defined]
        value = _text_as_table(key, value, base)
    assert isinstance(value, dict)
    paths = (*PATHS[key], "name") if value.get("kind") == "socket" else PATHS[key]
    made = {name: _based(base, item) if name in paths else item for name, item in value.items()}
    return kind(**made)


def _based(base: str, item: object) -> object:
    """A path, or a list of them, taken from `base`; anything else as it is."""
    if isinstance(item, (list, tuple)):
        return [_based(base, each) for each in item]
    return _join(base, item) if isinstance(item, str) else item


def _text_as_table(key: str, text: str, base: str) -> dict[str, object]:
    """The option's text as a table, whose paths can be joined with `base`."""
    if key == "shares":  # the directory must be there already for a Share to be made
        head, comma, tail = text.replace(",,", "\0").partition(",")
        path = _join(base, head.replace("\0", ",")).replace(",", ",,")
        made: object = part_class(key).parse(f"{path}{comma}{tail.replace(chr(0), ',,')}")  # type: ignore[attr-defined]
    else:
        made = part_class(key).parse(text)  # type: ignore[attr-defined]
    return {name: getattr(made, name) for name in part_properties(key)}


def part_properties(key: str) -> dict[str, dict[str, object]]:
    """The schema of the table form of one of `key`."""
    schema = PROPERTIES[key]
    items = schema.get("items", schema)
    assert isinstance(items, dict)
    found: dict[str, dict[str, object]] = items["anyOf"][1]["properties"]
    return found


def to_dict(config: MachineConfig, *, defaults: bool = False) -> dict[str, object]:
    """See `MachineConfig.to_dict`."""
    if config.devices:
        raise UsageError("devices: functions of a program's own are not plain data")
    data: dict[str, object] = {}
    for key, schema in PROPERTIES.items():
        value = getattr(config, key)
        if key in PARTS:
            value = [_plain(key, part, defaults) for part in value]
        elif key == "vsock" and value is not None:
            value = _plain(key, value, defaults)
        elif isinstance(value, tuple):
            value = list(value)
        default = schema.get("default")
        if key == "console":
            default = "none"
        elif key == "backing":
            default = "" if config.root is not None else config.default_backing
        if value is not None and (defaults or value != default):
            data[key] = value
    return data


def _plain(key: str, part: object, defaults: bool) -> dict[str, object]:
    data: dict[str, object] = {}
    for name, schema in part_properties(key).items():
        value = getattr(part, name)
        if isinstance(value, tuple):
            value = list(value)
        if defaults or "default" not in schema or value != schema["default"]:
            data[name] = value
    return data


def schema_text() -> str:
    """What `vmm config --schema` prints."""
    import json

    return json.dumps(SCHEMA, indent=2) + "\n"
