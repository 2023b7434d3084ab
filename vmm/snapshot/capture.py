"""The whole guest-visible state of a machine but its memory, as plain data, and back.

`quiesced` holds a paused machine still: no request is under way, no device writes guest memory.
What `capture` gives within it, and the memory then, are one moment of the machine's life.

`apply` puts that state into a machine of the same shape whose memory is there already. What the
state cannot tell is made good when it goes on (`Transport.resume`): each queue is looked at, and
interrupts that may have been on their way are raised once more.
"""

from __future__ import annotations

import contextlib
import os

from vmm import layout, priority
from vmm.errors import SnapshotError, StateError
from vmm.kvm import vcpu_state, vm_state
from vmm.kvm.vcpu_state import MSR_IA32_TSC
from vmm.pci.msix import Msix
from vmm.virtio.transport import Transport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from vmm.devices.device import Device
    from vmm.machine import Machine

SCHEMA = 1
"""Of what `capture` gives; a number higher than this is not understood."""
STATE = "state.json"
"""What a state is called in messages."""
STATES = ("created", "paused")
"""A machine's, in which it can be captured and applied to."""
_2_64 = 1 << 64


@contextlib.contextmanager
def quiesced(machine: Machine) -> Iterator[None]:
    """Hold the machine still: requests under way are completed, and no new ones are taken.

    For one thread; it nests. Raises StateError: it is not paused (or created).
    """
    _need(machine, "snapshot")
    machine.wait_parked()
    _need(machine, "snapshot")  # it may have ended meanwhile
    virtio = machine.platform.virtio
    if virtio is not None:
        with priority.first:
            virtio.hold()
    machine.kept_still += 1
    try:
        machine.platform.flush()
        yield
    finally:
        machine.kept_still -= 1
        if virtio is not None:
            virtio.release()


def capture(machine: Machine) -> dict[str, Any]:
    """State as plain data (ints, bytes, str, and lists and dicts of them); see `quiesced`.

    Raises:
        StateError: it is not paused (or created), or a device cannot be saved now.
    """
    with quiesced(machine):
        platform = machine.platform
        first = machine.vcpus[0]
        vm = vm_state.save(machine.vm, pit=platform.pit.created)
        tsc = first.get_msrs([MSR_IA32_TSC])[MSR_IA32_TSC]
        indices = machine.kvm.msr_index_list()
        config = machine.config
        return {
            "schema": SCHEMA,
            "shape": {
                "memory": config.memory,
                "cpus": config.cpus,
                "transport": config.transport,
                "devices": [transport.name for transport in _transports(machine)],
            },
            "vm": vm,
            "tsc": {"value": tsc, "offsets": _relative_offsets(machine)},
            "vcpus": [vcpu_state.save(vcpu, indices) for vcpu in machine.vcpus],
            "devices": {name: device.save() for name, device in _devices(machine).items()},
            "virtio": [transport.save() for transport in _transports(machine)],
            "vmgenid": int(platform.vmgenid),
        }


def apply(
    machine: Machine, state: dict[str, Any], *, elapse: bool = True, renew: bool = True
) -> None:
    """Put a captured state into a machine that is created or paused, with the memory it had then.

    Its devices stay quiet until it starts or goes on.

    Args:
        elapse: the time since the capture has passed for the guest: its clocks step. Otherwise they
            go on from where they were.
        renew: the guest is told that it may be one of several now (VMGenID).

    Raises:
        SnapshotError: it is the state of something else.
        StateError: the machine is running.
    """
    _need(machine, "restore")
    machine.wait_parked()
    _check(machine, state)
    platform = machine.platform
    if "pit" in state["vm"]:
        platform.pit.create()
    else:
        platform.pit.reset()
    vm_state.restore(machine.vm, state["vm"], elapse=elapse)
    _restore_vcpus(machine, state)
    devices = _devices(machine)
    for name, each in state["devices"].items():
        devices[name].restore(each)
    _restore_virtio(machine, state["virtio"])
    platform.vmgenid = bool(state["vmgenid"])
    if renew and platform.vmgenid:
        machine.memory.write(layout.VMGENID, os.urandom(layout.VMGENID_SIZE))
        platform.power.generation_changed()
    machine.restored = True


def check_shape(machine: Machine, state: dict[str, Any]) -> None:
    """Whether `state`, which somebody else may have written, can be that of a machine such as
    this one; nothing has been done with it yet.

    Raises:
        ShapeError: it has another shape, or no guest can have brought it about.
        SnapshotError: it is the state of another machine.
    """
    from vmm.shapes import (
        U64,
        Each,
        Either,
        Flag,
        Items,
        Pairs,
        Shape,
        Table,
        Text,
        Whole,
    )  # fmt: skip

    word = Whole(0, U64)
    shape = {
        "memory": word,
        "cpus": word,
        "transport": Text(20),
        "devices": Items(Text(100), 0, 500),
    }
    Table({"schema": word, "shape": Table(shape)}).check(state, STATE)
    state_of = {name: device.shape() for name, device in _devices(machine).items()}
    Table({"devices": Pairs(Text(100), Shape(), 500)}).check(state, STATE)
    _check(machine, state)
    cpus = len(machine.vcpus)
    Table(
        {
            "vm": vm_state.shape(),
            "tsc": Table({"value": word, "offsets": Either(Items(word, 0), Items(word, cpus))}),
            "vcpus": Items(vcpu_state.shape(), cpus),
            "devices": Table({}, state_of),
            "virtio": Each([transport.shape() for transport in _transports(machine)]),
            "vmgenid": Flag(),
        }
    ).check(state, STATE)


def _restore_virtio(machine: Machine, states: list[Any]) -> None:
    routing = getattr(machine.platform.virtio, "routing", None)
    if routing is not None:
        routing.hold()
    try:
        for transport, each in zip(_transports(machine), states, strict=True):
            transport.restore(each)
    finally:
        if routing is not None:
            routing.release()


def _need(machine: Machine, call: str) -> None:
    if machine.state not in STATES:
        raise StateError(f"{call}: the machine is {machine.state}, not {' or '.join(STATES)}")


def _transports(machine: Machine) -> list[Transport]:
    virtio = machine.platform.virtio
    return virtio.transports if virtio is not None else []


def _devices(machine: Machine) -> dict[str, Device]:
    """The devices on ports and memory that are not virtio's, by name, the PCI bus among them."""
    found: dict[str, Device] = {}
    for device in machine.platform.pio.devices() + machine.platform.mmio.devices():
        if isinstance(device, (Transport, Msix)) or not device.SAVED:
            continue
        name, number = device.name, 1
        while name in found and found[name] is not device:
            number += 1
            name = f"{device.name}#{number}"
        found[name] = device
    return found


def _check(machine: Machine, state: dict[str, Any]) -> None:
    if state["schema"] > SCHEMA:
        raise SnapshotError(
            f"this snapshot's state has schema {state['schema']}, newer than {SCHEMA}, which this "
            "version understands"
        )
    config = machine.config
    shape = state["shape"]
    ours = {
        "memory": config.memory,
        "cpus": config.cpus,
        "transport": config.transport,
        "devices": [transport.name for transport in _transports(machine)],
    }
    for key, value in ours.items():
        if shape[key] != value:
            raise SnapshotError(f"the snapshot has {key} {shape[key]}, this machine {value}")
    missing = state["devices"].keys() - _devices(machine).keys()
    if missing:
        raise SnapshotError(f"this machine lacks the snapshot's {', '.join(sorted(missing))}")


# --- vCPUs ----------------------------------------------------------------------------------------


def _relative_offsets(machine: Machine) -> list[int]:
    """How far each vCPU's TSC is ahead of the first's, modulo 2**64; empty where KVM is silent."""
    offsets = [vcpu.get_tsc_offset() for vcpu in machine.vcpus]
    first = offsets[0]
    if first is None:
        return []
    return [(offset - first) % _2_64 for offset in offsets if offset is not None]


def _restore_vcpus(machine: Machine, state: dict[str, Any]) -> None:
    first, khz = machine.vcpus[0], state["vcpus"][0]["tsc_khz"]
    for vcpu, each in zip(machine.vcpus, state["vcpus"], strict=True):
        if vcpu.get_tsc_khz() != each["tsc_khz"]:
            vcpu.set_tsc_khz(each["tsc_khz"])
    # As much time as has passed for kvmclock passes for the TSC.
    passed = int(machine.vm.get_clock().clock) - state["vm"]["clock"]
    tsc = state["tsc"]["value"] + max(passed, 0) * khz // 1_000_000
    offset, relative = first.get_tsc_offset(), state["tsc"]["offsets"]
    if offset is not None and relative:
        offset += tsc - first.get_msrs([MSR_IA32_TSC])[MSR_IA32_TSC]
    for number, (vcpu, each) in enumerate(zip(machine.vcpus, state["vcpus"], strict=True)):
        fresh = not machine.has_run
        if offset is not None and relative:
            at = (offset + relative[number]) % _2_64
            refused = vcpu_state.restore(vcpu, each, cpuid=fresh, tsc_offset=at)
        else:
            now = {**each, "msrs": {**each["msrs"], MSR_IA32_TSC: tsc % _2_64}}
            refused = vcpu_state.restore(vcpu, now, cpuid=fresh)
        _check_refused(vcpu.number, each["msrs"], refused, vcpu.get_msrs(refused))


def _check_refused(
    number: int, wanted: dict[int, int], refused: list[int], have: dict[int, int]
) -> None:
    """An MSR that cannot be set matters if it does not read as it should anyway."""
    wrong = [f"{index:#x}" for index in refused if have.get(index) != wanted[index]]
    if wrong:
        raise SnapshotError(
            f"this host's KVM does not take the values of MSRs {', '.join(wrong)} of vCPU {number}"
        )
