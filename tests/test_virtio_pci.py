"""vmm/virtio/pci.py: virtio 1.2, section 4.1, register by register, and on a KVM."""

from __future__ import annotations

import os
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.virtio_driver import BUFFERS, RINGS, SplitRing, table
from tests.support.virtio_pci import ENABLED, SLOT, VECTOR_BASE, Bus, MachineDriver, PciDriver
from vmm import Machine, MachineConfig, layout
from vmm.devices.bus import AddressSpace
from vmm.errors import ShapeError, UsageError
from vmm.layout import MIB
from vmm.memory import GuestMemory
from vmm.pci import spec as pci
from vmm.virtio import mmio, spec
from vmm.virtio import pci as vp
from vmm.virtio.device import VirtioDevice
from vmm.virtio.queue import Chain
from vmm.virtio.rng import Entropy

CONFIG = bytes(range(1, 21))


class Echo(VirtioDevice):
    """Writes back what it read; a configuration of 20 bytes, of which the driver may write all."""

    ID = 63
    QUEUES = (64, 16, 8)

    def __init__(self) -> None:
        super().__init__("echo")
        self.config[:] = CONFIG
        self.threads: set[str] = set()

    def request(self, index: int, chain: Chain) -> int | None:
        self.threads.add(threading.current_thread().name)
        return chain.write(chain.read())

    def config_written(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data


@pytest.fixture
def driver() -> Iterator[PciDriver]:
    with PciDriver(Echo()) as each:
        yield each


@pytest.fixture
def bus() -> Iterator[Bus]:
    device = Echo()
    device.memory = GuestMemory(1 << 20)
    made = Bus(device)
    yield made
    made.close()
    device.memory.close()


def get(driver: PciDriver, register: int, size: int) -> int:
    return driver.bus.space.read(driver.places[vp.CAP_COMMON_CFG] + register, size)


def put(driver: PciDriver, register: int, size: int, value: int) -> None:
    driver.bus.space.write(driver.places[vp.CAP_COMMON_CFG] + register, size, value)


# --- what a driver finds (4.1.2, 4.1.4) ----------------------------------------------------------


def test_what_pciutils_reads(bus: Bus, tmp_path: Path) -> None:
    bus.set_config(pci.COMMAND, 2, ENABLED)
    config = bus.transport.function.config
    rows = [f"{at:02x}: {config[at : at + 16].hex(' ')}" for at in range(0, 4096, 16)]
    path = tmp_path / "lspci.txt"
    path.write_text("\n".join(["00:01.0 x", *rows, "", ""]))
    said = subprocess.run(
        ["lspci", "-F", str(path), "-vvn"], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.strip() for line in said.splitlines()]
    assert lines[0] == "00:01.0 ff00: 1af4:107f (rev 01)"
    at = lines.index("Capabilities: [40] MSI-X: Enable- Count=4 Masked-")
    assert lines[at + 1 : at + 3] == [
        "Vector table: BAR=1 offset=00000000", "PBA: BAR=1 offset=00000800",
    ]  # fmt: skip
    structures = {
        line.split("VirtIO: ")[1]: lines[place + 1]
        for place, line in enumerate(lines)
        if "VirtIO: " in line
    }
    assert structures == {
        "CommonCfg": "BAR=4 offset=00000000 size=0000003c",
        "Notify": "BAR=4 offset=00003000 size=0000000c multiplier=00000004",
        "ISR": "BAR=4 offset=00001000 size=00000001",
        "DeviceCfg": "BAR=4 offset=00002000 size=00000014",
        "<unknown>": "BAR=0 offset=00000000 size=00000000",  # VIRTIO_PCI_CAP_PCI_CFG
    }


@pytest.mark.parametrize(
    ("ident", "number", "kind"),
    [(1, 0x1041, 0x020000), (2, 0x1042, 0x018000), (3, 0x1043, 0x078000), (4, 0x1044, 0xFF0000),
     (19, 0x1053, 0x078000), (26, 0x105A, 0x018000)],
)  # fmt: skip
def test_ids(ident: int, number: int, kind: int) -> None:
    device = Echo()
    device.ID = ident
    bus = Bus(device)
    assert bus.config(pci.VENDOR_ID) == number << 16 | 0x1AF4
    assert bus.config(pci.SUBSYSTEM_ID, 2) >= 0x40
    assert bus.config(pci.REVISION_ID) == kind << 8 | 1
    assert bus.config(pci.INTERRUPT_PIN, 1) == 0
    bus.close()


def test_a_device_without_configuration() -> None:
    bus = Bus(Entropy())
    assert vp.CAP_DEVICE_CFG not in bus.structures()
    assert bus.space.read(bus.bar(vp.VIRTIO_BAR) + vp.DEVICE, 4) == 0xFFFFFFFF  # not decoded yet
    bus.enable()
    assert bus.space.read(bus.bar(vp.VIRTIO_BAR) + vp.DEVICE, 4) == 0
    bus.close()


def test_too_many_queues() -> None:
    device = Echo()
    device.slots *= 400
    with pytest.raises(ValueError, match="echo: more than 1024 queues"):
        Bus(device)


# --- common configuration (4.1.4.3) --------------------------------------------------------------


def test_registers_read_back(driver: PciDriver) -> None:
    driver.write(mmio.STATUS, 0)
    for register, size, value in (
        (vp.DEVICE_FEATURE_SELECT, 4, 1), (vp.DRIVER_FEATURE_SELECT, 4, 1),
        (vp.QUEUE_SELECT, 2, 1), (vp.CONFIG_MSIX_VECTOR, 2, 3), (vp.QUEUE_MSIX_VECTOR, 2, 2),
        (vp.QUEUE_SIZE, 2, 8), (vp.QUEUE_DESC, 4, 0x12345670), (vp.QUEUE_DESC + 4, 4, 1),
        (vp.QUEUE_DRIVER, 4, 0x23456780), (vp.QUEUE_DRIVER + 4, 4, 2),
        (vp.QUEUE_DEVICE, 4, 0x34567890), (vp.QUEUE_DEVICE + 4, 4, 3),
        (vp.DRIVER_FEATURE, 4, 1 << spec.F_VERSION_1 - 32),
    ):  # fmt: skip
        put(driver, register, size, value)
        assert get(driver, register, size) == value
    slot = driver.device.slots[1]
    assert (slot.size, slot.desc, slot.driver, slot.device) == (
        8, 0x1_12345670, 0x2_23456780, 0x3_34567890,
    )  # fmt: skip
    assert get(driver, vp.DEVICE_FEATURE, 4) == driver.device.features >> 32
    assert get(driver, vp.NUM_QUEUES, 2) == 3
    driver.write(mmio.STATUS, 0)
    assert get(driver, vp.QUEUE_SELECT, 2) == 0
    assert get(driver, vp.CONFIG_MSIX_VECTOR, 2) == vp.NO_VECTOR
    put(driver, vp.QUEUE_SELECT, 2, 1)
    assert get(driver, vp.QUEUE_MSIX_VECTOR, 2) == vp.NO_VECTOR
    assert get(driver, vp.QUEUE_SIZE, 2) == 16
    assert get(driver, vp.QUEUE_DESC, 4) == 0


def test_a_queue_that_is_not_there(driver: PciDriver) -> None:
    put(driver, vp.QUEUE_SELECT, 2, 3)
    assert get(driver, vp.QUEUE_SIZE, 2) == 0  # 4.1.4.3.1: that there is none
    for register, size in ((vp.QUEUE_MSIX_VECTOR, 2), (vp.QUEUE_ENABLE, 2), (vp.QUEUE_RESET, 2),
                           (vp.QUEUE_DESC, 4), (vp.QUEUE_SIZE, 2)):  # fmt: skip
        put(driver, register, size, 1)
    assert get(driver, vp.QUEUE_ENABLE, 2) == 0
    assert get(driver, vp.QUEUE_MSIX_VECTOR, 2) == vp.NO_VECTOR


def test_registers_have_their_own_width(driver: PciDriver) -> None:
    assert get(driver, vp.DEVICE_STATUS, 1) == 15
    for size in (2, 4, 8):
        assert get(driver, vp.DEVICE_STATUS, size) == 0
        put(driver, vp.DEVICE_STATUS, size, 0)
    assert get(driver, vp.DEVICE_STATUS, 1) == 15
    assert get(driver, vp.QUEUE_DESC, 8) == 0  # 4.1.3.1: by halves
    assert get(driver, vp.QUEUE_SIZE, 1) == 0
    assert get(driver, 0x3C, 4) == 0


def test_an_enabled_queue_does_not_change(driver: PciDriver) -> None:
    put(driver, vp.QUEUE_SELECT, 2, 0)
    before = driver.device.slots[0].desc
    put(driver, vp.QUEUE_DESC, 4, 0)
    put(driver, vp.QUEUE_SIZE, 2, 4)
    put(driver, vp.QUEUE_ENABLE, 2, 0)
    assert get(driver, vp.QUEUE_ENABLE, 2) == 1
    assert (driver.device.slots[0].desc, driver.device.slots[0].size) == (before, 16)


def test_queue_reset_forgets_its_vector(driver: PciDriver) -> None:
    put(driver, vp.QUEUE_SELECT, 2, 1)
    put(driver, vp.QUEUE_RESET, 2, 1)
    assert get(driver, vp.QUEUE_RESET, 2) == 0
    assert get(driver, vp.QUEUE_ENABLE, 2) == 0
    assert get(driver, vp.QUEUE_MSIX_VECTOR, 2) == vp.NO_VECTOR
    put(driver, vp.QUEUE_SELECT, 2, 0)
    assert get(driver, vp.QUEUE_MSIX_VECTOR, 2) == 1


@pytest.mark.parametrize("register", [vp.CONFIG_MSIX_VECTOR, vp.QUEUE_MSIX_VECTOR])
def test_a_vector_that_cannot_be(driver: PciDriver, register: int) -> None:
    """4.1.5.1.2.1: it reads back as none."""
    for vector, want in ((3, 3), (4, vp.NO_VECTOR), (0, 0), (vp.NO_VECTOR, vp.NO_VECTOR)):
        put(driver, register, 2, vector)
        assert get(driver, register, 2) == want


def test_device_configuration(driver: PciDriver) -> None:
    base = driver.places[vp.CAP_DEVICE_CFG]
    for offset, size in ((0, 1), (1, 2), (4, 4), (8, 8), (16, 4)):
        want = int.from_bytes(CONFIG[offset : offset + size], "little")
        assert driver.bus.space.read(base + offset, size) == want
    assert driver.bus.space.read(base + 20, 4) == 0
    driver.bus.space.write(base + 4, 4, 0xAABBCCDD)
    assert driver.bus.space.read(base + 4, 4) == 0xAABBCCDD
    before = get(driver, vp.CONFIG_GENERATION, 1)
    driver.device.config_changed()
    assert get(driver, vp.CONFIG_GENERATION, 1) == before + 1


# --- notifies and interrupts ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_queue_has_a_notify_address(driver: PciDriver, size: int) -> None:
    for index in range(3):
        put(driver, vp.QUEUE_SELECT, 2, index)
        offset = get(driver, vp.QUEUE_NOTIFY_OFF, 2) * vp.NOTIFY_MULTIPLIER
        driver.rings[index].add([(BUFFERS, 4, True)])
        driver.bus.space.write(driver.places[vp.CAP_NOTIFY_CFG] + offset, size, index)
        assert len(driver.rings[index].used()) == 1
    assert driver.bus.space.read(driver.places[vp.CAP_NOTIFY_CFG], size) == 0
    driver.bus.space.write(driver.places[vp.CAP_NOTIFY_CFG] + 12, 2, 3)  # nobody's


def test_each_queue_has_its_vector(driver: PciDriver) -> None:
    msix = driver.bus.transport.msix
    assert driver.bus.connected == {v: (pci.MSI_ADDRESS, VECTOR_BASE + v) for v in range(4)}
    for index in range(3):
        driver.rings[index].add([(BUFFERS, 4, True)])
        driver.kick(index)
        assert os.eventfd_read(msix.fd(1 + index)) == 1
    driver.device.config_changed()
    assert os.eventfd_read(msix.fd(0)) == 1
    assert driver.take_interrupts() == 0


def test_queues_may_share_a_vector(driver: PciDriver) -> None:
    for index in range(3):
        put(driver, vp.QUEUE_SELECT, 2, index)
        put(driver, vp.QUEUE_MSIX_VECTOR, 2, 3)
        driver.rings[index].add([(BUFFERS, 4, True)])
        driver.kick(index)
    assert os.eventfd_read(driver.bus.transport.msix.fd(3)) == 3


def test_isr_without_msix(driver: PciDriver) -> None:
    """4.1.4.5: reading clears it. Nothing is sent."""
    at = driver.bus.capability(pci.CAP_MSIX)
    driver.bus.set_config(at + pci.MSIX_CONTROL, 2, 0)
    isr = driver.places[vp.CAP_ISR_CFG]
    assert driver.bus.space.read(isr, 1) == 0
    driver.rings[0].add([(BUFFERS, 4, True)])
    driver.kick()
    assert driver.bus.space.read(isr, 1) == 1
    driver.device.config_changed()
    assert driver.bus.space.read(isr, 1) == 2
    driver.device.config_changed()
    driver.rings[0].used()
    driver.rings[0].add([(BUFFERS, 4, True)])
    driver.kick()
    assert driver.bus.space.read(isr, 4) == 3
    assert driver.bus.space.read(isr, 1) == 0
    assert driver.take_interrupts() == 0


def test_the_driver_is_told_of_needs_reset(driver: PciDriver) -> None:
    driver.rings[0].add([(1 << 40, 4, True)])
    driver.kick()
    assert driver.take_interrupts() & 2
    assert get(driver, vp.DEVICE_STATUS, 1) & spec.DEVICE_NEEDS_RESET
    driver.start()
    assert get(driver, vp.DEVICE_STATUS, 1) == 15


# --- access by configuration space (4.1.4.9) -----------------------------------------------------


class Window:
    """VIRTIO_PCI_CAP_PCI_CFG of a bus."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.at = next(
            at
            for ident, at in bus.capabilities()
            if ident == pci.CAP_VENDOR and bus.config(at + 3, 1) == vp.CAP_PCI_CFG
        )

    def choose(self, bar: int, offset: int, length: int) -> None:
        self.bus.set_config(self.at + 4, 1, bar)
        self.bus.set_config(self.at + 8, 4, offset)
        self.bus.set_config(self.at + 12, 4, length)

    def read(self, bar: int, offset: int, length: int) -> int:
        self.choose(bar, offset, length)
        return self.bus.config(self.at + 16, length)

    def write(self, bar: int, offset: int, length: int, value: int) -> None:
        self.choose(bar, offset, length)
        self.bus.set_config(self.at + 16, length, value)


def test_a_driver_without_memory_accesses(bus: Bus) -> None:
    window = Window(bus)
    window.write(vp.VIRTIO_BAR, vp.COMMON + vp.DEVICE_STATUS, 1, spec.ACKNOWLEDGE)
    assert window.read(vp.VIRTIO_BAR, vp.COMMON + vp.DEVICE_STATUS, 1) == spec.ACKNOWLEDGE
    assert window.read(vp.VIRTIO_BAR, vp.COMMON + vp.NUM_QUEUES, 2) == 3
    assert window.read(vp.VIRTIO_BAR, vp.DEVICE, 4) == int.from_bytes(CONFIG[:4], "little")
    window.write(vp.MSIX_BAR, 8, 4, 0x1234)
    assert window.read(vp.MSIX_BAR, 8, 4) == 0x1234


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [(0, 0, 4), (5, 0, 4), (6, 0, 4), (255, 0, 4), (4, 0, 0), (4, 0, 3), (4, 0, 8),
     (4, 0, 0xFFFFFFFF), (4, 1, 4), (4, vp.LENGTH, 4), (4, 0xFFFFFFFC, 4), (1, 4096, 4)],
)  # fmt: skip
def test_a_window_to_nowhere(bus: Bus, bar: int, offset: int, length: int) -> None:
    window = Window(bus)
    window.choose(bar, offset, length)
    bus.set_config(window.at + 16, 4, 0x55AA55AA)
    assert bus.config(window.at + 16, 4) == 0x55AA55AA
    assert bus.transport.device.status == 0


# --- resets and state ----------------------------------------------------------------------------


def test_function_level_reset(driver: PciDriver) -> None:
    bus = driver.bus
    for ring in driver.rings:
        ring.add([(BUFFERS, 4, True)])
    before = [bus.bar(vp.MSIX_BAR), bus.bar(vp.VIRTIO_BAR)]
    bus.set_config(bus.capability(pci.CAP_EXPRESS) + pci.EXPRESS_DEVICE_CONTROL, 2, pci.DEVCTL_FLR)
    assert driver.device.status == 0
    assert [slot.queue for slot in driver.device.slots] == [None] * 3
    assert bus.config(pci.COMMAND, 2) == 0
    assert [bus.bar(vp.MSIX_BAR), bus.bar(vp.VIRTIO_BAR)] == [0, 0]
    assert bus.space.lookup(before[1]) is None
    assert bus.transport.msix.read(12, 4) == 1
    for index, base in zip((vp.MSIX_BAR, vp.VIRTIO_BAR), before, strict=True):
        bus.set_config(pci.BAR0 + 4 * index, 4, base)
    driver.find()
    driver.start()
    driver.rings[0].add([(BUFFERS, 4, True)])
    driver.kick()
    assert driver.take_interrupts() == 1


def test_a_restored_device_goes_on(driver: PciDriver) -> None:
    driver.rings[1].add([(BUFFERS, 4, True)])
    put(driver, vp.QUEUE_SELECT, 2, 2)
    driver.device.quiet = True  # from here on the other one serves its queues
    state = (driver.bus.host.save(), driver.transport.save())
    device = Echo()
    device.memory = driver.memory
    bus = Bus(device)
    connected: list[str] = []
    bus.transport.on_driver_ok = lambda: connected.append(device.name)
    bus.host.restore(state[0])
    bus.transport.restore(state[1])
    assert connected == ["echo"]
    assert bus.connected == {v: (pci.MSI_ADDRESS, VECTOR_BASE + v) for v in range(4)}
    assert bus.transport.save() == state[1]
    bus.transport.notify_all()
    assert driver.rings[1].used() == []  # not before the machine goes on
    bus.transport.resume()
    assert len(driver.rings[1].used()) == 1
    assert os.eventfd_read(bus.transport.msix.fd(2)) == 2  # one maybe lost, and its own
    bus.close()
    for slot in device.slots:
        slot.clear()


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [("vectors", [1], "not 3 queues' vectors"), ("vectors", 7, "not 3 queues' vectors"),
     ("msix", None, "no MSI-X in it"), ("device", 3, "no device in it")],
)  # fmt: skip
def test_a_state_of_something_else(driver: PciDriver, key: str, value: object, what: str) -> None:
    state = driver.transport.save()
    with pytest.raises(ShapeError, match=what):
        driver.transport.restore({**state, key: value})


def test_where_the_notify_addresses_are(driver: PciDriver) -> None:
    """Whoever makes ioeventfds is told of each place, and of none."""
    transport, bus, places = driver.bus.transport, driver.bus, list[int | None]()
    transport.follow(places.append)
    before = bus.bar(vp.VIRTIO_BAR)
    bus.set_config(pci.BAR0 + 4 * vp.VIRTIO_BAR, 4, 0xC8000000)
    bus.set_config(pci.COMMAND, 2, 0)
    bus.set_config(pci.BAR0 + 4 * vp.VIRTIO_BAR + 4, 4, 0x12)
    bus.set_config(pci.COMMAND, 2, ENABLED)
    moved = [before, None, 0xC8000000, None, 0x12_C8000000]
    assert places == [None if base is None else base + vp.NOTIFY for base in moved]


# --- with a KVM ----------------------------------------------------------------------------------


def guest(notify: int, queue: int, available: int) -> bytes:
    """Makes a chain available (a 1 at `available`), notifies `queue`, waits for its message in
    the local APIC, and exits with 3.

    mov dword [LAPIC + 0xf0], 0x1ff; mov word [available], 1; mov word [notify], queue
    1: mov eax, [LAPIC + 0x220]; test eax, 1 << (vector & 31); jz 1b
    """
    vector = VECTOR_BASE + 1 + queue
    return (
        b"\xc7\x05" + struct.pack("<II", layout.LAPIC + 0xF0, 0x1FF)
        + b"\x66\xc7\x05" + struct.pack("<IH", available, 1)
        + b"\x66\xc7\x05" + struct.pack("<IH", notify, queue)
        + b"\xa1" + struct.pack("<I", layout.LAPIC + 0x200 + 0x10 * (vector >> 5))
        + b"\xa9" + struct.pack("<I", 1 << (vector & 31)) + b"\x74\xf4"
        + tiny.exits(3)
    )  # fmt: skip


@pytest.mark.needs_kvm
@pytest.mark.parametrize("base", [None, 0xCFFF0000, 0xC0000000 + 0x8000])
@pytest.mark.parametrize("queue", [0, 2])
def test_a_notify_and_its_interrupt(tmp_path: Path, base: int | None, queue: int) -> None:
    """By ioeventfd, the queue's thread and a routed message, wherever the BAR is."""
    device = Echo()
    place = 0xC0004000 if base is None else base
    notify, available = place + vp.NOTIFY + 4 * queue, RINGS + (queue << 16) + 0x6002
    kernel = tiny.kernel(tmp_path, guest(notify, queue, available))
    config = MachineConfig(
        kernel, memory=64 * MIB, transport="pci", devices=[lambda: device], timeout=60
    )
    with Machine(config) as machine, MachineDriver(machine, device) as driver:
        if base is not None:  # under a driver that runs: the ioeventfds follow
            driver.bus.set_config(pci.BAR0 + 4 * vp.VIRTIO_BAR, 4, base)
        assert driver.bus.bar(vp.VIRTIO_BAR) == place
        driver.memory.write(BUFFERS, b"hello")
        ring = driver.rings[queue]
        assert isinstance(ring, SplitRing)
        assert ring.driver + 2 == available
        driver.memory.write(ring.desc, table([(BUFFERS, 5, False), (BUFFERS + 64, 5, True)]))
        ring.chains[0] = [0, 1]
        machine.start()
        ended = machine.wait(60)
        assert (ended.kind, ended.status) == ("exit-port", 3), ended.message
        assert len(driver.rings[queue].used()) == 1
        assert driver.memory.read(BUFFERS + 64, 5) == b"hello"
        assert device.threads == {f"echo-q{queue}"}


@pytest.mark.needs_kvm
def test_a_bar_goes_back_and_forth() -> None:
    """Each move takes the ioeventfds along; none is left behind to be in the way."""
    device = Echo()
    config = MachineConfig(memory=64 * MIB, transport="pci", devices=[lambda: device])
    with Machine(config) as machine, MachineDriver(machine, device) as driver:
        for number in range(20):
            driver.bus.set_config(pci.BAR0 + 16, 4, 0xC8000000 if number % 2 else 0xC0004000)
            driver.bus.set_config(pci.COMMAND, 2, ENABLED if number % 3 else 0)
        driver.bus.set_config(pci.COMMAND, 2, ENABLED)
        driver.find()
        for _ in range(3):
            driver.start()
            driver.rings[0].add([(BUFFERS, 4, True)])
            driver.kick()
            deadline = time.monotonic() + 20
            while not driver.rings[0].used():
                assert time.monotonic() < deadline


@pytest.mark.needs_kvm
def test_a_machine_leaves_nothing_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    device = Echo()
    config = MachineConfig(memory=64 * MIB, transport="pci", devices=[lambda: device, Entropy])
    with Machine(config) as machine, MachineDriver(machine, device) as driver:
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not [each.name for each in threading.enumerate() if each.name.startswith("echo")]


@pytest.mark.needs_kvm
def test_a_machine_has_room_for_31() -> None:
    config = MachineConfig(memory=16 * MIB, transport="pci", devices=[Entropy] * 31)
    with Machine(config) as machine:
        space: AddressSpace = machine.platform.mmio
        ids = [space.read(layout.ECAM_BASE + (slot << 15), 4) for slot in range(SLOT, 32)]
        assert ids == [0x10441AF4] * 31
    with pytest.raises(UsageError, match="more than 31 devices on the PCI bus"):
        Machine(MachineConfig(memory=16 * MIB, transport="pci", devices=[Entropy] * 32))


@pytest.mark.needs_kvm
def test_the_bus_is_there_without_devices() -> None:
    with Machine(MachineConfig(memory=16 * MIB, transport="pci")) as machine:
        assert machine.platform.mmio.read(layout.ECAM_BASE, 4) == 0x00081B36
    with Machine(MachineConfig(memory=16 * MIB)) as machine:
        assert machine.platform.mmio.read(layout.ECAM_BASE, 4) == 0xFFFFFFFF


def test_the_command_line_saves_looking_for_pci_where_there_is_none() -> None:
    assert "pci=conf1,noearly" in MachineConfig().default_cmdline.split()
    assert "pci=" not in MachineConfig(transport="pci").default_cmdline
    with pytest.raises(UsageError, match="--transport 'isa' is not one of mmio, pci"):
        MachineConfig(transport="isa")
