"""vmm/machine/peers.py: helpers and back ends that end before the guest has a driver for them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import images, netns, tiny
from tests.support.blk_backend import BlkBackend
from vmm import Machine, MachineConfig
from vmm.events import DeviceError
from vmm.machine.peers import Peers
from vmm.virtio.net import Nic

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]
WITHIN = 20.0


@contextlib.contextmanager
def running(tmp_path: Path, **values: object) -> Iterator[tuple[Machine, list[str]]]:
    """A machine whose guest has no driver for anything, and what is told of its devices."""
    before = tiny.descriptors(), threading.active_count(), [*children()]
    told: list[str] = []
    config = MachineConfig(tiny.kernel(tmp_path, tiny.COUNTING), memory="16M", **values)  # type: ignore[arg-type]
    with Machine(config) as machine:
        machine.on_error = told.append
        machine.start()
        yield machine, told
        assert machine.state == "running"
        events = [event.line for event in machine.event_log if isinstance(event, DeviceError)]
        assert events == told
    assert (tiny.descriptors(), threading.active_count(), [*children()]) == before


def children() -> dict[str, int]:
    """This process's children by name."""
    found = {}
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        found[name] = int(pid)
    return found


def until(happened: Callable[[], object]) -> None:
    limit = time.monotonic() + WITHIN
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.005)


def kill(name: str, signum: int = signal.SIGKILL) -> int:
    found: list[int] = []

    def look() -> bool:  # it may be the shell that becomes the program
        found[:] = [pid for comm, pid in children().items() if comm.startswith(name)]
        return bool(found)

    until(look)
    os.kill(found[0], signum)
    return found[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    with running(tmp_path, shares=[f"{tmp_path}/shared,tag=s"]) as (_, told):
        kill("virtiofsd")
        until(lambda: told)
        assert told == [
            "fs-s: virtiofsd was killed by SIGKILL; the guest gets I/O errors from now on"
        ]


def test_an_image(tmp_path: Path) -> None:
    image = images.make(tmp_path / "disk.qcow2", "qcow2", 1 << 20)
    for options, where in (("", "blk0"), (",serial=x", f"blk0: {image}")):
        with running(tmp_path, drives=[f"{image},format=qcow2{options}"]) as (_, told):
            kill("qemu-storage", signal.SIGTERM)
            until(lambda: told)
            how = "has ended (status 0)"
            assert told == [
                f"{where}: qemu-storage-daemon {how}; the guest gets I/O errors from now on"
            ]


def test_passt(tmp_path: Path) -> None:
    if shutil.which("passt") is None:
        pytest.skip("no passt here")
    with netns.network_namespace():
        for words in (
            "tuntap add out mode tap", "addr add 10.7.0.2/24 dev out", "link set out up",
            "route add default via 10.7.0.1 dev out",
        ):  # fmt: skip
            netns.ip(words)
        with running(tmp_path, nets=["user"]) as (machine, told):
            pid = kill("passt")
            until(lambda: told)
            assert told == [
                f"net0: passt ({pid}): it was killed by SIGKILL; the guest's link is down"
            ]
            virtio = machine.platform.virtio
            assert virtio is not None
            card = virtio.transports[0].device
            assert isinstance(card, Nic)
            until(lambda: not card.link_up)


def test_a_programs_network_socket(tmp_path: Path) -> None:
    path = tmp_path / "net"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with running(tmp_path, nets=[f"socket={path}"]) as (_, told):
            peer, _ = listener.accept()
            peer.send(b"\0\0\0\x40" + bytes(64))  # nobody has taken it when the link goes
            peer.close()
            until(lambda: told)
            assert told == [f"net0: socket {path}: it has ended; the guest's link is down"]


def test_somebody_elses_disk(tmp_path: Path) -> None:
    """It is told too that it is back, also before there is a driver."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    back = BlkBackend(tmp_path / "disk.img", tmp_path / "disk.sock")
    try:
        with running(tmp_path, vhost_user_blks=[str(back.socket)]) as (_, told):
            back.kill()
            until(lambda: told)
            back.start()
            until(lambda: len(told) == 2)
            assert told == [
                f"vhost-user-blk0: {back.socket} has ended; requests wait until it is back",
                f"vhost-user-blk0: {back.socket} is back",
            ]
    finally:
        back.kill()


def test_on_the_command_line(tmp_path: Path) -> None:
    """One line on standard error, while the machine runs on."""
    path = tmp_path / "net"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        words = ["--memory", "16M", "--console", "none", "--net", f"socket={path}"]
        with subprocess.Popen(
            [sys.executable, "-m", "vmm", "run", str(tiny.kernel(tmp_path, tiny.COUNTING)), *words],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            try:
                listener.accept()[0].close()
                assert process.stderr is not None
                line = process.stderr.readline()
                assert line == f"vmm: net0: socket {path}: it has ended; the guest's link is down\n"
                assert process.poll() is None
            finally:
                process.kill()


def test_each_is_told_once_and_the_end_waits_for_nothing() -> None:
    told: list[str] = []
    bugs: list[BaseException] = []
    pairs = {name: socket.socketpair() for name in ("a", "b", "c")}
    watched = [
        (ours.fileno(), lambda name=name: told.append(name))  # type: ignore[misc]
        for name, (ours, _) in pairs.items()
    ]
    peers = Peers(watched, bugs.append)
    pairs["b"][1].close()
    until(lambda: told == ["b"])
    pairs["a"][1].send(b"what comes is not looked at")
    pairs["a"][1].close()
    until(lambda: told == ["b", "a"])
    peers.close()
    peers.close()
    pairs["c"][1].close()
    time.sleep(0.05)
    assert (told, bugs) == (["b", "a"], [])
    for pair in pairs.values():
        for sock in pair:
            sock.close()


def test_what_gets_the_number_of_a_closed_one_is_not_watched() -> None:
    told: list[str] = []
    bugs: list[BaseException] = []
    pairs = {name: socket.socketpair() for name in ("replaced", "first", "last", "closed")}
    numbers = {name: ours.fileno() for name, (ours, _) in pairs.items()}
    pairs["closed"][0].close()
    peers = Peers([(fd, lambda name=name: told.append(name)) for name, fd in numbers.items()],  # type: ignore[misc]
                  bugs.append)  # fmt: skip
    until(lambda: told == ["closed"])
    stranger = socket.socketpair()
    pairs["replaced"][0].detach()
    os.dup2(stranger[0].fileno(), numbers["replaced"], inheritable=False)
    pairs["first"][1].close()
    until(lambda: told == ["closed", "first"])
    stranger[1].close()
    pairs["last"][1].close()
    until(lambda: "last" in told)
    peers.close()
    assert (told, bugs) == (["closed", "first", "last"], [])
    os.close(numbers["replaced"])
    for pair in (*pairs.values(), stranger):
        for sock in pair:
            sock.close()
