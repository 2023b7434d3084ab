"""A machine pauses and ends whatever the programs that serve its devices do, or do not do.

Here they are stopped (SIGSTOP), keep requests for ever, or do not read what they are sent, while
the guest resets the device, or floods it. See test_virtio_bounded.py for what a guest alone can do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import floods, guests
from tests.support import images, tiny
from tests.support.blk_backend import BlkBackend
from tests.support.bounded import within
from tests.test_child import running
from vmm import Machine, MachineConfig, StateError

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

MIB = 1 << 20
LIMIT = 60.0
COUNTER = floods.DATA + 0xF000


def until(happened: Callable[[], object], what: str) -> None:
    limit = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < limit, what
        time.sleep(0.005)


def resets_for_ever() -> bytes:
    """A guest that makes the device ready again and again, and counts how often."""
    code = floods.Flood(1).begin + b"\xff\x05" + struct.pack("<I", COUNTER)  # inc dword [COUNTER]
    return code + b"\xe9" + struct.pack("<i", -len(code) - 5)


def machine_of(path: Path, code: bytes, **options: object) -> Machine:
    kernel = path / "guest.elf"
    kernel.write_bytes(guests.pvh_elf(code))
    return Machine(MachineConfig(kernel, memory=floods.MEMORY, **options))  # type: ignore[arg-type]


def child(name: str) -> int:
    """The number of this process's child `name`."""
    found: list[int] = []

    def look() -> bool:
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                    if Path(f"/proc/{pid}/comm").read_text().startswith(name):
                        found.append(int(pid))
        return bool(found)

    until(look, f"no {name}")
    return found[0]


def with_children(pid: int) -> list[int]:
    """`pid` after what it has started: virtiofsd is served by a child of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*(found for each in children for found in with_children(int(each))), pid]


def tell(pid: int, signum: int) -> None:
    """Send a signal to `pid` and what it has started."""
    for each in with_children(pid):
        os.kill(each, signum)


def goes_through(machine: Machine, *, kept: bool) -> None:
    """Pause, checkpoint, stop and close; `kept`: its devices can be saved."""
    for _ in range(2):
        within("pause", machine.pause)
        if kept:
            within("checkpoint", machine.checkpoint)
        else:
            with pytest.raises(StateError, match="another process"):
                within("checkpoint", machine.checkpoint)
        within("resume", machine.resume)
    if kept:
        within("rollback", machine.rollback)
    within("stop", machine.stop)
    within("close", machine.close)
    assert machine.exit is not None
    assert machine.exit.kind == "stopped"


# --- programs that serve a device's rings ---------------------------------------------------------


@contextlib.contextmanager
def of_others(path: Path) -> Iterator[tuple[dict[str, object], Callable[[], int]]]:
    (path / "disk.img").write_bytes(bytes(MIB))
    back = BlkBackend(path / "disk.img", path / "disk.sock")
    assert back.process is not None
    pid = back.process.pid
    try:
        yield {"vhost_user_blks": [str(back.socket)]}, lambda: pid
    finally:
        os.kill(pid, signal.SIGCONT)
        back.kill()


@contextlib.contextmanager
def of_ours(path: Path) -> Iterator[tuple[dict[str, object], Callable[[], int]]]:
    image = images.make(path / "disk.qcow2", "qcow2", MIB)
    yield {"drives": [f"{image},format=qcow2"]}, lambda: child("qemu-storage")


@contextlib.contextmanager
def directory(path: Path) -> Iterator[tuple[dict[str, object], Callable[[], int]]]:
    if os.geteuid():
        pytest.skip("needs root")
    (path / "shared").mkdir()
    yield {"shares": [f"{path}/shared,tag=s"]}, lambda: child("virtiofsd")


@pytest.mark.parametrize("peer", [of_others, of_ours, directory], ids=lambda peer: peer.__name__)
def test_a_mute_peer_while_the_guest_resets(
    peer: Callable[
        [Path], contextlib.AbstractContextManager[tuple[dict[str, object], Callable[[], int]]]
    ],
    tmp_path: Path,
) -> None:
    """Its guest's vCPU waits for the peer: it counts as parked, for it does not run the guest."""
    with peer(tmp_path) as (options, pid):
        machine = machine_of(tmp_path, resets_for_ever(), **options)
        try:
            machine.start()
            until(lambda: machine.memory.read_u32(COUNTER) > 3, "no resets")
            stopped = pid()
            tell(stopped, signal.SIGSTOP)
            counts: list[int] = []

            def stands_still() -> bool:
                counts.append(machine.memory.read_u32(COUNTER))
                time.sleep(0.1)
                return counts[-1] == machine.memory.read_u32(COUNTER)

            until(stands_still, "it goes on without the peer")
            before = machine.memory.read_u32(COUNTER)
            within("pause", machine.pause)
            within("resume", machine.resume)
            within("pause", machine.pause)
            assert machine.memory.read_u32(COUNTER) == before
            tell(stopped, signal.SIGCONT)  # it answers, while the machine is paused
            time.sleep(0.3)
            assert machine.memory.read_u32(COUNTER) == before, "the guest runs, paused"
            within("resume", machine.resume)
            until(lambda: machine.memory.read_u32(COUNTER) > before + 1, "it does not go on")
            tell(stopped, signal.SIGSTOP)
            until(stands_still, "it goes on without the peer")
            helpers = [] if peer is of_others else with_children(stopped)
            goes_through(machine, kept=False)
            until(lambda: not any(map(running, helpers)), "a helper is left")
        finally:
            within("close", machine.close)


DEAF = """#!/usr/bin/perl
use POSIX;
sigprocmask(SIG_BLOCK, POSIX::SigSet->new(SIGTERM));
exec "PROGRAM", @ARGV;
"""


@pytest.fixture
def deaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A qemu-storage-daemon that takes no SIGTERM; the number of its process."""
    program, perl = shutil.which("qemu-storage-daemon"), shutil.which("perl")
    if program is None or perl != "/usr/bin/perl":
        pytest.skip("needs qemu-storage-daemon and perl")
    wrapper = tmp_path / "qemu-storage-daemon"
    wrapper.write_text(DEAF.replace("PROGRAM", program))
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found: list[int] = []

    def look() -> bool:
        for each in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = each.read_bytes()
                if words.startswith(program.encode()) and bytes(tmp_path) in words:
                    found.append(int(each.parent.name))
        return bool(found)

    def process() -> int:
        until(look, "no daemon")
        return found[-1]

    return process


def test_a_helper_that_ignores_its_signal(
    deaf: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.child.GRACE", 1.5)
    drive = f"{images.make(tmp_path / 'disk.qcow2', 'qcow2', MIB)},format=qcow2"
    with machine_of(tmp_path, tiny.SPIN, drives=[drive]) as machine:
        machine.start()
        pid = deaf()
    assert running(pid), "close waits for it, or does not let it write what it has"
    with machine_of(tmp_path, tiny.SPIN, drives=[drive]):  # waits until nobody has it any more
        until(lambda: not running(pid), "it is left")


def test_a_command_whose_helper_ignores_its_signal(deaf: Callable[[], int], tmp_path: Path) -> None:
    drive = f"{images.make(tmp_path / 'disk.qcow2', 'qcow2', MIB)},format=qcow2"
    words = tiny.command("run", tiny.kernel(tmp_path, tiny.SPIN), "--drive", drive)
    with subprocess.Popen(words, env=tiny.environment(), stderr=subprocess.PIPE) as command:
        pid = deaf()
        command.terminate()
        command.send_signal(signal.SIGTERM)
        assert command.stderr is not None
        said = command.stderr.read()
    assert b"Traceback" not in said
    until(lambda: not running(pid), "it is left")


@pytest.mark.parametrize("how", ["stop", "close", "timeout"])
def test_a_mute_peer_at_the_end(how: str, tmp_path: Path) -> None:
    with of_others(tmp_path) as (options, pid):
        limit = {"timeout": 1.0} if how == "timeout" else {}
        machine = machine_of(tmp_path, resets_for_ever(), **options, **limit)
        try:
            machine.start()
            until(lambda: machine.memory.read_u32(COUNTER) > 1, "no resets")
            tell(pid(), signal.SIGSTOP)
            time.sleep(0.2)
            within(
                how, {"stop": machine.stop, "close": machine.close, "timeout": machine.wait}[how]
            )
        finally:
            within("close", machine.close)


# --- disks that do not answer ---------------------------------------------------------------------


@pytest.mark.parametrize("resets", [False, True], ids=["flood", "resets"])
def test_a_disk_that_keeps_its_requests(resets: bool, tmp_path: Path) -> None:
    """A fault delays each request for ever, as a disk that hangs."""
    code = resets_for_ever() if resets else b""
    if resets:
        (tmp_path / "disk.img").write_bytes(bytes(MIB))
        machine = machine_of(tmp_path, code, drives=[f"{tmp_path}/disk.img,snapshot"])
    else:
        machine = floods.machine("throttled reads", str(tmp_path))
    try:
        machine.faults.disk(0).latency(1e6)
        machine.start()
        time.sleep(0.3)
        goes_through(machine, kept=True)
    finally:
        within("close", machine.close)


# --- who does not read ----------------------------------------------------------------------------


def test_a_network_peer_that_does_not_read(tmp_path: Path) -> None:
    """A program at the other end of a network card's socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "net"))
        listener.listen()
        machine = floods.machine("net", str(tmp_path), nets=[f"socket={tmp_path}/net"])
        try:
            machine.start()
            accepted = listener.accept()[0]
            time.sleep(0.5)
            goes_through(machine, kept=True)
            accepted.close()
        finally:
            within("close", machine.close)


def test_a_socket_listener_that_does_not_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/vsock_1000")
        listener.listen(1)  # and accepts nobody
        machine = floods.machine("vsock", str(tmp_path))
        try:
            machine.start()
            time.sleep(0.3)
            goes_through(machine, kept=True)
        finally:
            within("close", machine.close)


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_a_console_that_nobody_reads(kind: str, tmp_path: Path) -> None:
    """A FIFO's or a socket's reader is there, and stuck."""
    if kind == "fifo":
        os.mkfifo(tmp_path / "fifo")
        reader: int | socket.socket = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        machine = floods.machine("long output", str(tmp_path), console=f"hvc,file:{tmp_path}/fifo")
    else:
        machine = floods.machine(
            "port", str(tmp_path), ports=[f"name=p,socket={tmp_path}/port"], console="none"
        )
        reader = socket.socket(socket.AF_UNIX)
        reader.connect(f"{tmp_path}/port")
    try:
        machine.start()
        time.sleep(0.3)
        goes_through(machine, kept=True)
    finally:
        within("close", machine.close)
        reader.close() if isinstance(reader, socket.socket) else os.close(reader)


# --- storms of registers, and the end in the middle of it -----------------------------------------


STORMS = {
    # mov edx, 0xcf8; mov eax, 0x80000810; out dx, eax; mov dl, 0xfc; in eax, dx; out dx, eax
    "PCI configuration": ("pci", bytes.fromhex("baf80c0000 b810080080 ef b2fc ed ef")),
    "PCI power and sizes": ("pci", bytes.fromhex("baf80c0000 b804080080 ef b2fc b8ffffffff ef")),
    "status": ("mmio", floods._store(floods.VIRTIO_MMIO_BASE + 0x70, 0)),
    "features": ("mmio", floods.Flood(1).begin),
}


@pytest.mark.parametrize("storm", STORMS)
def test_a_storm_of_registers(storm: str, tmp_path: Path) -> None:
    transport, code = STORMS[storm]
    code += b"\xe9" + struct.pack("<i", -len(code) - 5)
    machine = machine_of(tmp_path, code, transport=transport, rng=True, cpus=2)
    try:
        machine.start()
        time.sleep(0.1)
        goes_through(machine, kept=True)
    finally:
        within("close", machine.close)


@pytest.mark.parametrize("name", sorted(floods.FLOODS))
def test_power_off_in_the_middle(name: str, tmp_path: Path) -> None:
    """The guest powers off with all its requests under way."""
    machine = floods.machine(name, str(tmp_path), after=tiny.POWEROFF + tiny.HALT)
    try:
        machine.start()
        within("wait", lambda: machine.wait(LIMIT))
        assert machine.exit is not None
        assert machine.exit.kind == "poweroff"
    finally:
        within("close", machine.close)


def test_a_stopped_helper_does_not_keep_a_machine(tmp_path: Path) -> None:
    """passt is stopped, and the guest sends."""
    if shutil.which("passt") is None or os.geteuid():
        pytest.skip("needs passt, and root")
    from tests.support import netns

    with netns.network_namespace():
        for words in (
            "tuntap add out mode tap", "addr add 10.7.0.2/24 dev out", "link set out up",
            "route add default via 10.7.0.1 dev out",
        ):  # fmt: skip
            netns.ip(words)
        machine = floods.machine("net", str(tmp_path), nets=["user"])
        try:
            passt = child("passt")
            os.kill(passt, signal.SIGSTOP)
            machine.start()
            time.sleep(0.5)
            goes_through(machine, kept=True)
            until(lambda: not running(passt), "passt is left")
        finally:
            within("close", machine.close)
