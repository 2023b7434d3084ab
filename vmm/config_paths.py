"""The paths of a configuration, made absolute when a machine is made of it.

A program may change its directory while its machines run (pytest's `monkeypatch.chdir`); sockets
are removed, disks copied and snapshots written later.
"""

from __future__ import annotations

import os

from vmm.config import HVC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from vmm.config import MachineConfig

    T = TypeVar("T")

PATHS = {
    "drives": ("path", "backing", "data_file"),
    "nets": ("pcap",),
    "ports": ("socket", "file"),
    "shares": ("path",),
    "vhost_user_blks": ("socket",),
    "vsock": ("path",),
}
"""The keys of each part that are paths; besides, `name` of a network card of kind `socket`."""
_SOCKET_MAX = 96
"""Bytes of an absolute path that is taken for a socket (107, and room for `_PORT`); a longer one
stays relative, as the person had to say it."""


def here() -> str:
    """The directory that this process is in; empty where it has been removed: relative paths stay
    relative then."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def is_relative(config: MachineConfig) -> bool:
    """Whether it may name files by paths that are not absolute, beside what is read at once."""
    return bool(
        config.drives or config.nets or config.ports or config.shares or config.vhost_user_blks
        or config.vsock or config.root or config.modules
        or config.console_where.startswith("file:")
    )  # fmt: skip


def absolute(config: MachineConfig) -> MachineConfig:
    """A copy of `config` in which those paths are absolute, but for the console's."""
    directory = here()
    made = _copy(config)
    for key in PATHS:
        value = getattr(config, key)
        if isinstance(value, tuple):
            setattr(made, key, tuple(_part(key, part, directory) for part in value))
        elif value is not None:
            setattr(made, key, _part(key, value, directory))
    for key in ("root", "modules"):
        value = getattr(config, key)
        setattr(made, key, value and os.path.join(directory, value))
    return made


def settle_console(config: MachineConfig, directory: str) -> None:
    """Make the path of the console's file absolute in `config`, once the file is open."""
    where = config.console_where
    if where.startswith("file:"):
        where = "file:" + os.path.join(directory, where[5:])
        config.console = f"{HVC},{where}" if config.hvc else where


def _part(key: str, part: object, directory: str) -> object:
    made = _copy(part)
    names = PATHS[key]
    if getattr(part, "kind", "") == "socket":
        names = (*names, "name")
    for name in names:
        value = getattr(part, name)
        if isinstance(value, tuple):
            setattr(made, name, tuple(os.path.join(directory, path) for path in value))
        elif value:
            path = os.path.join(directory, value)
            # A socket, or the beginning of the names of some.
            socket = name in ("socket", "name") or key == "vsock"
            if not socket or len(os.fsencode(path)) <= _SOCKET_MAX:
                setattr(made, name, path)
    return made


def _copy(value: T) -> T:
    made = object.__new__(type(value))
    for name in type(value).__slots__:  # type: ignore[attr-defined]
        setattr(made, name, getattr(value, name))
    return made
