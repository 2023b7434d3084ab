"""Devices under a hostile driver, and under a state that somebody else wrote."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests import test_devices_fuzz as ports
from tests import test_virtio_hostile as hostile
from tests.fuzz.source import Chance, Source
from tests.fuzz.target import Target, scratch
from tests.support.virtio_hostile import Rig
from tests.support.virtio_pci import SLOT, PciRegisters
from vmm import layout, shapes
from vmm.devices.device import Device
from vmm.errors import ShapeError
from vmm.virtio.device import VirtioDevice

KINDS = [(packed, events) for packed in (False, True) for events in (False, True)]


def virtio(name: str, transport: str) -> Callable[[], Callable[[bytes], None]]:
    """Cases of tests/support/virtio_hostile.py, which the input decides instead of a seed."""

    def start() -> Callable[[bytes], None]:
        top = Path(scratch())
        row = hostile.DEVICES[name]
        rigs = [
            Rig(row.make(place(top, number)), hostile.TRANSPORTS[transport], packed=packed,
                event_idx=events, fill=row.fill, prelude=row.prelude)
            for number, (packed, events) in enumerate(KINDS)
        ]  # fmt: skip

        def run(data: bytes) -> None:
            source = Source(data)
            source.choice(rigs).case(Chance(source.rest()))

        return run

    return start


def place(top: Path, number: int) -> Path:
    """A directory for a device's files."""
    directory = top / str(number) / "files"
    directory.mkdir(parents=True)
    return directory


def virtio_seeds() -> list[bytes]:
    return [bytes([kind]) + bytes(8 * size) for kind in range(4) for size in (1, 60)]


def legacy() -> Callable[[bytes], None]:
    """The devices of the port space."""
    machine = ports.Machine()

    def run(data: bytes) -> None:
        source = Source(data)
        while source.left:
            act, size = source.number(1), source.choice((1, 1, 2, 4, 8, 3))
            addr = (source.choice(machine.starts) + source.number(1) % 16 - 4) & 0xFFFF
            if act < 120:
                value = machine.space.read(addr, size)
                assert type(value) is int and 0 <= value < 1 << 8 * size
            elif act < 240:
                machine.space.write(addr, size, source.integer(8 * size) & (1 << 8 * size) - 1)
            elif act < 250:
                machine.uart.receive(source.take(source.number(1)))
            else:
                machine.power.press_power_button()
        del machine.levels["uart"][1:], machine.levels["power"][1:]

    return run


def bus() -> Callable[[bytes], None]:
    """Configuration space, BARs and MSI-X tables of a PCI bus with a device on it."""
    rig = Rig(
        hostile.DEVICES["rng"].make(Path("/")),
        PciRegisters,
        packed=False,
        event_idx=True,
        fill=hostile.no_fill,
    )
    registers = rig.registers
    assert isinstance(registers, PciRegisters)
    space = registers.bus.space
    ecam = layout.ECAM_BASE + (SLOT << 15)
    mask = (1 << 64) - 1

    def run(data: bytes) -> None:
        source = Source(data)
        bases = [ecam, ecam, layout.ECAM_BASE, layout.PCI_MMIO32_BASE]
        while source.left:
            act, size = source.number(1), source.choice((1, 2, 4, 4, 8))
            base = source.choice(bases)
            addr = base + (source.number(1) if act & 1 else source.number(2) % 4352)
            if act & 2:
                value = space.read(addr, size)
                assert 0 <= value < 1 << 8 * size
                if size == 4 and value & ~0xFFF:
                    bases[3:] = [value & ~0xF]  # a BAR, maybe
            else:
                space.write(addr & mask, size, source.integer() & (1 << 8 * size) - 1)

    return run


def state() -> Callable[[bytes], None]:
    """A device's saved state with edits: it is refused, or the device goes on with it."""
    directory = Path(scratch(), "a", "b")
    directory.mkdir(parents=True)
    rigs = {
        name: Rig(row.make(directory), hostile.TRANSPORTS["mmio"], packed=False, event_idx=True,
                  fill=row.fill, prelude=row.prelude)
        for name, row in hostile.DEVICES.items()
    }  # fmt: skip
    machine = ports.Machine()
    plain: list[Device] = [*machine.space.devices()]

    def run(data: bytes) -> None:
        source = Source(data)
        which = source.below(len(rigs) + len(plain))
        if which >= len(rigs):
            device = plain[which - len(rigs)]
            good = device.save()
            try:
                with suppress(ShapeError):
                    _restore(device, source.edited(good))
                for base in machine.starts:
                    for offset in range(8):
                        machine.space.read(base + offset, 1)
                        machine.space.write(base + offset, 1, source.number(1))
            finally:
                device.restore(good)
            return
        rig = list(rigs.values())[which]
        rig.case(Chance(source.take(40)))
        good = rig.device.save()
        rig.device.hold()
        with suppress(ShapeError):
            _restore(rig.device, source.edited(good))
            for index in range(len(rig.device.slots)):
                rig.device.notify(index)
        rig.device.release()
        if rig.bugs:
            raise rig.bugs.pop()

    return run


def _restore(device: Device | VirtioDevice, state: dict[str, object]) -> None:
    """As a machine that is restored does it."""
    shapes.check(device.shape(), state, "input")
    device.restore(state)
    assert isinstance(device.save(), dict)


_DEVICES = {
    "blk": "vmm.virtio.blk", "rng": "vmm.virtio.rng", "vsock": "vmm.virtio.vsock",
    "console": "vmm.virtio.console", "balloon": "vmm.virtio.balloon", "net": "vmm.virtio.net",
}  # fmt: skip
TARGETS = (
    *(
        Target(f"virtio-{name}-{transport}", virtio(name, transport), virtio_seeds,
               (module, "vmm.virtio.device", "vmm.virtio.split", "vmm.virtio.packed"))
        for name, module in _DEVICES.items()
        for transport in hostile.TRANSPORTS
    ),
    Target("ports", legacy, lambda: [bytes(range(250))],
           ("vmm.devices.uart", "vmm.devices.rtc", "vmm.devices.bus")),
    Target("pci", bus, lambda: [bytes(range(250)), b"\2\2\0\x10" * 8],
           ("vmm.pci.host", "vmm.pci.function", "vmm.pci.msix", "vmm.virtio.pci")),
    Target("state", state, lambda: [bytes([n]) + bytes(60) for n in range(14)],
           ("vmm.virtio.device", "vmm.devices.device")),
)  # fmt: skip
