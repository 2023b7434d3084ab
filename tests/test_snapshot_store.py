"""vmm/snapshot/store.py, memory.py, disks.py, restore.py: snapshots in directories, there and back.

The guests here are of a few instructions; what is compared is memory, page for page.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import shutil
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.bare import MIB, DriverOn, bare_machine, until
from tests.support.guests import DATA
from tests.support.snapshots import age
from tests.support.virtio_driver import BUFFERS
from tests.test_kvm_vcpu_state import COUNTING, FLAG, after
from vmm import AsyncMachine, HostError, Machine, MachineConfig, StateError, UsageError, layout
from vmm.errors import SnapshotError
from vmm.snapshot import manifest, memory, plain
from vmm.snapshot.capture import quiesced
from vmm.snapshot.index import Index
from vmm.snapshot.restore import _console
from vmm.snapshot.store import Snapshot

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(180)]

HALTED = "1: hlt; jmp 1b"
GIB = 1 << 30


def contents(machine: Machine) -> list[bytes]:
    return [bytes(region.data) for region in machine.memory.regions]


def same(one: list[bytes], other: list[bytes]) -> bool:
    """Without an assertion of megabytes."""
    return one == other


def pattern(seed: int, pages: int) -> dict[int, bytes]:
    """Pages by number: some, near one another and alone."""
    chance = random.Random(seed)
    return {chance.randrange(16, 1024): chance.randbytes(4096) for _ in range(pages)}


def put(machine: Machine, pages: dict[int, bytes]) -> None:
    for number, data in pages.items():
        machine.memory.write(number * 4096, data)


# --- memory ---------------------------------------------------------------------------------------

FILLS_AND_CHECKS = f"""
    movl $1, DATA
1:  cmpb $0, {FLAG}
    je 1b
    mov $0x100000, %rdi             # from 1 MiB, 512 pages: each has its number in each word
2:  mov %rdi, %rax
    shr $12, %rax
    mov $512, %ecx
3:  mov %rax, (%rdi)
    add $8, %rdi
    dec %ecx
    jnz 3b
    cmp $0x300000, %rdi
    jb 2b
    movl $2, DATA
4:  cmpb $1, {FLAG}
    je 4b
    mov $0x100000, %rdi
5:  mov %rdi, %rax
    shr $12, %rax
    mov $512, %ecx
6:  cmp %rax, (%rdi)
    jne 7f
    add $8, %rdi
    dec %ecx
    jnz 6b
    cmp $0x300000, %rdi
    jb 5b
    done 8
7:  done 9
"""


def test_the_guest_finds_its_memory(tmp_path: Path) -> None:
    """It filled 512 pages before, and looks at each after, in the full and in the differential."""
    full, diff = str(tmp_path / "full"), str(tmp_path / "diff")
    with bare_machine(FILLS_AND_CHECKS, "user") as m:
        m.start()
        until(lambda: m.memory.read_u32(DATA) == 1)
        m.snapshot(full)
        assert m.state == "running"
        m.memory.write_u8(FLAG, 1)
        until(lambda: m.memory.read_u32(DATA) == 2)
        m.pause()
        m.snapshot(diff, base=full)
        assert m.state == "paused"
        m.snapshot(str(tmp_path / "again"))
    for path in (diff, str(tmp_path / "again")):
        with Machine.restore(path) as m:
            m.memory.write_u8(FLAG, 2)
            m.start()
            assert m.wait(60).status == 8
    with Machine.restore(diff) as m:
        m.memory.write_u8(0x200000, 1)
        m.memory.write_u8(FLAG, 2)
        m.start()
        assert m.wait(60).status == 9


def test_a_machine_goes_on_from_a_directory(tmp_path: Path) -> None:
    with bare_machine(COUNTING, "user", regs={"rdi": 0, "rsi": 1}) as m:
        m.start()
        until(lambda: m.memory.read_u32(DATA) > 0)
        m.snapshot(str(tmp_path / "snap"))
        m.pause()
        least = m.memory.read_u32(DATA)
    for _ in range(3):
        with Machine.restore(str(tmp_path / "snap"), timeout=60) as m:
            assert m.state == "created" and m.memory.read_u32(DATA) <= least
            m.start()
            until(lambda m=m: m.memory.read_u32(DATA) > least)  # type: ignore[misc]
            m.memory.write_u8(FLAG, 1)
            assert m.wait().status == 9
            steps = m.memory.read_u64(DATA + 8)
            assert m.memory.read_u64(DATA + 16) == after(steps, 1)


def test_zeroes_take_no_room(tmp_path: Path) -> None:
    with bare_machine(HALTED, memory=512 * MIB) as m:
        m.memory.write(300 * MIB, b"x")
        m.memory.fill(100 * MIB, 8 * MIB, 0)
        m.snapshot(str(tmp_path / "snap"))
        before = contents(m)
    info = os.stat(tmp_path / "snap" / "memory")
    assert info.st_size == 512 * MIB
    assert info.st_blocks * 512 < MIB
    with Machine.restore(str(tmp_path / "snap"), verify=True) as m:
        assert same(contents(m), before)


def test_memory_on_both_sides_of_the_hole(tmp_path: Path) -> None:
    size = 3 * GIB + 16 * MIB
    places = {0x5000: b"a", 3 * GIB - 1: b"b", 4 * GIB: b"c", 4 * GIB + 16 * MIB - 1: b"d"}
    with bare_machine(HALTED, memory=size) as m:
        for gpa, data in places.items():
            m.memory.write(gpa, data)
        m.snapshot(str(tmp_path / "full"))
        m.memory.write(4 * GIB + 4096, b"e")
        m.memory.write(3 * GIB - 1, b"\0")
        m.snapshot(str(tmp_path / "diff"), base=str(tmp_path / "full"))
    assert os.stat(tmp_path / "full" / "memory").st_blocks * 512 < MIB
    with Machine.restore(str(tmp_path / "diff")) as m:
        assert [region.size for region in m.memory.regions] == [3 * GIB, 16 * MIB]
        assert m.memory.read(4 * GIB + 4096, 1) == b"e"
        assert m.memory.read(3 * GIB - 1, 1) == b"\0"
        for gpa in (0x5000, 4 * GIB, 4 * GIB + 16 * MIB - 1):
            assert m.memory.read(gpa, 1) == places[gpa]


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("mapped", [1024, 3])
def test_a_chain_of_differentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backing: str, track: bool, mapped: int
) -> None:
    """Each link equal to a full snapshot of the moment, whether runs are mapped or read."""
    if track and backing == "memfd":
        pytest.skip("shared memory is not tracked")
    monkeypatch.setattr(memory, "MAPPINGS_MAX", mapped)
    moments: list[list[bytes]] = []
    with bare_machine(HALTED, backing=backing) as m:
        put(m, pattern(0, 100))
        m.snapshot(str(tmp_path / "0"), track=track)
        moments.append(contents(m))
        for number in range(1, 5):
            pages = pattern(number, 30)
            put(m, pages)
            first = next(iter(pattern(0, 100)))
            m.memory.fill((first + number) * 4096, 4096, 0)
            m.snapshot(
                str(tmp_path / str(number)), base=str(tmp_path / str(number - 1)), track=track
            )
            moments.append(contents(m))
            with Snapshot(str(tmp_path / str(number))) as snapshot:
                differ = {
                    at // 4096
                    for at in range(0, 4 * MIB, 4096)
                    if moments[-1][0][at : at + 4096] != moments[-2][0][at : at + 4096]
                }
                kept = snapshot.index().runs
                assert sum(size for _, size in kept) == 4096 * len(differ)
                assert {start // 4096 for start, _ in kept} <= differ
    for number, moment in enumerate(moments):
        with Machine.restore(str(tmp_path / str(number)), verify=True) as m:
            assert same(contents(m), moment)


def test_a_differential_of_a_restored_machine(tmp_path: Path) -> None:
    """Its own pages are those that may differ; a chain in which each link was a machine."""
    with bare_machine(HALTED) as m:
        put(m, pattern(0, 100))
        m.snapshot(str(tmp_path / "0"))
    for number in range(1, 6):
        with Machine.restore(str(tmp_path / str(number - 1))) as m:
            pages = pattern(number, 20)
            put(m, pages)
            m.snapshot(str(tmp_path / str(number)), base=str(tmp_path / str(number - 1)))
            m.snapshot(str(tmp_path / f"full{number}"))
            moment = contents(m)
        with Snapshot(str(tmp_path / str(number))) as snapshot:
            assert sum(size for _, size in snapshot.index().runs) <= 4096 * len(pages)
        for name in (str(number), f"full{number}"):
            with Machine.restore(str(tmp_path / name)) as m:
                assert same(contents(m), moment)


def test_a_differential_to_something_else_than_it_was_restored_from(tmp_path: Path) -> None:
    with bare_machine(HALTED) as m:
        put(m, pattern(0, 50))
        m.snapshot(str(tmp_path / "a"))
        put(m, pattern(1, 50))
        m.snapshot(str(tmp_path / "b"))
    with Machine.restore(str(tmp_path / "a")) as m:
        put(m, pattern(2, 10))
        m.snapshot(str(tmp_path / "c"), base=str(tmp_path / "b"))
        moment = contents(m)
    with Machine.restore(str(tmp_path / "c")) as m:
        assert same(contents(m), moment)


def test_a_snapshot_stays_as_it_is(tmp_path: Path) -> None:
    """Whatever machines restored from it write."""
    path = str(tmp_path / "snap")
    with bare_machine(HALTED) as m:
        put(m, pattern(0, 50))
        m.snapshot(path)
        moment = contents(m)
    with Machine.restore(path) as m:
        put(m, pattern(1, 200))
        with Machine.restore(path) as other:
            assert same(contents(other), moment)


def test_chains_move_together(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "here")
    with bare_machine(HALTED) as m:
        m.snapshot(str(tmp_path / "here" / "0"))
        put(m, pattern(1, 5))
        m.snapshot(str(tmp_path / "here" / "1"), base=str(tmp_path / "here" / "0"))
        moment = contents(m)
    os.rename(tmp_path / "here", tmp_path / "there")
    with Machine.restore(str(tmp_path / "there" / "1")) as m:
        assert same(contents(m), moment)


# --- disks ----------------------------------------------------------------------------------------


def disk_with(path: Path, size: int = 8 * MIB) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
        for at, data in ((0, b"first"), (5 * MIB + 512, b"middle"), (size - 512, b"last")):
            file.seek(at)
            file.write(data)
    return path


def can_be_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


def write_sector(driver: DriverOn, sector: int, data: bytes) -> None:
    """By the device, as a guest does."""
    memory = driver.memory
    memory.write(BUFFERS, struct.pack("<IIQ", 1, 0, sector))
    memory.write(BUFFERS + 512, data.ljust(512, b"\0"))
    memory.write(BUFFERS + 1024, b"\xff")
    driver.rings[0].add(
        [(BUFFERS, 16, False), (BUFFERS + 512, 512, False), (BUFFERS + 1024, 1, True)]
    )
    driver.kick()
    until(lambda: memory.read(BUFFERS + 1024, 1) == b"\0")


def read_disk(machine: Machine, offset: int, size: int) -> bytes:
    virtio = machine.platform.virtio
    assert virtio is not None
    device: Any = virtio.transports[0].device
    found = bytearray(size)
    device.image.read([memoryview(found)], offset)
    return bytes(found)


@pytest.mark.parametrize(
    "options", ["", ",snapshot", ",cache=none", ",format=qcow2,serial=1", ",format=vdi,snapshot"]
)
def test_disks_go_along(tmp_path: Path, options: str) -> None:
    image = disk_with(tmp_path / "disk.img")
    if "format=" in options:
        format = options.partition("format=")[2].partition(",")[0]
        image = images.convert(image, tmp_path / "disk.other", format)
    if "none" in options and not can_be_direct(image):
        pytest.skip("no O_DIRECT there")
    path = str(tmp_path / "snap")
    machine = bare_machine(HALTED, drives=[f"{image}{options}"])
    with machine as m, DriverOn(m) as driver:
        m.start()
        write_sector(driver, 3, b"written")
        m.snapshot(path)
        write_sector(driver, 3, b"later")
    told = json.loads((tmp_path / "snap" / "manifest.json").read_text())["disks"][0]
    assert told["how"] in ("copy", "reflink") and told["path"] == str(image)
    assert os.stat(tmp_path / "snap" / "disk0").st_blocks * 512 < 2 * MIB
    for _ in range(2):
        with Machine.restore(path, verify=True) as m:
            assert read_disk(m, 0, 5) == b"first"
            assert read_disk(m, 3 * 512, 8) == b"written\0"
            assert read_disk(m, 5 * MIB + 512, 6) == b"middle"
            assert read_disk(m, 8 * MIB - 512, 4) == b"last"
            virtio = m.platform.virtio
            assert virtio is not None
            device: Any = virtio.transports[0].device
            device.image.write([memoryview(b"over".ljust(512))], 0)
            assert read_disk(m, 0, 4) == b"over"
    with Machine.restore(path, disks="write") as m:
        assert read_disk(m, 0, 5) == b"first"
        device = m.platform.virtio.transports[0].device  # type: ignore[union-attr]
        device.image.write([memoryview(b"over".ljust(512))], 0)
    with Machine.restore(path) as m:
        assert read_disk(m, 0, 4) == b"over"


@pytest.mark.parametrize("options", ["", ",format=qcow2,serial=1"])
def test_disks_that_stay(tmp_path: Path, options: str) -> None:
    image = disk_with(tmp_path / "disk.img")
    if options:
        image = images.convert(image, tmp_path / "disk.other", "qcow2")
    path = str(tmp_path / "snap")
    with bare_machine(HALTED, drives=[f"{image}{options}"]) as m:
        m.snapshot(path, disks="keep")
        with pytest.raises(HostError, match="another process uses this image"):
            Machine.restore(path)
    assert not (tmp_path / "snap" / "disk0").exists()
    with Machine.restore(path) as m:
        assert read_disk(m, 0, 5) == b"first"
    with open(image, "r+b") as file:
        file.write(b"other")
    with pytest.raises(SnapshotError, match="was written to since"):
        Machine.restore(path)
    other = disk_with(tmp_path / "other.img")
    with Machine.restore(path, drives=[f"{other},snapshot"]) as m:
        assert read_disk(m, 0, 5) == b"first"
    os.unlink(image)
    with pytest.raises(SnapshotError, match="No such file"):
        Machine.restore(path)


def test_a_throw_away_overlay_cannot_stay(tmp_path: Path) -> None:
    image = disk_with(tmp_path / "disk.img")
    with bare_machine(HALTED, drives=[f"{image},snapshot"]) as m, DriverOn(m) as driver:
        m.snapshot(str(tmp_path / "snap"), disks="keep")  # it has nothing in it
        m.start()
        write_sector(driver, 3, b"written")
        with pytest.raises(StateError, match="use disks=copy"):
            m.snapshot(str(tmp_path / "snap2"), disks="keep")
    assert sorted(os.listdir(tmp_path)) == ["disk.img", "snap"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A full snapshot `full` and a differential `diff` to it."""
    image = disk_with(tmp_path / "disk.img")
    with bare_machine(HALTED, drives=[str(image)]) as m:
        put(m, pattern(0, 50))
        m.snapshot(str(tmp_path / "full"))
        put(m, pattern(1, 10))
        m.snapshot(str(tmp_path / "diff"), base=str(tmp_path / "full"))
    return tmp_path


def flip(path: Path, at: int, bit: int = 3) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes((byte ^ 1 << bit,)))


def truncate(path: Path) -> None:
    os.truncate(path, os.stat(path).st_size - 4096 if os.stat(path).st_size > 4096 else 10)


def change(snapshot: Path, /, without: Sequence[str] = (), **values: object) -> None:
    """The manifest, with a checksum that is right: as another version would have made it."""
    path = snapshot / manifest.NAME
    data = json.loads(path.read_text())
    data.update(values)
    for key in without:
        del data[key]
    data[manifest.CHECKSUM] = manifest.checksum(data)
    path.write_text(json.dumps(data))


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(SnapshotError, match=message):
        Machine.restore(str(path), **options)


def test_what_is_no_snapshot(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "is no directory of a snapshot")
    refused(tmp_path, "is no snapshot, or one that was not finished")
    (tmp_path / "manifest.json").write_text("{}")
    refused(tmp_path, "is not the manifest of a snapshot")


@pytest.mark.parametrize("name", ["memory", "state.json", "disk0", "memory.index"])
def test_a_truncated_or_missing_file(made: Path, name: str) -> None:
    truncate(made / "full" / name)
    refused(made / "full", f"{name} has .* bytes, and had .*: it is damaged")
    refused(made / "diff", "its base: .* it is damaged")
    os.unlink(made / "full" / name)
    refused(made / "full", f"{name}: No such file or directory; the snapshot is not complete")


@pytest.mark.parametrize(("clock", "passed"), [("step", 3600), ("keep", 0)])
def test_an_hour_has_passed_or_none(made: Path, clock: str, passed: int) -> None:
    age(made / "full", 3600)
    with Snapshot(str(made / "full")) as snapshot:
        then = snapshot.state()["vm"]["clock"]
    with Machine.restore(str(made / "full"), clock=clock) as m:
        assert passed <= (m.vm.get_clock().clock - then) / 1e9 < passed + 600


def test_a_truncated_manifest(made: Path) -> None:
    truncate(made / "full" / "manifest.json")
    refused(made / "full", "manifest.json is corrupt: it is not JSON")


def test_flipped_bits_in_the_manifest_and_the_state(made: Path) -> None:
    """Wherever they are."""
    chance = random.Random(4)
    for name in ("manifest.json", "state.json"):
        path = made / "full" / name
        whole = path.read_bytes()
        for _ in range(60):
            flip(path, chance.randrange(len(whole) - 2), chance.randrange(8))
            with pytest.raises(SnapshotError):
                Machine.restore(str(made / "full"))
            path.write_bytes(whole)
    flip(made / "full" / "state.json", 100)
    refused(made / "full", "state.json is corrupt: its checksum is another")


def test_flipped_bits_in_memory_and_disks_are_found_by_verify(made: Path) -> None:
    for name, message in (("memory", "memory is corrupt"), ("disk0", "disk0 is corrupt")):
        path = made / "full" / name
        with open(path, "rb") as file:
            place = os.lseek(file.fileno(), 0, os.SEEK_DATA) + 5
        for at in (place, os.stat(path).st_size - 1, os.stat(path).st_size // 2):
            flip(path, at)
            refused(made / "full", f"{message}: the 256 KiB at byte", verify=True)
            refused(made / "diff", f"{message}: the 256 KiB at byte", verify=True)
            flip(path, at)
    for name in ("full", "diff"):
        with Machine.restore(str(made / name), verify=True):
            pass
    flip(made / "diff" / "memory.index", 40)
    refused(made / "diff", "memory.index is corrupt: its checksum is another")


def test_a_newer_schema(made: Path) -> None:
    change(made / "full", schema=manifest.SCHEMA + 1, vmm="9.9")
    refused(made / "full", "has schema 2, newer than 1, .* it was made by vmm 9.9")


@pytest.mark.parametrize("key", manifest.SHAPE)
def test_a_manifest_that_lacks_something(made: Path, key: str) -> None:
    change(made / "full", **{key: 7})
    refused(made / "full", rf"full is not whole: manifest.json\.{key} is 7, not ")
    change(made / "full", without=(key,))
    refused(made / "full", f"full is not whole: manifest.json: {key} is missing")


def test_a_manifest_that_names_files_elsewhere(made: Path) -> None:
    told = json.loads((made / "full" / "manifest.json").read_text())
    disks = [{**told["disks"][0], "file": "../disk.img"}]
    change(made / "full", disks=disks)
    refused(made / "full", "'../disk.img' names a file that is not in it")
    change(made / "full", disks=[], files={**told["files"], "/etc/passwd": {"size": 1}})
    refused(made / "full", "'/etc/passwd' names a file that is not in it")


def test_a_newer_state(made: Path) -> None:
    path = made / "full" / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"schema":1', b'"schema":7'))
    files = {**json.loads((made / "full" / "manifest.json").read_text())["files"]}
    files.update(manifest.seal(str(made / "full"), ["state.json"]))
    change(made / "full", files=files)
    refused(made / "full", "state.json has schema 7, newer than 1")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"vendor": "CyrixInstead"}, "made on a host with a processor of CyrixInstead, and this"),
        ({"kvm": "kvm_vax"}, "made on KVM's back end kvm_vax, and this is KVM's back end kvm_"),
        ({"machine": "aarch64"}, "made on a aarch64 host, and this is a x86_64 host"),
    ],
)
def test_another_kind_of_host(made: Path, facts: dict[str, str], message: str) -> None:
    host = json.loads((made / "full" / "manifest.json").read_text())["host"]
    change(made / "full", host={**host, **facts})
    refused(made / "full", message)


def test_a_processor_that_lacks_something(made: Path) -> None:
    told = json.loads((made / "full" / "manifest.json").read_text())
    host = {**told["host"], "stepping": 99}
    change(made / "full", host=host)
    with Machine.restore(str(made / "full")):
        pass  # another stepping, which can the same
    guest = {**told["guest"], "features": told["guest"]["features"] + " amx_tile avx10"}
    change(made / "full", host=host, guest=guest)
    refused(made / "full", "its guest uses .*avx10, which this host's KVM cannot give it")


def test_another_tsc_frequency(made: Path) -> None:
    """A lower one, where KVM cannot scale the TSC, as in both lanes here."""
    directory = made / "full"
    state = plain.loads((directory / "state.json").read_bytes())
    with Machine(MachineConfig(memory=MIB)) as m:
        if m.kvm.check_extension(60):
            pytest.skip("this KVM scales the TSC")
    state["vcpus"][0]["tsc_khz"] //= 2
    (directory / "state.json").write_bytes(plain.dumps(state))
    files = {**json.loads((directory / "manifest.json").read_text())["files"]}
    files.update(manifest.seal(str(directory), ["state.json"]))
    change(directory, files=files)
    refused(directory, "this host's KVM does not take its state: .*cannot scale the TSC")


def test_a_base_that_is_not_there_or_another(made: Path) -> None:
    os.rename(made / "full", made / "elsewhere")
    refused(made / "diff", "its base: .*full is no directory of a snapshot")
    with bare_machine(HALTED) as m:
        m.snapshot(str(made / "full"))
    refused(made / "diff", "full is another snapshot than its base was")


@pytest.mark.parametrize("key", ["memory", "cpus", "transport", "kernel"])
def test_what_a_restored_machine_cannot_have(made: Path, key: str) -> None:
    with pytest.raises(UsageError, match=f"restore: {key}: a restored machine has what it had"):
        Machine.restore(str(made / "full"), **{key: 1})


def test_other_devices(made: Path) -> None:
    refused(made / "full", r"has devices \['blk0'\], this machine \['blk0', 'rng'\]", rng=True)


def test_arguments_that_cannot_be(made: Path) -> None:
    with pytest.raises(UsageError, match="restore: disks=burn is not one of overlay, write"):
        Machine.restore(str(made / "full"), disks="burn")
    with pytest.raises(UsageError, match="restore: clock=stop is not one of step, keep"):
        Machine.restore(str(made / "full"), clock="stop")
    with bare_machine(HALTED, memory=8 * MIB) as m:
        with pytest.raises(UsageError, match="snapshot: disks=burn is not one of copy, keep"):
            m.snapshot(str(made / "new"), disks="burn")
        with pytest.raises(UsageError, match=r"snapshot: .*full exists already"):
            m.snapshot(str(made / "full"))
        with pytest.raises(UsageError, match="/proc/no: No such file or directory"):
            m.snapshot("/proc/no/such/directory")
        (made / "file").write_text("")
        with pytest.raises(UsageError, match="file/below: Not a directory"):
            m.snapshot(str(made / "file/below/it"))
        with pytest.raises(SnapshotError, match="is of a machine with 4194304 bytes of memory"):
            m.snapshot(str(made / "new"), base=str(made / "full"))
    with bare_machine(HALTED, backing="memfd") as m:
        with pytest.raises(StateError, match="memory of memfd cannot become a private mapping"):
            m.snapshot(str(made / "new"), track=True)
        m.start()
        m.stop()
        with pytest.raises(StateError, match="snapshot: the machine is stopped"):
            m.snapshot(str(made / "new"))
    assert not (made / "new").exists()


def test_a_snapshot_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """The file size limit stands for a full disk."""
    with bare_machine(HALTED, memory=64 * MIB) as m:
        m.start()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
        try:
            with pytest.raises(HostError, match=r"snapshot: .*snap: File too large"):
                m.snapshot(str(tmp_path / "snap"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert m.state == "running"
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_open(made: Path) -> None:
    for name in ("full", "diff"):
        with Machine.restore(str(made / name)):
            pass
    before = sorted(os.listdir("/proc/self/fd"))
    with Machine.restore(str(made / "diff")) as m:
        put(m, pattern(7, 5))
        m.snapshot(str(made / "third"), base=str(made / "diff"), track=True)
        m.start()
    flip(made / "full" / "state.json", 100)
    for _ in range(3):
        with pytest.raises(SnapshotError):
            Machine.restore(str(made / "full"))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_an_index_is_checked() -> None:
    index = Index({1: 2, 7: 9}, [(0, 4096), (1 << 20, 8192)])
    data = index.pack()
    again = Index.unpack(data, "x", 2 << 20)
    assert (again.sums, again.runs) == (index.sums, index.runs)
    for bad in (b"", data[:-1], b"X" + data[1:], data + b"\0"):
        with pytest.raises(SnapshotError, match="x is not an index of pages"):
            Index.unpack(bad, "x", 2 << 20)


def test_the_generation_id_changes(tmp_path: Path) -> None:
    with bare_machine(HALTED) as m:
        m.platform.vmgenid = True
        m.memory.write(layout.VMGENID, bytes(16))
        m.snapshot(str(tmp_path / "snap"))
    ids = set()
    for _ in range(3):
        with Machine.restore(str(tmp_path / "snap")) as m:
            ids.add(m.memory.read(layout.VMGENID, 16))
    assert len(ids) == 3


def test_a_copy_of_a_snapshot(made: Path) -> None:
    """Snapshots are directories like others: they can be copied."""
    shutil.copytree(made / "full", made / "copy")
    with Machine.restore(str(made / "copy"), verify=True):
        pass


def test_with_asyncio(tmp_path: Path) -> None:
    path = str(tmp_path / "snap")

    async def main() -> list[bytes]:
        async with AsyncMachine(bare_machine(COUNTING)) as m:
            put(m.machine, pattern(0, 5))
            await m.start()
            await m.snapshot(path)
            assert m.state == "running"
        async with AsyncMachine(lambda: Machine.restore(path)) as m:
            await m.start()
            m.memory.write_u8(FLAG, 1)
            assert (await m.wait(60)).status == 9
            return [m.memory.read(number * 4096, 4096) for number in pattern(0, 5)]

    assert asyncio.run(main()) == list(pattern(0, 5).values())


def test_several_at_once(tmp_path: Path) -> None:
    """Each is whole, and the machine goes on after the last."""
    with bare_machine(COUNTING, "user", regs={"rdi": 0, "rsi": 1}, memory=16 * MIB) as m:
        m.start()
        threads = [
            threading.Thread(target=m.snapshot, args=(str(tmp_path / str(number)),))
            for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert m.state == "running"
    for number in range(4):
        with Machine.restore(str(tmp_path / str(number)), verify=True) as m:
            m.memory.write_u8(FLAG, 1)
            m.start()
            assert m.wait(60).status == 9
            assert m.memory.read_u64(DATA + 16) == after(m.memory.read_u64(DATA + 8), 1)


def test_nobody_resumes_it_meanwhile() -> None:
    with bare_machine(HALTED) as m:
        m.start()
        m.pause()
        with quiesced(m), pytest.raises(StateError, match="resume: it is being copied"):
            m.resume()
        m.resume()


def test_disks_with_faults_are_refused(tmp_path: Path) -> None:
    image = disk_with(tmp_path / "disk.img")
    with bare_machine(HALTED, drives=[str(image)]) as m:
        m.faults.disk(0).fail()
        with pytest.raises(StateError, match="blk0 has faults set"):
            m.snapshot(str(tmp_path / "snap"))
        m.faults.disk(0).clear()
        m.snapshot(str(tmp_path / "snap"))


@pytest.mark.parametrize(
    ("had", "wanted", "has"),
    [
        ("none", "", "none"),
        ("auto", "", "none"),
        ("pty", "", "pty"),
        ("none", "auto", "auto"),
        ("hvc", "", "hvc,none"),
        ("hvc,file:a,b", "", "hvc,file:a,b"),
        ("hvc,none", "auto", "hvc,auto"),
        ("hvc", "hvc,pty", "hvc,pty"),
        ("file:a", "none", "none"),
    ],
)
def test_what_is_behind_the_console(had: str, wanted: str, has: str) -> None:
    assert _console(had, wanted) == has


def test_the_directories_above_a_snapshot_are_made(tmp_path: Path) -> None:
    with bare_machine(HALTED, memory=4 * MIB) as m:
        m.snapshot(str(tmp_path / "a/b/first"))
        m.snapshot(str(tmp_path / "a/b/second"), base=str(tmp_path / "a/b/first"))
    with Machine.restore(str(tmp_path / "a/b/second")):
        pass


def test_a_snapshot_that_fails_leaves_no_directory_that_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vmm.snapshot.store._write", full)
    (tmp_path / "there").mkdir()
    failing = pytest.raises(HostError, match="No space left")
    with bare_machine(HALTED, memory=4 * MIB) as m, failing:
        m.snapshot(str(tmp_path / "there/a/b/c"))
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "memory.index", "memory"])
def test_a_fifo_in_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "s"
    with bare_machine(HALTED) as m:
        m.snapshot(directory)
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(SnapshotError, match=name):
        Machine.restore(directory)


def test_what_is_no_path_makes_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd: Any
    with bare_machine(HALTED) as m:
        for odd in (None, 5, b"s", ["s"], "", "a\0b"):
            with pytest.raises(UsageError, match="snapshot: path="):
                m.snapshot(odd)
            with pytest.raises(UsageError, match="restore: path="):
                Machine.restore(odd)
        with pytest.raises(UsageError, match="base=5"):
            m.snapshot("s", base=5)  # type: ignore[arg-type]
        for odd in (None, 5, ["map"]):
            with pytest.raises(UsageError, match="restore: pages="):
                Machine.restore("s", pages=odd)
    assert os.listdir(tmp_path) == []
