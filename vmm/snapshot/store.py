"""Snapshots as directories: written whole or not at all, and opened as a chain.

manifest.json   what is here, what made it, checksums
state.json      what `capture` gave
memory          RAM, sparse; of a differential what differs from its base's
memory.index    which pages that is, checksums
disk0, ...      disks, where they were copied (disk0.index: checksums)
"""

from __future__ import annotations

import contextlib
import copy
import os
import time

from vmm import __version__
from vmm.config import MachineConfig
from vmm.errors import HostError, SnapshotError, UsageError
from vmm.snapshot import disks, host, manifest, plain
from vmm.snapshot import memory as ram
from vmm.snapshot.capture import SCHEMA as STATE_SCHEMA
from vmm.snapshot.capture import capture, quiesced
from vmm.snapshot.checkpoint import watch_files
from vmm.snapshot.index import Index
from vmm.snapshot.origin import Restored

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.machine import Machine

STATE, MEMORY, INDEX = "state.json", "memory", "memory.index"


class Snapshot:
    """An opened snapshot, its manifest and state checked; its files stay open until `close`.

    Attributes:
        path: its directory, absolute.
        manifest: what is in manifest.json.
        base: the snapshot it is the difference to, or None.
    """

    def __init__(self, path: str, *, depth: int = 0) -> None:
        self.path = os.path.abspath(path)
        self.base: Snapshot | None = None
        self._fd = -1
        self.manifest = manifest.read(self.path)
        self.files: dict[str, dict[str, Any]] = self.manifest["files"]
        manifest.check_sizes(self.path, self.files)
        try:
            self._fd = os.open(os.path.join(self.path, MEMORY), os.O_RDONLY | os.O_CLOEXEC)
            if self.manifest["base"] is not None:
                if depth > 1000:
                    raise SnapshotError(f"{self.path}: a chain of more than 1000 snapshots")
                self.base = self._open_base(depth)
        except BaseException:
            self.close()
            raise

    def _open_base(self, depth: int) -> Snapshot:
        told = self.manifest["base"]
        path = os.path.normpath(os.path.join(self.path, told["path"]))
        try:
            base = Snapshot(path, depth=depth + 1)
        except SnapshotError as err:
            raise SnapshotError(f"{self.path}: its base: {err}") from None
        if base.checksum != told["checksum"]:
            base.close()
            raise SnapshotError(f"{self.path}: {path} is another snapshot than its base was")
        return base

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Harmless twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self.base is not None:
            self.base.close()

    @property
    def checksum(self) -> str:
        """What it is known by: its manifest's, which covers the rest by checksums of its own."""
        return str(self.manifest[manifest.CHECKSUM])

    @property
    def memory_size(self) -> int:
        """Bytes of RAM."""
        return int(self.files[MEMORY]["size"])

    def state(self) -> dict[str, Any]:
        """What `capture` gave, checked. Raises SnapshotError."""
        data = manifest.read_file(self.path, STATE, self.files)
        try:
            state = plain.loads(data)
        except ValueError:
            raise SnapshotError(f"{self.path}/{STATE} is not a machine's state") from None
        if state["schema"] > STATE_SCHEMA:
            raise SnapshotError(
                f"{self.path}/{STATE} has schema {state['schema']}, newer than {STATE_SCHEMA}, "
                "which this version of vmm understands"
            )
        return state  # type: ignore[no-any-return]

    def index(self) -> Index:
        """The memory file's, checked. Raises SnapshotError."""
        name = os.path.join(self.path, INDEX)
        return Index.unpack(manifest.read_file(self.path, INDEX, self.files), name)

    def layers(self, *, whole: bool = False) -> list[ram.Layer]:
        """The memory files of the chain, the full one first; each to be closed.

        Of the full one the index, which may be large, is only read for `whole`.
        """
        found = self.base.layers(whole=whole) if self.base is not None else []
        try:
            index = self.index() if whole or self.base is not None else Index({}, [])
            found.append(ram.Layer(os.dup(self._fd), index))
        except BaseException:
            close_all(found)
            raise
        return found

    def memory_paths(self) -> list[str]:
        """The names of the memory files, in the order of `layers`."""
        below = self.base.memory_paths() if self.base is not None else []
        return [*below, os.path.join(self.path, MEMORY)]

    def verify(self) -> None:
        """Read everything, bases too, and compare it with its checksums. Raises SnapshotError."""
        if self.base is not None:
            self.base.verify()
        self.state()
        self.index().check(self._fd, self.memory_size, os.path.join(self.path, MEMORY))
        for disk in self.manifest["disks"]:
            if "index" not in disk:
                continue
            path = os.path.join(self.path, disk["file"])
            data = manifest.read_file(self.path, disk["index"], self.files)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                Index.unpack(data, disk["index"]).check(fd, disk["size"], path)
            finally:
                os.close(fd)


def close_all(layers: list[ram.Layer]) -> None:
    """Close each."""
    for layer in layers:
        layer.close()


# --- making ---------------------------------------------------------------------------------------


def save(
    machine: Machine, path: str, *, base: str | None = None, disk: str = "copy", track: bool = False
) -> None:
    """Make the snapshot `path` of a machine that is paused or created; see `Machine.snapshot`."""
    if disk not in disks.HOW:
        raise UsageError(f"snapshot: disks={disk} is not one of {', '.join(disks.HOW)}")
    target = os.path.abspath(path)
    if os.path.lexists(target):
        raise UsageError(f"snapshot: {path} exists already")
    if track:
        ram.need_private(machine.memory)
    below = Snapshot(base) if base is not None else None
    try:
        if below is not None and below.memory_size != machine.config.memory:
            raise SnapshotError(
                f"snapshot: {base} is of a machine with {below.memory_size} bytes of memory, "
                f"this one has {machine.config.memory}"
            )
        made = _make_parents(target, path)
        partial = ""
        try:
            partial = _partial(target, path)
            with quiesced(machine):
                _write(machine, partial, target, below, disk)
                os.rename(partial, target)
                if track:
                    go_on_over(machine, target)
            _sync_directory(os.path.dirname(target))
            made = []
        except OSError as err:
            raise HostError(f"snapshot: {path}: {err.strerror or err}") from err
        finally:
            _remove(partial)
            for directory in made:
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
    finally:
        if below is not None:
            below.close()


def _make_parents(target: str, path: str) -> list[str]:
    """Make the directories above the target that are missing; those made, the innermost first."""
    missing = []
    above = os.path.dirname(target)
    while not os.path.lexists(above):
        missing.append(above)
        above = os.path.dirname(above)
    made: list[str] = []
    for directory in reversed(missing):
        try:
            os.mkdir(directory)
        except FileExistsError:
            continue
        except OSError as err:
            for each in made:
                os.rmdir(each)
            raise UsageError(f"snapshot: {path}: {directory}: {err.strerror}") from None
        made.insert(0, directory)
    return made


def _partial(target: str, path: str) -> str:
    """A new directory beside the target, for it to become."""
    import tempfile

    parent, name = os.path.split(target)
    try:
        return tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=parent)
    except OSError as err:
        raise UsageError(f"snapshot: {path}: {parent}: {err.strerror}") from None


def _remove(directory: str) -> None:
    """What was not finished; nothing, if it was."""
    if os.path.isdir(directory):
        import shutil

        shutil.rmtree(directory, ignore_errors=True)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(
    machine: Machine, directory: str, target: str, below: Snapshot | None, disk: str
) -> None:
    state = capture(machine)
    with open(os.path.join(directory, STATE), "xb") as file:
        file.write(plain.dumps(state))
    since = below is not None and _is_over(machine, below)
    layers = below.layers(whole=not since) if below is not None else None
    try:
        fd = os.open(os.path.join(directory, MEMORY), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            index = ram.write(fd, machine.memory, layers, since=since)
        finally:
            os.close(fd)
    finally:
        close_all(layers or [])
    with open(os.path.join(directory, INDEX), "xb") as file:
        file.write(index.pack())
    told = disks.save(machine, directory, disk)
    names = [STATE, MEMORY, INDEX]
    names += [each[key] for each in told for key in ("file", "index") if key in each]
    relative = None
    if below is not None:
        relative = {"path": os.path.relpath(below.path, target), "checksum": below.checksum}
    manifest.write(
        directory,
        {
            "vmm": __version__,
            "id": os.urandom(16).hex(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "base": relative,
            "host": host.facts(),
            "guest": {
                "tsc_khz": state["vcpus"][0]["tsc_khz"],
                "features": " ".join(host.guest_features(state["vcpus"][0]["cpuid"])),
            },
            "config": _config(machine.config),
            "directory": machine.directory,
            "disks": told,
            "files": manifest.seal(directory, names),
        },
    )


def _is_over(machine: Machine, snapshot: Snapshot) -> bool:
    origin = machine.origin
    return isinstance(origin, Restored) and origin.is_over(machine.memory, snapshot)


def _config(config: MachineConfig) -> dict[str, object]:
    """As plain data; what functions of the program's own make is not in it."""
    plain_config = copy.copy(config)
    plain_config.devices = ()
    return plain_config.to_dict()


def go_on_over(machine: Machine, path: str) -> None:
    """Have the memory of a machine that is still be a private mapping of the snapshot `path`, just
    made of it: what it writes from then on the page tables know."""
    with Snapshot(path) as snapshot:
        layers = snapshot.layers()
        try:
            ram.go_on_over(machine.memory, layers)
        finally:
            close_all(layers)
        machine.origin = Restored(snapshot.checksum, machine.memory)
        watch_files(machine)
