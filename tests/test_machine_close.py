"""Machine.close: all is given back whatever raises, and it has an end whatever holds it up."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.bare import bare_machine, until
from tests.support.disk_guest import DiskRequests
from vmm import Machine, MachineConfig, StateError
from vmm.events import Started
from vmm.virtio import blk

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(60)]

READS = """
1:  mov $0x300, %dx
    in %dx, %al
    jmp 1b
"""
SPINS = "1: jmp 1b"
END = 5.0
"""Far above what close takes, far below for ever."""


def descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return found


@contextmanager
def held_up(read: Callable[[int, int], int], entered: threading.Event) -> Iterator[Machine]:
    m = bare_machine(READS, "user")
    m.bind_port(0x300, read=read)
    m.start()
    assert entered.wait(20)
    yield m


def ends(function: Callable[[], object]) -> list[object]:
    """What `function` returned or raised, called in a thread, which must end."""
    got: list[object] = []

    def call() -> None:
        try:
            got.append(function())
        except BaseException as err:
            got.append(err)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(END)
    assert got, "it does not end"
    return got


@pytest.mark.parametrize("call", ["close", "stop", "wait", "pause"])
def test_a_bound_function_that_never_returns(call: str) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def read(offset: int, size: int) -> int:
        entered.set()
        go_on.wait()
        return 0

    before = descriptors()
    with held_up(read, entered) as m:
        if call == "pause":  # it waits, and close ends that
            pausing = threading.Thread(target=m.pause, daemon=True)
            pausing.start()
            until(lambda: m.state == "paused")
        elif call == "wait":
            m.unplug()
            assert ends(m.wait) == [m.exit]
        elif call == "stop":
            assert ends(m.stop) == [m.exit]
        with pytest.warns(ResourceWarning, match="has not returned"):
            assert ends(m.close) == [None]
        assert m.state == "closed"
        if call == "pause":
            pausing.join(END)
            assert not pausing.is_alive()
        assert m.vcpu_threads[0].join(0) is False
        m.close()  # harmless
        go_on.set()
        # What that thread used is given back now.
        until(lambda: not [name for name in descriptors() - before if "kvm" in name])
        until(lambda: not m.memory.regions)


def test_a_listener_that_never_returns() -> None:
    go_on = threading.Event()
    m = bare_machine(SPINS, "user")
    m.subscribe(lambda event: go_on.wait(), Started)
    starting = threading.Thread(target=m.start, daemon=True)
    starting.start()
    until(lambda: m.state == "running")
    assert ends(m.close) == [None]
    assert m.state == "closed"
    go_on.set()
    starting.join(END)
    assert not starting.is_alive()


@pytest.fixture
def freezer(tmp_path: Path) -> Iterator[tuple[Path, Callable[[bool], None]]]:
    """The directory of a file system, and a function that has it wait with every write, or no
    longer: it stands for a disk, or a server of files, that does not answer."""
    disk, mount = tmp_path / "ext4", tmp_path / "mount"
    disk.write_bytes(bytes(8 << 20))
    mount.mkdir()
    if os.geteuid():
        pytest.skip("needs root")
    subprocess.run(["/sbin/mkfs.ext4", "-q", str(disk)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(disk), str(mount)], check=False).returncode:
        pytest.skip("no loop device")
    frozen = False

    def freeze(wanted: bool) -> None:
        nonlocal frozen
        subprocess.run(["fsfreeze", "-f" if wanted else "-u", str(mount)], check=True)
        frozen = wanted

    try:
        yield mount, freeze
    finally:
        if frozen:
            freeze(False)
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize("workers", [False, True])
def test_a_disk_that_does_not_answer(
    freezer: tuple[Path, Callable[[bool], None]], workers: bool
) -> None:
    """The thread that serves its queues, or those that do so beside it, cannot be ended."""
    directory, freeze = freezer
    image = directory / "disk.img"
    image.write_bytes(bytes(1 << 20))
    before = descriptors()
    drives = [f"{image},cache=none" if workers else str(image)]
    m = Machine(MachineConfig(memory=64 << 20, drives=drives))
    try:
        m.start()
        guest = DiskRequests(m, 0)
        assert guest.put(0, b"a" * 512) == blk.S_OK
        freeze(True)
        guest.submit(blk.T_OUT, 1, out=b"b" * 512)
        time.sleep(0.3)
        with pytest.warns(ResourceWarning, match="a disk of the host's has not returned"):
            assert ends(m.close) == [None]
        assert m.state == "closed"
        freeze(False)
        until(lambda: descriptors() == before)  # the image's lock too
        until(lambda: not m.memory.regions)
        assert image.read_bytes()[512:1024] == b"b" * 512
    finally:
        m.close()


def test_a_thread_that_is_only_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host whose processors are all busy: there is no warning, and nothing left."""
    monkeypatch.setattr("vmm.machine.machine.END_WITHIN", 0.0)
    before = descriptors()
    for _ in range(10):
        m = bare_machine(SPINS, "user")
        m.start()
        time.sleep(0.01)
        m.close()
        assert descriptors() == before


@pytest.mark.parametrize("place", ["console", "device", "closer"])
def test_what_raises_does_not_keep_the_rest(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise OSError("does not close")

    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    before = descriptors()
    m = Machine(MachineConfig(memory=64 << 20, drives=[f"{image}"], console=f"file:{tmp_path}/out"))
    called: list[str] = []
    m.at_close(lambda: called.append("first"))
    part = {"console": m.platform.console.backend, "device": m.platform.uart}.get(place)
    if part is None:
        m.on_close(fails)
    else:
        whole = part.close

        def close() -> None:
            whole()
            fails()

        monkeypatch.setattr(part, "close", close)
    m.at_close(lambda: called.append("last"))
    with pytest.raises(OSError, match="does not close"):
        m.close()
    assert called == ["last", "first"]
    assert m.state == "closed"
    assert descriptors() == before
    m.close()
    with Machine(MachineConfig(memory=64 << 20, drives=[f"{image}"])):  # its lock is given back
        pass


def test_the_representation_says_what_it_is() -> None:
    m = bare_machine(SPINS, "user")
    with m:
        assert repr(m).startswith("<Machine created: no kernel, 1 vCPU, ")
        m.start()
        assert repr(m).startswith("<Machine running: ")
        m.stop()
        assert repr(m).endswith("; stopped by the monitor>")
    assert repr(m).startswith("<Machine closed: ")


def test_a_rollback_does_not_wait_for_a_function_for_ever() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def read(offset: int, size: int) -> int:
        entered.set()
        go_on.wait()
        return 0

    m = bare_machine(READS, "user")
    m.bind_port(0x300, read=read)
    m.checkpoint()
    m.start()
    assert entered.wait(20)
    m.stop()
    with pytest.raises(StateError, match="has not returned"):
        m.rollback()
    with pytest.warns(ResourceWarning):
        m.close()
    go_on.set()
    until(lambda: not m.memory.regions)
