"""What of the host a snapshot's manifest names, and whether this user has said so.

A manifest tells the configuration of the machine that was kept. Most of that is about the guest.
Some of it names things of the host: files, sockets, devices, networks, programs. To open what
somebody else's manifest names would give him what this user may open. So such names come from the
caller, or have a seal.

The seal is a keyed hash (BLAKE2b) over those names and nothing else. The key is this user's: 32
random bytes in a file that nobody else reads. `stamp` makes the seal where a snapshot is written,
`is_sealed` compares it where one is read. A manifest in which another name was put has no seal that
fits, nor has one that was made by another user, or on another host.
"""

from __future__ import annotations

import contextlib
import os
import stat

from vmm.config_paths import is_relative
from vmm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from typing import Any

    from vmm.config import MachineConfig

KEY_SIZE = 32
NAME = "snapshot.key"
SEAL = "seal"
"""The manifest's key."""
GUEST = (
    "kernel", "initrds", "append", "default_append", "memory", "cpus", "cpu", "boot", "acpi",
    "cmdline_devices", "timeout", "on_panic", "backing", "rng", "balloon", "transport", "agent",
    "fault_seed", "trace",
)  # fmt: skip
"""Keys of a configuration that have nothing of the host opened when a machine is restored. (Its
kernel is in its memory.)"""
HOST = (
    "console", "drives", "nets", "ports", "vsock", "shares", "vhost_user_blks", "root", "rw",
    "overlay", "modules", "device",
)  # fmt: skip
"""The other keys."""


def names(config: Mapping[str, Any], inside: Sequence[bool]) -> dict[str, str]:
    """What of the host `config`, plain data, names: by key, as a person may read it.

    Args:
        inside: of each drive, and of the root image after them, whether the snapshot has it.
    """
    found: dict[str, str] = {}
    for key in HOST:
        text = _text(key, config.get(key), inside, len(_list(config.get("drives"))))
        if text:
            found[key] = text
    return found


def _text(key: str, value: object, inside: Sequence[bool], drives: int) -> str:
    if not value:
        return ""
    if key == "console":
        where = str(value).removeprefix("hvc").removeprefix(",")
        return "" if where in ("", "auto", "none") else str(value)
    if key == "device":
        return "" if value == "/dev/kvm" else str(value)
    if key == "drives":
        outside = [
            _named(each, "path")
            for number, each in enumerate(_list(value))
            if not inside[number : number + 1] or not inside[number]
        ]
        return ", ".join(outside)
    if key == "root":
        return "" if len(inside) > drives and inside[drives] else str(value)
    if key == "nets":
        cards = [each for each in _list(value) if each != {"kind": "none"} and each != "none"]
        return ", ".join(_named(each, "kind") for each in cards)
    if key == "vsock":
        if isinstance(value, dict) and not value.get("path") and not value.get("vhost"):
            return ""
        return _named(value, "path")
    if key in ("ports", "shares", "vhost_user_blks"):
        return ", ".join(_named(each, "socket", "file", "path") for each in _list(value))
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else []


def _named(part: object, *keys: str) -> str:
    if isinstance(part, dict):
        return next((str(part[key]) for key in keys if part.get(key)), str(part))
    return str(part)


def check(
    what: str, config: Mapping[str, Any], inside: Sequence[bool], given: Collection[str]
) -> None:
    """SnapshotError if `what`, the snapshot with `config`, which has no seal, names something of
    the host that is not among the keys the caller has `given`."""
    left = {key: text for key, text in names(config, inside).items() if key not in given}
    if not left:
        return
    told = "; ".join(f"{key}: {text[:200]}" for key, text in left.items())
    raise SnapshotError(
        f"{what} was made by another user or elsewhere, or was changed since, and names what is "
        f"outside of it ({told}); say yourself what there is now ({_words(left)}), or, if you "
        "trust whoever made it, trusted=True (--trusted)"
    )


def _words(keys: Collection[str]) -> str:
    return ", ".join(f"{key}=" for key in keys)


# --- the seal -------------------------------------------------------------------------------------

_key = b""
_stamps: dict[bytes, str] = {}
"""Seals that this process has made, by what they are of: one that is confined later has no key."""


def stamp(config: Mapping[str, Any], directory: str, base: str | None = None) -> str:
    """This user's seal of what `config` names of the host, relative to `directory`, and of the
    snapshot `base` that is not beside the one with this manifest. Empty where nothing is named."""
    text = _canonical(config, directory, base)
    if not text:
        return ""
    if text not in _stamps:
        _stamps[text] = _hash(text)
    return _stamps[text]


def prepare(config: MachineConfig, directory: str) -> None:
    """Make the seal for the snapshots of a machine with `config` now, while this process may read
    the key. One that is confined later has no key: taken over by its guest, it could put this
    user's seal on what the machine has anyway, and on nothing else."""
    if is_relative(config):
        stamp(without_devices(config).to_dict(), directory)


def without_devices(config: MachineConfig) -> MachineConfig:
    """The same, but for what functions of the program's own make: they are not plain data."""
    import copy

    made = copy.copy(config)
    made.devices = ()
    return made


def is_sealed(manifest: Mapping[str, Any]) -> bool:
    """Whether this user's seal is on what `manifest` names of the host."""
    seal = manifest.get(SEAL)
    base = manifest["base"]
    path = None if base is None else base["path"]
    text = _canonical(manifest["config"], manifest["directory"], path)
    if not text or not seal:
        return False
    return bool(seal == (_stamps.get(text) or _hash(text)))


def is_beside(path: str) -> bool:
    """Whether a base's path leads to a directory beside the snapshot's own."""
    head, name = os.path.split(path)
    return head == os.pardir and name not in ("", os.curdir, os.pardir)


def _canonical(config: Mapping[str, Any], directory: str, base: str | None) -> bytes:
    """What the seal is of; empty where nothing is named."""
    told: dict[str, object] = {key: config[key] for key in HOST if config.get(key)}
    if base is not None and not is_beside(base):
        told["base"] = base
    if not told:
        return b""
    import json

    told["directory"] = directory
    return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()


def _hash(text: bytes) -> str:
    import hashlib

    return hashlib.blake2b(text, digest_size=32, key=key(), person=b"vmm snapshot").hexdigest()


def key() -> bytes:
    """This user's key; made if there is none. Where no file can be had it is this process's."""
    global _key
    if not _key:
        _key = _find() or os.urandom(KEY_SIZE)
    return _key


def _find() -> bytes:
    places = list(_places())
    for place in places:
        with contextlib.suppress(OSError):
            found = _read(place)
            if found:
                return found
    for place in places:
        with contextlib.suppress(OSError):
            return _make(place)
    return b""


def _places() -> Iterator[str]:
    """Directories for the key: this user's state (XDG_STATE_HOME, ~/.local/state), and until the
    next start of the host, where that cannot be written, /run."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if os.path.isabs(home):
        yield os.path.join(home, "vmm")
    user = os.geteuid()
    yield f"/run/user/{user}/vmm" if user else "/run/vmm"


def _read(place: str) -> bytes:
    """The key in `place`; empty, or an OSError, where there is none that is this user's alone."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(os.path.join(place, NAME), flags)
    try:
        status = os.fstat(fd)
        mine = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        if not stat.S_ISREG(status.st_mode) or not mine or status.st_size != KEY_SIZE:
            return b""
        return os.read(fd, KEY_SIZE)
    finally:
        os.close(fd)


def _make(place: str) -> bytes:
    """A new key in `place`; that of another process which was quicker."""
    above = place
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if os.stat(above).st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{above} belongs to another user")
    os.makedirs(place, mode=0o700, exist_ok=True)
    status = os.stat(place)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{place}: others may write there")
    path = os.path.join(place, NAME)
    unfinished = f"{path}.{os.urandom(8).hex()}"
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(fd, os.urandom(KEY_SIZE))
            os.fsync(fd)
        finally:
            os.close(fd)
        with contextlib.suppress(FileExistsError):
            os.link(unfinished, path)
    finally:
        os.unlink(unfinished)
    found = _read(place)
    if not found:
        raise PermissionError(f"{path} is not this user's alone")
    return found
