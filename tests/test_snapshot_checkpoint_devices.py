"""vmm/snapshot/checkpoint.py: what devices did since is undone, in memory and on disks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tests.support import images
from tests.support.bare import MIB, DriverOn, bare_machine, until
from tests.support.virtio_driver import BUFFERS
from tests.test_kvm_vcpu_state import COUNTING
from tests.test_snapshot_checkpoint import START, image, ram, running
from tests.test_virtio_blk import request
from vmm.virtio import blk
from vmm.virtio.rng import Entropy

__all__ = ["image"]  # a fixture

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(180)]


def positions(driver: DriverOn) -> list[dict[str, object]]:
    """What the driver knows of its rings, which a guest would have in its memory."""
    rings = [{**vars(ring)} for ring in driver.rings]
    return [
        copy.deepcopy({name: value for name, value in ring.items() if name != "memory"})
        for ring in rings
    ]


def back(driver: DriverOn, known: list[dict[str, object]]) -> None:
    for ring, values in zip(driver.rings, known, strict=True):
        vars(ring).update(copy.deepcopy(values))


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_what_a_device_wrote_is_undone(packed: bool) -> None:
    """Buffers filled by another thread, rings and indices; the queue works each time."""
    m = running(bare_machine(COUNTING, regs=START, devices=[Entropy], memory=4 * MIB))
    with DriverOn(m, packed=packed) as driver:
        ring = driver.rings[0]
        m.pause()
        m.checkpoint()
        before, known = ram(m), positions(driver)
        for _ in range(5):
            m.resume()
            ring.add([(BUFFERS, 9000, True)])
            driver.kick()
            until(lambda: bool(m.memory.read_u64(BUFFERS + 8192)))
            until(lambda: [(0, 9000)] == [(0, size) for _, size in ring.used()])
            m.pause()
            m.rollback()
            assert ram(m) == before
            back(driver, known)


def test_a_request_that_waited_at_the_point_is_answered_each_time() -> None:
    with running(bare_machine(COUNTING, regs=START, devices=[Entropy])) as m:
        driver = DriverOn(m)
        m.pause()
        virtio = m.platform.virtio
        assert virtio is not None
        virtio.hold()  # the queue's thread may still be on its way to look for requests
        driver.rings[0].add([(BUFFERS, 64, True)])
        m.checkpoint()
        virtio.release()
        known = positions(driver)
        former = b""
        for _ in range(3):
            m.rollback()
            back(driver, known)
            # A late notify may have the device answer already: never with the former bytes.
            assert m.memory.read(BUFFERS, 64) != former
            m.resume()
            until(lambda: bool(driver.rings[0].used()), "answered when it goes on")
            former = m.memory.read(BUFFERS, 64)
            assert former != bytes(64)
            m.pause()


def test_a_driver_that_came_later_is_gone() -> None:
    with running(bare_machine(COUNTING, regs=START, devices=[Entropy])) as m:
        m.checkpoint()
        for _ in range(2):
            driver = DriverOn(m)
            driver.rings[0].add([(BUFFERS, 64, True)])
            driver.kick()
            until(lambda: bool(driver.rings[0].used()))  # noqa: B023
            m.rollback()
            assert driver.device.status == 0
            assert driver.device.slots[0].queue is None


class Disk:
    """Sectors of the disk a driver drives."""

    def __init__(self, driver: DriverOn) -> None:
        self.driver = driver

    def read(self, number: int) -> bytes:
        status, data = request(self.driver, blk.T_IN, number, into=512)
        assert status == blk.S_OK
        return data

    def write(self, number: int, data: bytes) -> None:
        assert request(self.driver, blk.T_OUT, number, out=data)[0] == blk.S_OK


@pytest.mark.one_lane
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disks_go_back_too(image: Path, format: str) -> None:
    was = image.read_bytes()
    drive = f"{image},snapshot"
    if format != "raw":
        drive = f"{images.convert(image, image.with_name('other'), format)},format=qcow2,snapshot"
    m = running(bare_machine(COUNTING, regs=START, drives=[drive]))
    with DriverOn(m) as driver:
        disk = Disk(driver)
        disk.write(3, b"before".ljust(512))
        m.checkpoint()
        for turn in range(3):
            known = positions(driver)
            assert disk.read(3) == b"before".ljust(512)
            assert disk.read(200) == was[200 * 512 :][:512]
            disk.write(3, bytes([turn]) * 512)
            disk.write(200, bytes([turn]) * 512)
            assert disk.read(200) == bytes([turn]) * 512
            m.pause()
            m.rollback()
            m.resume()
            back(driver, known)
        disk.write(7, b"later".ljust(512))
        m.checkpoint()
        known = positions(driver)
        disk.write(7, b"gone".ljust(512))
        m.rollback()
        back(driver, known)
        assert disk.read(7) == b"later".ljust(512)
        assert disk.read(3) == b"before".ljust(512)
    assert image.read_bytes() == was


@pytest.mark.one_lane
def test_disks_can_be_kept(image: Path) -> None:
    m = running(bare_machine(COUNTING, regs=START, drives=[str(image)]))
    with DriverOn(m) as driver:
        disk = Disk(driver)
        m.checkpoint(disks="keep")
        known = positions(driver)
        disk.write(3, b"stays".ljust(512))
        m.rollback()
        back(driver, known)
        assert disk.read(3) == b"stays".ljust(512)
    assert image.read_bytes()[3 * 512 :].startswith(b"stays")
