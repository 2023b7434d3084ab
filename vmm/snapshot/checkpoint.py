"""A point in a machine's life that it can go back to, in place: `Machine.checkpoint`, `.rollback`.

Memory is put over a base (`vmm.memory.point`), so going back undoes the pages written since, and
nothing else. Disks with an overlay get one more, which is emptied. The rest is what a snapshot has
too, put into the machine that is there.
"""

from __future__ import annotations

import contextlib

from vmm.errors import StateError, UsageError
from vmm.memory import point
from vmm.memory.pagemap import Pagemap
from vmm.snapshot.capture import STATES, apply, capture, quiesced
from vmm.snapshot.translations import remake_slots, roots, shadowed
from vmm.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.block.frozen import Frozen
    from vmm.machine import Machine
    from vmm.virtio.blk import Block

DISKS = ("rollback", "keep")
_OR_RUNNING = ", ".join((*STATES, "running")[:-1]) + " or running"


@contextlib.contextmanager
def still(machine: Machine, call: str) -> Iterator[None]:
    """With the vCPUs parked: paused meanwhile, if it runs.

    Raises:
        StateError: it cannot be, in the name of `call`.
    """
    if machine.in_vcpu_thread:
        raise StateError(
            f"{call}: called in a vCPU's own thread, which cannot wait for itself; "
            "call it in another"
        )
    with machine.moment:  # one at a time: the first to end would resume it under the others
        running = machine.state == "running"
        if running:
            machine.pause()
        if machine.state not in STATES:
            raise StateError(f"{call}: the machine is {machine.state}, not {_OR_RUNNING}")
        try:
            yield
        finally:
            if running and machine.state == "paused":
                machine.resume()


def watch_files(machine: Machine) -> None:
    """Have the memory of `machine`, which is mapped from a snapshot's files, leave them before
    somebody changes one (vmm.snapshot.lease)."""
    from _weakref import ref

    found = ref(machine)

    def leave() -> None:
        machine = found()
        if machine is not None:
            leave_files(machine)

    machine.memory.leave = leave


def leave_files(machine: Machine) -> None:
    """Copy the memory of `machine`, which is parked meanwhile, out of the files it is mapped from.

    No earlier checkpoint can be gone back to afterwards.
    """
    from vmm.memory.base import settle

    memory = machine.memory
    with contextlib.ExitStack() as stack:
        if machine.state != "stopped":
            stack.enter_context(still(machine, "memory"))
            stack.enter_context(quiesced(machine))
        if memory.base is not None:
            memory.base.lost = True
        pagemap = Pagemap()
        try:
            settle(memory, pagemap)
        finally:
            pagemap.close()


class Checkpoint:
    """What `machine`, whose vCPUs are parked, is now.

    Attributes:
        closed: it cannot be gone back to any more.

    Args:
        former: the checkpoint this one replaces; closed, unless this one cannot be.
        disks: one of DISKS.

    Raises:
        StateError: a device, a disk or the memory cannot be rolled back; one line says which.
    """

    def __init__(self, machine: Machine, former: Checkpoint | None, disks: str) -> None:
        if disks not in DISKS:
            raise UsageError(f"checkpoint: disks={disks!r} is not one of {', '.join(DISKS)}")
        self._machine = machine
        self.closed = False
        self._shadowed = shadowed()
        self._disks: list[tuple[Block, Frozen]] = []
        overlays = overlaid_disks(machine, "checkpoint") if disks == "rollback" else []
        self._pagemap = Pagemap()
        try:
            with quiesced(machine):
                self.state = capture(machine)
                if former is not None:
                    former.close()
                self._memory = point.take(machine.memory, self._pagemap)
                for device in overlays:
                    self._disks.append((device, freeze(device)))
        except BaseException:
            self._pagemap.close()
            raise

    def roll_back(self) -> None:
        """Be that again; the vCPUs are parked."""
        machine = self._machine
        with quiesced(machine):
            if self._shadowed:
                self._memory.restore(machine.memory, self._pagemap)
                remake_slots(machine)
            else:
                self._memory.restore(machine.memory, self._pagemap, roots(machine))
            for device, frozen in self._disks:
                _undo(device, frozen)
            apply(machine, self.state, elapse=False, renew=False)
            if machine.platform.agent is not None:
                machine.platform.agent.cut()

    def close(self) -> None:
        """Forget it; the machine goes on as it is. Harmless twice."""
        if self.closed:
            return
        self.closed = True
        self._pagemap.close()
        self._memory.close()
        disks, self._disks = self._disks, []
        for _, frozen in disks:
            frozen.close()


# --- disks ------------------------------------------------------------------------------------


def overlaid_disks(machine: Machine, call: str) -> list[Block]:
    """The disks that are written to, all of them on overlays.

    Raises:
        StateError: one is not.
    """
    virtio = machine.platform.virtio
    devices = [transport.device for transport in virtio.transports] if virtio is not None else []
    found: list[Block] = []
    for device in devices:
        if device.ID != spec.ID_BLOCK:
            continue
        from vmm.block.overlay import Overlay
        from vmm.virtio.blk import Block

        if not isinstance(device, Block) or device.image.readonly:
            continue
        if not isinstance(device.storage, Overlay):
            ways = "give the drive `snapshot`"
            if call == "checkpoint":
                ways += ", or say disks='keep' to have its contents stay as they are at a rollback"
            raise StateError(f"{call}: {device.name}: {device.image.path} is written to; {ways}")
        found.append(device)
    return found


def freeze(device: Block) -> Frozen:
    """What the disk holds now, which the caller shares; what is written from now on is above it."""
    from vmm.block.frozen import Frozen
    from vmm.block.overlay import Overlay

    top = device.storage
    assert isinstance(top, Overlay)
    below = top.base
    if isinstance(below, Frozen):
        below.share()
        if top.empty or below.take(top):  # or nobody else needs it as it was
            return below
        below.close()
    frozen = Frozen(top)
    device.storage = Overlay(frozen.share())
    return frozen


def _undo(device: Block, frozen: Frozen) -> None:
    from vmm.block.overlay import Overlay

    top = device.storage
    assert isinstance(top, Overlay)
    if top.base is frozen:
        top.clear()
        device.storage = top  # whoever is above it forgets, too
    else:  # it was frozen once more, for clones
        device.storage = Overlay(frozen.share())
        top.close()
