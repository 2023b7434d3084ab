"""Many running copies of one machine, in this process: `Machine.clone`.

The guest's memory becomes a base that all map privately (`vmm.memory.base`), overlays of disks are
kept still under one overlay more for each. The rest is a machine of its own: VM, devices, threads.
VMs are begun ahead: the first memory slot of each waits for a grace period (`vmm.machine.begin`).
"""

from __future__ import annotations

from vmm.errors import UsageError
from vmm.machine.begin import begin
from vmm.machine.copies import Copies
from vmm.machine.machine import Machine
from vmm.machine.origin import Origin
from vmm.memory import GuestMemory, point
from vmm.memory.pagemap import Pagemap
from vmm.snapshot.capture import apply, capture, quiesced
from vmm.snapshot.checkpoint import freeze, overlaid_disks, still, watch_files
from vmm.snapshot.identity import free_cid, own_config
from vmm.snapshot.lease import share
from vmm.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.block.frozen import Frozen
    from vmm.config import MachineConfig
    from vmm.kvm import Kvm, Vm
    from vmm.virtio.blk import Block
    from vmm.virtio.device import VirtioDevice
    from vmm.virtio.net import Nic
    from vmm.virtio.vsock import Vsock

KEEP_PAGES = 128
"""So many pages each copy may get at once, where the base is another's (a snapshot's file)."""
AHEAD = 64
"""VMs begun before the one that is finished; each takes two descriptors."""


def clone(machine: Machine, numbers: Sequence[int], *, checkpoint: bool) -> Copies:
    """See `Machine.clone`; `numbers` are the copies', `checkpoint`: the machine has one."""
    if not numbers:
        raise UsageError("clone: 0 copies; at least 1")
    configs = [own_config(machine.config, number) for number in numbers]
    running = machine.state == "running"
    source = Source(machine, checkpoint)
    begun: list[tuple[Kvm, Vm]] = []
    made = Copies()
    try:
        for place, config in enumerate(configs):
            for each in configs[place + len(begun) : place + AHEAD]:
                begun.append(begin(each))
            made.append(Machine(config, origin=Copy(source, begun[0])))
            del begun[0]  # not before: a machine that cannot be made may not have taken it
        if running:
            made.start()
    except BaseException:
        made.close()
        for kvm, vm in begun:
            vm.close()
            kvm.close()
        raise
    finally:
        source.close()
    return made


class Source:
    """What `machine` is at one moment; it goes on.

    Attributes:
        state: all but memory and disks.
        memory: RAM.
        disks: what those with an overlay hold, by the device's place.
    """

    def __init__(self, machine: Machine, checkpoint: bool) -> None:
        pagemap = Pagemap()
        try:
            with still(machine, "clone"), quiesced(machine):
                disks = overlaid_disks(machine, "clone")
                self.state = capture(machine)
                # A checkpoint goes on needing the base that is there.
                self.memory = point.take(
                    machine.memory, pagemap, keep=KEEP_PAGES, remap=not checkpoint
                )
                places = {id(device): place for place, device in enumerate(_devices(machine))}
                self.disks: dict[int, Frozen] = {
                    places[id(device)]: freeze(device) for device in disks
                }
        finally:
            pagemap.close()

    def close(self) -> None:
        """Each copy has its share."""
        self.memory.close()
        for frozen in self.disks.values():
            frozen.close()


class Copy(Origin):
    """One copy of `source`, over a VM that was begun."""

    def __init__(self, source: Source, begun: tuple[Kvm, Vm]) -> None:
        self._source = source
        self.begun = begun

    def map_memory(self, config: MachineConfig) -> GuestMemory:
        memory = GuestMemory(config.memory, base=self._source.memory.base)
        share(memory)
        self._source.memory.write_kept(memory)
        return memory

    def apply(self, machine: Machine) -> None:
        if machine.config.vsock is None:  # there may be one for the agent
            for device in _devices(machine):
                if device.ID == spec.ID_VSOCK:
                    vsock: Vsock = device  # type: ignore[assignment]
                    vsock.set_cid(free_cid(vsock.cid))
        watch_files(machine)
        apply(machine, self._source.state)
        for place, device in enumerate(_devices(machine)):
            if place in self._source.disks:
                _put_on(device, self._source.disks[place])  # type: ignore[arg-type]
            elif device.ID == spec.ID_NET:
                nic: Nic = device  # type: ignore[assignment]
                nic.show_own_mac()


def _devices(machine: Machine) -> list[VirtioDevice]:
    virtio = machine.platform.virtio
    return [transport.device for transport in virtio.transports] if virtio is not None else []


def _put_on(device: Block, frozen: Frozen) -> None:
    from vmm.block.overlay import Overlay

    old, device.image = device.image, Overlay(frozen.share())
    # Its server ends with the old image: the number of that descriptor is another's soon, perhaps
    # the one by which the watcher of the machine's peers is woken.
    device.peers = []
    old.close()
