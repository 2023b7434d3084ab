"""Snapshots as directories: written whole or not at all, and opened as a chain.

manifest.json   what is here, what made it, checksums
state.json      what `capture` gave
memory          RAM, sparse; of a differential what differs from its base's
memory.index    which pages that is, checksums
disk0, ...      disks, where they were copied (disk0.index: checksums)
"""

from __future__ import annotations

import contextlib
import os
import time

from vmm import __version__
from vmm.errors import HostError, SnapshotError, UsageError
from vmm.layout import PAGE_SIZE
from vmm.snapshot import disks, host, manifest, plain, trust
from vmm.snapshot import memory as ram
from vmm.snapshot.capture import SCHEMA as STATE_SCHEMA
from vmm.snapshot.capture import capture, quiesced
from vmm.snapshot.checkpoint import watch_files
from vmm.snapshot.folder import Folder
from vmm.snapshot.index import Index
from vmm.snapshot.manifest import INDEX, MEMORY, STATE
from vmm.snapshot.origin import Restored

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.machine import Machine

CHAIN_MAX = 1000
"""Snapshots, each the difference to the next; each takes two descriptors."""


class Snapshot:
    """An opened snapshot, its manifest and state checked; its files stay open until `close`.

    Args:
        path: its directory.
        trusted: whether to open what its manifest names outside of it; None: what this user's seal
            is on (`vmm.snapshot.trust`).

    Attributes:
        path: its directory, absolute.
        manifest: what is in manifest.json.
        files: what the manifest says of each file in the directory.
        folder: the directory, open.
        bases: the open snapshots it is the difference to, the full one first.

    Raises:
        SnapshotError: it is damaged, not finished, or no snapshot.
    """

    def __init__(self, path: str, *, trusted: bool | None = None) -> None:
        self.path = os.path.abspath(path)
        self.bases: list[Snapshot] = []
        self._trusted = trusted
        self._fd = -1
        self.folder = Folder(self.path)
        try:
            self._open()
            self._open_bases(trusted)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.manifest = manifest.read(self.folder)
        self.files: dict[str, dict[str, Any]] = self.manifest["files"]
        manifest.check_files(self.folder, self.files)
        self._fd = self.folder.open(MEMORY, self.memory_size)
        if not self.memory_size or self.memory_size % PAGE_SIZE:
            raise SnapshotError(f"{self.path}: {MEMORY} is not whole pages")

    def _open_bases(self, trusted: bool | None) -> None:
        top: Snapshot = self
        while (told := top.manifest["base"]) is not None:
            if len(self.bases) >= CHAIN_MAX:
                raise SnapshotError(f"{self.path}: a chain of more than {CHAIN_MAX} snapshots")
            path = os.path.normpath(os.path.join(top.path, told["path"]))
            if not trust.is_beside(told["path"]) and not top.is_trusted:
                raise SnapshotError(
                    f"{top.path}: its base is elsewhere ({told['path'][:200]!r}), and who made it "
                    "is not known; put the two side by side, or, if you trust whoever made it, "
                    "trusted=True (--trusted)"
                )
            base = object.__new__(Snapshot)
            base.path, base.bases, base._fd, base._trusted = path, [], -1, trusted
            try:
                base.folder = Folder(path, follow=top.is_trusted)
                self.bases.insert(0, base)
                base._open()
            except SnapshotError as err:
                raise SnapshotError(f"{top.path}: its base: {err}") from None
            if base.checksum != told["checksum"]:
                raise SnapshotError(f"{top.path}: {path} is another snapshot than its base was")
            if base.memory_size != self.memory_size:
                raise SnapshotError(f"{top.path}: {path} has another size of memory")
            top = base

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Harmless twice."""
        for each in (*self.bases, self):
            fd, each._fd = each._fd, -1
            if fd >= 0:
                os.close(fd)
            each.folder.close()

    @property
    def is_trusted(self) -> bool:
        """Whether what its manifest names outside of its directory may be opened."""
        if self._trusted is None:
            self._trusted = trust.is_sealed(self.manifest)
        return self._trusted

    @property
    def base(self) -> Snapshot | None:
        """The snapshot it is the difference to."""
        return self.bases[-1] if self.bases else None

    @property
    def checksum(self) -> str:
        """What it is known by: its manifest's, which covers the rest by checksums of its own."""
        return str(self.manifest[manifest.CHECKSUM])

    @property
    def memory_size(self) -> int:
        """Bytes of RAM."""
        return int(self.files[MEMORY]["size"])

    def state(self) -> dict[str, Any]:
        """What `capture` gave, if its checksum is right and its schema known. Its shape is checked
        against the machine's (`vmm.snapshot.shape`). Raises SnapshotError."""
        data = manifest.read_file(self.folder, STATE, self.files)
        try:
            state = plain.loads(data)
        except ValueError:
            state = None
        if not isinstance(state, dict) or type(state.get("schema")) is not int:
            raise SnapshotError(f"{self.path}/{STATE} is not a machine's state")
        if not 1 <= state["schema"] <= STATE_SCHEMA:
            raise SnapshotError(
                f"{self.path}/{STATE} has schema {state['schema']}, newer than {STATE_SCHEMA}, "
                "which this version of vmm understands"
            )
        return state

    def index(self) -> Index:
        """The memory file's, checked. Raises SnapshotError."""
        name = os.path.join(self.path, INDEX)
        data = manifest.read_file(self.folder, INDEX, self.files)
        return Index.unpack(data, name, self.memory_size)

    def layers(self, *, whole: bool = False) -> list[ram.Layer]:
        """The memory files of the chain, the full one first; each to be closed.

        Of the full one the index, which may be large, is only read for `whole`.
        """
        found: list[ram.Layer] = []
        try:
            for each in (*self.bases, self):
                index = each.index() if whole or found else Index({}, [])
                found.append(ram.Layer(os.dup(each._fd), index))
        except BaseException:
            close_all(found)
            raise
        return found

    def memory_paths(self) -> list[str]:
        """The names of the memory files, in the order of `layers`."""
        return [os.path.join(each.path, MEMORY) for each in (*self.bases, self)]

    def verify(self) -> None:
        """Read everything, bases too, and compare it with its checksums. Raises SnapshotError."""
        for each in (*self.bases, self):
            each._verify()

    def _verify(self) -> None:
        self.state()
        self.index().check(self._fd, self.memory_size, os.path.join(self.path, MEMORY))
        for disk in self.manifest["disks"]:
            if "index" not in disk:
                continue
            path = os.path.join(self.path, disk["file"])
            data = manifest.read_file(self.folder, disk["index"], self.files)
            fd = self.folder.open(disk["file"], disk["size"])
            try:
                Index.unpack(data, disk["index"], disk["size"]).check(fd, disk["size"], path)
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
    below = Snapshot(base, trusted=True) if base is not None else None
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
    relative, beside = None, None
    if below is not None:
        beside = os.path.relpath(below.path, target)
        relative = {"path": beside, "checksum": below.checksum}
    config = trust.without_devices(machine.config).to_dict()
    seal = trust.stamp(config, machine.directory, beside)
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
            "config": config,
            "directory": machine.directory,
            **({trust.SEAL: seal} if seal else {}),
            "disks": told,
            "files": manifest.seal(directory, names),
        },
    )


def _is_over(machine: Machine, snapshot: Snapshot) -> bool:
    origin = machine.origin
    return isinstance(origin, Restored) and origin.is_over(machine.memory, snapshot)


def go_on_over(machine: Machine, path: str) -> None:
    """Have the memory of a machine that is still be a private mapping of the snapshot `path`, just
    made of it: what it writes from then on the page tables know."""
    with Snapshot(path, trusted=True) as snapshot:
        layers = snapshot.layers()
        try:
            ram.go_on_over(machine.memory, layers)
        finally:
            close_all(layers)
        machine.origin = Restored(snapshot.checksum, machine.memory)
        watch_files(machine)
