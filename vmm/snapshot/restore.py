"""A machine out of a snapshot."""

from __future__ import annotations

from vmm.config import HVC, MachineConfig
from vmm.config_types import shown
from vmm.errors import KvmError, ShapeError, SnapshotError, UsageError
from vmm.machine import Machine
from vmm.machine.begin import begin
from vmm.snapshot import disks, host, trust
from vmm.snapshot.capture import apply, check_shape
from vmm.snapshot.checkpoint import watch_files
from vmm.snapshot.manifest import KEEP
from vmm.snapshot.memory import map_layers
from vmm.snapshot.origin import Restored
from vmm.snapshot.store import Snapshot, close_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.memory import GuestMemory

FIXED = (
    *("memory", "cpus", "cpu", "transport", "acpi", "cmdline_devices"),
    *("kernel", "initrds", "append", "boot"),
)
"""What a restored machine cannot have otherwise than it had."""


PAGES = ("map", "uffd", "uffd=SOCKET")
CLOCKS = ("step", "keep")
MESSAGE_MAX = 500
"""Characters of a complaint about a value that somebody else wrote."""


class FromFiles(Restored):
    """Memory is a private mapping of the snapshot's files: a page is read when it is first used."""

    elapse = True
    """The time since the snapshot passes for the guest."""

    def __init__(self, snapshot: Snapshot, state: dict[str, Any]) -> None:
        super().__init__(snapshot.checksum)
        self._snapshot = snapshot
        self._state = state

    def map_memory(self, config: MachineConfig) -> GuestMemory:
        layers = self._snapshot.layers()
        try:
            memory = map_layers(layers, self._snapshot.memory_size)
        finally:
            close_all(layers)
        self.mapped(memory)
        return memory

    def apply(self, machine: Machine) -> None:
        watch_files(machine)
        try:
            check_shape(machine, self._state)
            apply(machine, self._state, elapse=self.elapse)
        except ShapeError as err:
            raise SnapshotError(
                f"{self._snapshot.path}: its state does not fit this machine: {err}"
            ) from err
        except KvmError as err:
            raise SnapshotError(
                f"{self._snapshot.path}: this host's KVM does not take its state: {err}"
            ) from err


def restore(
    path: str,
    *,
    verify: bool = False,
    disk: str = "overlay",
    pages: str = "map",
    clock: str = "step",
    trusted: bool | None = None,
    **changed: object,
) -> Machine:
    """See `Machine.restore`."""
    if trusted not in (None, True, False):
        raise UsageError(f"restore: trusted={shown(trusted)} is not True, False or None")
    how, _, where = pages.partition("=") if isinstance(pages, str) else (None, "", "")
    if how not in ("map", "uffd") or (where and how == "map"):
        raise UsageError(f"restore: pages={pages} is not one of {', '.join(PAGES)}")
    if disk not in disks.USES:
        raise UsageError(f"restore: disks={disk} is not one of {', '.join(disks.USES)}")
    if clock not in CLOCKS:
        raise UsageError(f"restore: clock={clock} is not one of {', '.join(CLOCKS)}")
    with Snapshot(path, trusted=trusted) as snapshot:
        if verify:
            snapshot.verify()
        config = configure(snapshot, disk, changed)
        kvm, vm = begin(config)  # a grace period passes while the rest is read
        try:
            told = snapshot.manifest
            host.check(kvm, told["host"], told["guest"]["features"].split(), snapshot.path)
            state = snapshot.state()
            if how == "uffd":
                from vmm.snapshot.pager import FromHandler

                origin: FromFiles = FromHandler(snapshot, state, where)
            else:
                origin = FromFiles(snapshot, state)
        except BaseException:
            vm.close()
            kvm.close()
            raise
        origin.begun, origin.elapse = (kvm, vm), clock == "step"
        return Machine(config, origin=origin)


def configure(snapshot: Snapshot, disk: str, changed: dict[str, Any]) -> MachineConfig:
    """The machine's configuration, with what is given otherwise. Raises UsageError."""
    fixed = sorted(changed.keys() & set(FIXED))
    if fixed:
        raise UsageError(f"restore: {', '.join(fixed)}: a restored machine has what it had")
    from vmm.config_file import keywords
    from vmm.config_schema import check

    told = snapshot.manifest
    where, kept = told["directory"], told["disks"]
    data = dict(told["config"])
    data.pop("timeout", None)
    inside = [each["how"] != KEEP for each in kept]
    try:
        check(data)
        if not snapshot.is_trusted:
            trust.check(snapshot.path, data, inside, changed)
        for key in changed.keys() & data.keys():
            del data[key]
        had = str(told["config"].get("console", "none"))
        made_with = keywords({"drives": data.pop("drives", [])}, where)["drives"]
        given = {**keywords(data, where), **changed}
    except UsageError as err:
        if isinstance(err, SnapshotError):
            raise
        raise _about_configuration(snapshot, err) from None
    given["console"] = _console(had, str(changed.get("console", "")))
    if "drives" not in changed:
        assert isinstance(made_with, list)
        disks.check(snapshot.path, kept, made_with, "root" in data)
        given["drives"] = disks.drives(snapshot.path, kept, made_with, disk)
        if len(kept) > len(made_with):
            given["root"] = disks.path_of(snapshot.path, kept[-1])
    try:
        config = MachineConfig(**given)
    except UsageError as err:
        if changed:
            raise
        raise _about_configuration(snapshot, err) from None
    if config.memory != snapshot.memory_size:
        raise SnapshotError(
            f"{snapshot.path}: its machine has {config.memory} bytes of memory, and its file "
            f"{snapshot.memory_size}"
        )
    return config


def _about_configuration(snapshot: Snapshot, err: UsageError) -> SnapshotError:
    """`err`, about a value that may be very long, as one about a snapshot."""
    text = str(err)
    if len(text) > MESSAGE_MAX:
        text = text[: MESSAGE_MAX - 3] + "..."
    return SnapshotError(f"{snapshot.path}: its configuration: {text}")


def _console(had: str, wanted: str) -> str:
    """What is behind the console now; the device, a virtio console or not, stays. This process's
    terminal is taken only where it is asked for."""
    device, _, where = had.partition(",") if had.startswith(HVC + ",") else ("", "", had)
    if had == HVC:
        device, where = HVC, "auto"
    if not wanted:
        wanted = "none" if where == "auto" else where
    elif wanted.partition(",")[0] == HVC:
        return wanted
    return f"{device},{wanted}" if device else wanted
