"""vmm/snapshot/clone.py: copies of a machine that share what they do not write."""

from __future__ import annotations

import gc
import os
import random
import resource
import threading
from pathlib import Path

import pytest

from tests.support import images, tiny
from tests.support.bare import MIB, DriverOn, bare_machine, until
from tests.support.guests import DATA
from tests.test_kvm_vcpu_state import COUNTING, FLAG
from tests.test_snapshot_capture import counter, steps_are_right
from tests.test_snapshot_checkpoint import START, mappings, ram, running
from tests.test_snapshot_checkpoint_devices import Disk, back, positions
from vmm import HostError, Machine, MachineConfig, StateError, UsageError, layout
from vmm.virtio.net import Nic
from vmm.virtio.vsock import Vsock

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(180)]

PATTERN = 0x100000

MARKS = f"""
    mov ${PATTERN}, %rdi        # the first byte of every page of a MiB takes what DATA says
    movb DATA, %al
1:  movb %al, (%rdi)
    add $4096, %rdi
    cmp ${PATTERN + MIB}, %rdi
    jb 1b
    movb $1, DATA+1
2:  cmpb $0, {FLAG}
    je 2b
    done 6
"""


def close(machines: list[Machine]) -> None:
    for machine in machines:
        machine.close()


def test_memory_is_the_same_page_for_page_and_then_each_ones_own() -> None:
    with bare_machine(MARKS, "user") as m:
        m.memory.write(PATTERN, random.Random(1).randbytes(2 * MIB))
        point = ram(m)
        clones = m.clone(4)
        try:
            assert [each.state for each in [m, *clones]] == ["created"] * 5
            assert [ram(each) == point for each in [m, *clones]] == [True] * 5
            for number, each in enumerate([m, *clones], 1):
                each.memory.write_u8(DATA, number)
                each.start()
            expected = bytearray(point[0])
            for number, each in enumerate([m, *clones], 1):
                until(lambda: each.memory.read_u8(DATA + 1) == 1)  # noqa: B023
                each.pause()
                expected[PATTERN : PATTERN + MIB : 4096] = bytes([number]) * 256
                assert each.memory.read(PATTERN, 2 * MIB) == expected[PATTERN : PATTERN + 2 * MIB]
                each.memory.write_u8(FLAG, 1)
                each.resume()
                assert each.wait(60).status == 6
        finally:
            close(clones)


@pytest.mark.parametrize("mode", ["long", "user"])
def test_copies_of_a_running_machine_run(mode: str) -> None:
    with bare_machine(COUNTING, mode, regs=START) as m:
        m.memory.write(DATA + 0x200, bytes(range(16)))
        running(m)
        clones = m.clone(8)
        try:
            assert m.state == "running"
            for each in [m, *clones]:
                assert each.state == "running"
                each.memory.write_u8(FLAG, 1)
                assert each.wait(60).status == 9
                steps_are_right(each, 1)
        finally:
            close(clones)


def test_a_copy_can_be_copied_and_rolled_back() -> None:
    """And the machine it came from may be gone."""
    with running(bare_machine(COUNTING, regs=START)) as m:
        m.memory.write(PATTERN, b"of the first")
        [one] = m.clone()
    with one:
        one.pause()
        one.memory.write(PATTERN, b"of the copy!")
        one.checkpoint()
        point = ram(one)
        one.memory.write(PATTERN, b"not to be")
        [two] = one.clone()
        with two:
            assert two.state == "created"
            assert two.memory.read(PATTERN, 9) == b"not to be"
            one.rollback()
            assert ram(one) == point
            two.memory.write_u8(FLAG, 1)
            two.start()
            assert two.wait(60).status == 9
            one.memory.write_u8(FLAG, 1)
            one.resume()
            assert one.wait(60).status == 9
        one.rollback()
        assert ram(one) == point


def test_a_checkpoint_outlives_copies() -> None:
    with running(bare_machine(COUNTING, regs=START)) as m:
        m.pause()
        m.checkpoint()
        point = ram(m)
        for turn in range(3):
            m.memory.fill(PATTERN, 10000, turn + 1)
            [copy] = m.clone()
            with copy:
                assert ram(copy) == ram(m)
                m.rollback()
                assert ram(m) == point
                assert copy.memory.read(PATTERN, 10000) == bytes([turn + 1]) * 10000


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.one_lane
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_each_disk_is_its_own(tmp_path: Path, format: str) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(1).randbytes(MIB))
    was = image.read_bytes()
    drive = f"{image},snapshot"
    if format != "raw":
        drive = f"{images.convert(image, tmp_path / 'other', format)},format=qcow2,snapshot"
    m = running(bare_machine(COUNTING, regs=START, drives=[drive]))
    with DriverOn(m) as driver:
        disk = Disk(driver)
        disk.write(3, b"before".ljust(512))
        m.checkpoint()
        known = positions(driver)
        disk.write(4, b"after".ljust(512))
        later = positions(driver)
        clones = m.clone(3)
        disk.write(3, b"mine".ljust(512))
        assert [device(each, 0).peers for each in clones] == [[]] * 3, "of servers that have ended"
        for number, each in enumerate(clones):
            its = DriverOn.__new__(DriverOn)
            vars(its).update({**vars(driver), "machine": each, "memory": each.memory})
            its.transport = its.attach(driver.device)
            its.rings = [type(driver.rings[0])(each.memory, 0, driver.size, driver.event_idx)]
            back(its, later)
            its_disk = Disk(its)
            assert its_disk.read(3) == b"before".ljust(512)
            assert its_disk.read(4) == b"after".ljust(512)
            assert its_disk.read(100) == was[100 * 512 :][:512]
            its_disk.write(3, bytes([number]) * 512)
            assert its_disk.read(3) == bytes([number]) * 512
        assert disk.read(3) == b"mine".ljust(512)
        m.rollback()
        back(driver, known)
        assert disk.read(3) == b"before".ljust(512)
        assert disk.read(4) == was[4 * 512 :][:512]
        close(clones)
    assert image.read_bytes() == was


def device(machine: Machine, number: int) -> object:
    assert machine.platform.virtio is not None
    return machine.platform.virtio.transports[number].device


@pytest.mark.one_lane
def test_addresses_are_each_ones_own(tmp_path: Path) -> None:
    options = {
        "nets": ["lan=test-clones,mac=52:54:00:00:00:01"],
        "vsock": f"cid=40,path={tmp_path}/vsock",
        "ports": [f"name=log,file={tmp_path}/log"],
        "console": f"file:{tmp_path}/console",
    }
    config = MachineConfig(tiny.kernel(tmp_path, tiny.SPIN), memory=16 * MIB, **options)  # type: ignore[arg-type]
    with Machine(config) as m:
        m.start()
        clones = m.clone(3)
        clones += m.clone(2)
        try:
            macs, cids = set(), []
            for number, each in enumerate(clones, 1):
                nic, vsock = device(each, 0), device(each, 2)
                assert isinstance(nic, Nic)
                assert isinstance(vsock, Vsock)
                macs.add(bytes(nic.config[:6]))
                cids.append(int.from_bytes(vsock.config, "little"))
                assert cids[-1] == vsock.cid
                for path in ("vsock", "log", "console"):
                    assert (tmp_path / f"{path}.{number}").exists()
            assert len(macs | {bytes.fromhex("525400000001")}) == 6
            assert len(set(cids)) == 5
            assert min(cids) > 40
            ids = {each.memory.read(layout.VMGENID, 16) for each in [m, *clones]}
            assert len(ids) == 6
        finally:
            close(clones)
    assert not list(tmp_path.glob("vsock*"))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.one_lane
def test_what_there_can_be_only_one_of_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    refused = pytest.raises(StateError, match=r"clone: blk0: .* is written to; give the drive `sna")
    with bare_machine(COUNTING, drives=[str(image)]) as m, refused:
        m.clone()
    from vmm.snapshot.identity import own_config

    for net, message in (
        ("tap=tap7", "clone: --net tap=tap7: a tap is one machine's; without a name"),
        ("user,forward=tcp:8080:80", "clone: --net user,forward=tcp:8080:80: a port of the host"),
    ):
        with pytest.raises(StateError, match=message):
            own_config(MachineConfig(nets=[net]), 1)
    with pytest.raises(StateError, match=r"clone: --fs .* served by another process"):
        own_config(MachineConfig(shares=[f"{tmp_path},tag=a"]), 1)


@pytest.mark.one_lane
def test_wrong_uses() -> None:
    with bare_machine("done 1") as m:
        with pytest.raises(UsageError, match="clone: count=0 is not a number"):
            m.clone(0)
        m.start()
        m.wait(60)
        with pytest.raises(StateError, match="clone: the machine is stopped, not created, paused"):
            m.clone()
    with pytest.raises(StateError, match="clone: the machine is closed"):
        m.clone()


@pytest.mark.one_lane
def test_a_copy_that_cannot_be_made_takes_the_others_with_it() -> None:
    """Descriptors run out; the machine itself goes on."""
    gc.collect()  # what earlier tests left is not to go in between
    with running(bare_machine(COUNTING, regs=START)) as m:
        m.clone()[0].close()
        before, threads = tiny.descriptors(), threading.active_count()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 40, hard))
            with pytest.raises((HostError, OSError), match="Too many open files"):
                m.clone(100)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert tiny.opened_since(before) == []
        assert threading.active_count() <= threads
        steps = counter(m)
        until(lambda: counter(m) > steps)


# --- nothing is left ------------------------------------------------------------------------------


@pytest.mark.one_lane
def test_fifty_copies_leave_nothing() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gc.collect()  # views of earlier tests' memory keep its mappings
    threads, maps = threading.active_count(), len(mappings())
    descriptors = tiny.descriptors()
    with bare_machine("incl DATA\n1: hlt\njmp 1b", memory=64 * MIB) as m:
        m.memory.write(16 * MIB, os.urandom(16 * MIB))
        close(m.clone(2))
        before, base = tiny.descriptors(), resident()
        clones = m.clone(50)
        for each in clones:
            each.start()
        for each in clones:
            until(lambda: counter(each) == 1)  # noqa: B023
        assert counter(m) == 0
        assert resident() - base < 50 * MIB
        close(clones)
        assert tiny.opened_since(before) == []
        assert threading.active_count() <= threads
    assert tiny.descriptors() == descriptors
    assert len(mappings()) == maps
    assert threading.active_count() <= threads


def test_a_copy_keeps_the_limits_of_its_cards() -> None:
    from vmm.snapshot.identity import own_config

    net = own_config(MachineConfig(nets=["tap,vhost=off,rx-bps=5M,tx-pps=7"]), 1).nets[0]
    assert (net.vhost, net.rx_bps, net.tx_pps, net.mac) == ("off", 5 << 20, 7, "")


def test_a_disk_of_another_process_cannot_be_copied() -> None:
    from vmm.snapshot.identity import own_config

    with pytest.raises(StateError, match="clone: --vhost-user-blk /x is served by another process"):
        own_config(MachineConfig(vhost_user_blks=["/x"]), 1)


@pytest.mark.one_lane
def test_what_is_no_count_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with Machine(MachineConfig(tiny.kernel(tmp_path, tiny.COUNTING), memory=16 * MIB)) as m:
        m.start()
        for count in (0, -1, None, "2", 1.5, True, 10**9):
            with pytest.raises(UsageError, match="clone: count="):
                m.clone(count)  # type: ignore[arg-type]
        with m.clone(1) as copies:
            assert copies[0].state == "running"
