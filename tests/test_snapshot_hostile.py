"""Snapshots that somebody changed: refused in a line, or a machine that lives.

Thousands more of them: python -m tests.support.snapshot_mutator SECONDS SEED.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.bare import MIB, bare_machine
from tests.support.snapshot_mutator import DEVICES, Mutator, at_work
from tests.support.snapshots import descriptors, reseal, write_state
from vmm import Machine
from vmm.errors import SnapshotError
from vmm.snapshot import plain
from vmm.virtio import spec

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(240)]

HALTED = "1: hlt; jmp 1b"


@pytest.mark.one_lane
def test_mutations() -> None:
    with Mutator(seed=20261130) as mutator:
        before = descriptors()
        mutator.run(count=60)
        assert mutator.found == {}
        assert descriptors() == before
    assert set(mutator.tried) == {"manifest", "state", "index", "text"}
    assert 5 < mutator.accepted < 55


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Snapshots of a machine with a driver at work on every device, over each transport."""
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "disk.img").write_bytes(bytes(MIB))
    found = {}
    for transport in ("mmio", "pci"):
        options: dict[str, Any] = {"drives": [str(directory / "disk.img")], **DEVICES}
        with bare_machine(HALTED, transport=transport, **options) as m:
            at_work(m)
            m.start()
            m.pause()
            found[transport] = directory / transport
            m.snapshot(found[transport])
    return found


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def cut(*path: Any, by: int) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        old = state[path[-1]]
        state[path[-1]] = old[:-by] if by > 0 else old + bytes(-by)

    return change


def nested_longer(state: Any) -> None:
    """A nested state whose header says that it goes on."""
    header = struct.pack("<HHI", 0, 1, 1 << 16).ljust(128, b"\0")
    state["vcpus"][0]["nested"] = header


BLK, NET, CONSOLE, BALLOON = 0, 1, 3, 4
REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    # KVM reads as much as a structure has: bytes of the monitor's would go into the guest.
    "short xsave": (put("vcpus", 0, "xsave", value=b"x"), r"vcpus\[0\]\.xsave is"),
    "long xsave": (cut("vcpus", 1, "xsave", by=-(1 << 16)), r"vcpus\[1\]\.xsave is"),
    "long nested state": (nested_longer, "not as long as it says"),
    "nested state of a byte": (put("vcpus", 0, "nested", value=b"x"), "not as long as it says"),
    **{
        f"{way} {name}": (cut("vcpus", 0, name, by=by), rf"vcpus\[0\]\.{name} is bytes of")
        for name in ("regs", "sregs", "xcrs", "debugregs", "lapic", "vcpu_events")
        for way, by in (("short", 1), ("long", -1))
    },
    "a PIC too short": (cut("vm", "irqchips", 0, by=1), r"vm\.irqchips\[0\] is bytes of 519"),
    "no IOAPIC": (lambda state: state["vm"]["irqchips"].pop(), r"vm\.irqchips is list of 2"),
    "a long PIT": (put("vm", "pit", value=bytes(113)), r"vm\.pit is bytes of 113, not 112"),
    "a clock past all time": (put("vm", "clock", value=1 << 64), r"vm\.clock is"),
    "a frequency": (put("vcpus", 0, "tsc_khz", value=1 << 31), r"tsc_khz is 2147483648"),
    "an MSR of 65 bits": (put("vcpus", 0, "msrs", 0x10, value=1 << 64), r"msrs\.16 is"),
    "a vCPU too few": (lambda state: state["vcpus"].pop(), "vcpus is list of 1"),
    "too many CPUID leaves": (
        lambda state: put("vcpus", 0, "cpuid", value=state["vcpus"][0]["cpuid"] * 50)(state),
        "cpuid is list of",
    ),
    "a negative queue size": (
        put("virtio", BLK, "device", "queues", 0, "size", value=-1), r"queues\[0\]\.size is -1",
    ),
    "a queue of no entries": (
        put("virtio", BLK, "device", "queues", 0, "size", value=0), "0 entries, not 1 to",
    ),
    "a queue too large": (
        put("virtio", BLK, "device", "queues", 0, "size", value=1 << 31), "entries, not 1 to",
    ),
    "a queue of no power of two": (
        put("virtio", BLK, "device", "queues", 0, "size", value=3), "not a power of two",
    ),
    "a ring outside memory": (
        put("virtio", BLK, "device", "queues", 0, "desc", value=1 << 40), "outside guest memory",
    ),
    "a ring at the end of addresses": (
        put("virtio", BLK, "device", "queues", 0, "device", value=(1 << 64) - 4),
        "outside guest memory",
    ),
    "an index of 17 bits": (
        put("virtio", BLK, "device", "queues", 0, "ring", "last_avail", value=1 << 16),
        "last_avail is 65536",
    ),
    "a packed ring's position": (
        put("virtio", BLK, "device", "queues", 0, "ring", value={"next_avail": 0, "next_used": 0}),
        "queue 0 is not of what was negotiated",
    ),
    "rings before features": (put("virtio", BLK, "device", "status", value=3), "negotiated"),
    "at work before features": (put("virtio", BLK, "device", "status", value=7), "before its feat"),
    "no version": (put("virtio", BLK, "device", "features", value=0), "features of this version"),
    "features not offered": (
        put("virtio", BLK, "device", "features", value=1 << 32 | 1 << 63), "not to be had here",
    ),
    "more queue pairs": (put("virtio", NET, "device", "pairs", value=2), "pairs is 2"),
    "half an address": (
        put("virtio", NET, "device", "filter", "unicast", value=b"12345"), "not 6-byte addresses",
    ),
    "a position before the start": (
        put("virtio", CONSOLE, "device", "ports", "0", "done", value=-1), "done is -1",
    ),
    "messages without end": (
        put("virtio", CONSOLE, "device", "messages", value=[bytes(8)] * 300), "messages is list",
    ),
    "a balloon larger than memory": (
        put("virtio", BALLOON, "device", "config", value=b"\xff" * 16), "a balloon of",
    ),
    "an RTC that lost its time": (lambda state: state["devices"]["rtc"].pop("looked"), "half a"),
    "a device it has not": (put("devices", "gpu", value={}), "lacks the snapshot's gpu"),
    "a number for a device": (put("devices", "uart", value=3), "devices.uart is 3, not a table"),
}  # fmt: skip
OF_PCI: dict[str, tuple[Callable[[Any], None], str]] = {
    "a short MSI-X table": (cut("virtio", BLK, "msix", "table", by=16), r"msix\.table is bytes of"),
    "a vector of 17 bits": (put("virtio", BLK, "vectors", value=[1 << 16]), r"vectors\[0\] is"),
    "pending vectors that are not there": (
        put("virtio", BLK, "msix", "pending", value=1 << 64), "pending is",
    ),
    "a long configuration space": (
        cut("devices", "pci", "functions", 1, "config", by=-1), "config is bytes of 4097",
    ),
    "a function too few": (lambda state: state["devices"]["pci"]["functions"].pop(), "functions"),
}  # fmt: skip


@pytest.mark.one_lane
@pytest.mark.parametrize("name", [*REFUSED, *OF_PCI])
def test_a_state_no_guest_can_bring_about(made: dict[str, Path], name: str) -> None:
    path = made["pci" if name in OF_PCI else "mmio"]
    change, says = {**REFUSED, **OF_PCI}[name]
    original = (path / "state.json").read_bytes()
    try:
        state = plain.loads(original)
        change(state)
        write_state(path, state)
        before = descriptors()
        with pytest.raises(SnapshotError, match=says) as caught:
            Machine.restore(path, nets=["lan=hostile"], console="none")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        del caught  # it has the frames that have the machine
        assert descriptors() == before
    finally:
        (path / "state.json").write_bytes(original)
        reseal(path, "state.json")


def test_a_device_shows_its_own_configuration(made: dict[str, Path]) -> None:
    """But for what a driver writes, and what a person does: a block size of 0 would be divided
    by, more queues than there are would be asked for."""
    path = made["mmio"]
    original = (path / "state.json").read_bytes()
    try:
        state = plain.loads(original)
        own = [transport["device"]["config"] for transport in state["virtio"]]
        capacity = own[BLK][:8]
        for transport in state["virtio"]:
            config = transport["device"]["config"]
            if transport["device"]["queues"] and len(config) > 8:
                transport["device"]["config"] = b"\0" * len(config)
        state["virtio"][BLK]["device"]["config"] = capacity + b"\0" * (len(own[BLK]) - 8)
        write_state(path, state)
        with Machine.restore(path, nets=["lan=hostile"], console="none") as m:
            m.start()
            devices: list[Any] = [t.device for t in m.platform.virtio.transports]  # type: ignore[union-attr]
            assert bytes(devices[BLK].config[8:32]) == own[BLK][8:32]
            assert bytes(devices[NET].config[8:]) == own[NET][8:]
            assert bytes(devices[CONSOLE].config[4:]) == own[CONSOLE][4:]
            assert devices[BLK].resize(2 * MIB) == 2 * MIB
            assert devices[BLK].status & spec.DRIVER_OK
    finally:
        (path / "state.json").write_bytes(original)
        reseal(path, "state.json")
