"""A monitor with every kind of helper, killed (SIGKILL) at any moment: nothing is left that stops
the next start, which follows at once, and acknowledged flushes are in the images.

VMM_KILLS is how often, VMM_KILL_SEED from where the moments come.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import netns, tiny
from tests.test_virtio_vhost_user import qcow2

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(1200)]

__all__ = ["qcow2"]

KILLS = int(os.environ.get("VMM_KILLS", "100"))
SEED = int(os.environ.get("VMM_KILL_SEED", "1"))
SOURCE = Path(__file__).parent / "support" / "kill_guest.c"
MIB = 1 << 20
BLOCK, BLOCKS = 4096, 64
OUT, GATEWAY = "10.7.0.2", "10.7.0.1"
WITHIN = 120.0
"""Seconds for what takes milliseconds, or a boot."""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "guest"
    subprocess.run(
        ["gcc", "-m32", "-march=i386", "-Os", "-ffreestanding", "-fno-pie", "-no-pie",
         "-fno-stack-protector", "-fno-asynchronous-unwind-tables",
         "-fno-tree-loop-distribute-patterns", "-nostdlib", "-static",
         "-Wl,-Ttext-segment=0x100000,--build-id=none,-z,noexecstack,-e,start",
         "-o", str(path), str(SOURCE)],
        check=True,
    )  # fmt: skip
    return path


@pytest.fixture
def namespace() -> Iterator[None]:
    """A host with an interface and a default route, for passt; this thread is in it."""
    with netns.network_namespace():
        netns.ip("tuntap add out mode tap")
        netns.ip(f"addr add {OUT}/24 dev out")
        netns.ip("link set out up")
        netns.ip(f"route add default via {GATEWAY} dev out")
        yield


class Host:
    """What one machine after the other is started with, in a directory of its own.

    Attributes:
        machine: the kernel, and options of it and the machine.
        acknowledged: the last block that a guest said was flushed to both disks.
    """

    def __init__(self, directory: Path, machine: Sequence[str], qcow2: Callable[..., str]) -> None:
        self.machine = machine
        self.directory = directory = directory / "host"
        directory.mkdir()
        self.raw, self.share = directory / "raw.img", directory / "share"
        self.vsock, self.port = directory / "v", directory / "port"
        self.temporary = directory / "tmp"
        for made in (self.share, self.temporary):
            made.mkdir()
        self.raw.touch()
        os.truncate(self.raw, MIB)
        self.qcow2 = qcow2(MIB)
        self.service = socket.socket(socket.AF_UNIX)
        self.service.bind(f"{self.vsock}_1024")
        self.service.listen(8)
        self.service.setblocking(False)
        self.mark = f"TMPDIR={self.temporary}"  # one of the few variables that helpers get
        self.acknowledged = 0

    def start(self, until: int = 0) -> subprocess.Popen[bytes]:
        with contextlib.suppress(BlockingIOError):
            while True:  # the guest's connection to port 1024, which died with it
                self.service.accept()[0].close()
        options = [
            "--drive", f"{self.raw},queues=2", "--drive", f"{self.qcow2},format=qcow2",
            "--net", "tap=vmmkill,address=10.9.0.1/24",
            "--net", "user,forward=tcp:127.0.0.1:8080:80",
            "--fs", f"{self.share},tag=share", "--vsock", f"cid=7,path={self.vsock}", "--rng",
            "--balloon", "--port", f"name=p,socket={self.port}",
            "--append", f"quiet from={self.acknowledged} until={until}",
        ]  # fmt: skip
        return subprocess.Popen(
            tiny.command("run", *self.machine, *options),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=tiny.environment(TMPDIR=str(self.temporary)),
        )  # fmt: skip

    def hear(self, output: bytes) -> None:
        """Take what the guest printed (the last line may be cut short); not its kernel."""
        for line in output.split(b"\n")[:-1]:
            text = line.decode().strip()
            kind, _, number = text.partition(" ")
            if kind == "ack":
                self.acknowledged = int(number)
            else:
                assert text in ("started", "verified", "") or text.startswith("["), text

    def look(self) -> None:
        """See that the last blocks are in the raw image, as the guest itself does in both.

        A later round may have overwritten one: the guest was ahead of what we heard of it.
        """
        data = self.raw.read_bytes()
        for number in range(max(self.acknowledged - BLOCKS + 2, 1), self.acknowledged + 1):
            words = self.numbers(data[number % BLOCKS * BLOCK :][:BLOCK])
            assert all(w >= number and w % BLOCKS == number % BLOCKS for w in words), (
                f"block {number} of {self.acknowledged} acknowledged: {words}"
            )

    def numbers(self, block: bytes) -> set[int]:
        """Those it consists of."""
        return set(struct.unpack(f"<{BLOCK // 4}I", block))

    def processes(self) -> list[str]:
        """What runs that one of the machines started."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ends just now
                if self.mark.encode() in (place / "environ").read_bytes().split(b"\0"):
                    found.append(f"{place.name} {(place / 'cmdline').read_bytes()!r}")
        return found

    def check_nothing_is_left(self) -> None:
        limit = time.monotonic() + WITHIN
        while left := self.processes():
            assert time.monotonic() < limit, left
            time.sleep(0.05)
        self.service.close()
        assert netns.interfaces() == ["out"]
        assert sorted(path.name for path in self.directory.iterdir()) == [
            "raw.img", "share", "tmp", "v_1024",
        ]  # fmt: skip
        # Directories that exist for microseconds while a socket is made.
        assert len(list(self.temporary.iterdir())) <= 2


def kill(host: Host, *, after: float = 0.0, acks: int = 0) -> None:
    """Start a machine and kill it `after` seconds, or when it has acknowledged blocks."""
    process = host.start()
    assert process.stdout is not None and process.stderr is not None
    with process:
        output, limit = b"", time.monotonic() + (WITHIN if acks else after)
        while not acks or output.count(b"ack ") < acks:
            left = limit - time.monotonic()
            if not select.select([process.stdout], [], [], max(left, 0))[0]:
                break
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                break
            output += data
        process.kill()
        output += process.stdout.read()
        errors = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, (process.returncode, output, errors)
    assert output.count(b"ack ") >= acks, (output, errors)
    host.hear(output)
    host.look()


def finish(host: Host, blocks: int) -> float:
    """A machine that is left alone for so many blocks: seconds to the first one."""
    begin = time.monotonic()
    with host.start(until=host.acknowledged + blocks) as process:
        assert process.stdout is not None and process.stderr is not None
        output = b""
        took = 0.0
        while data := os.read(process.stdout.fileno(), 65536):
            output += data
            if not took and b"ack" in output:
                took = time.monotonic() - begin
        errors = process.stderr.read().decode()
    assert process.returncode == 0, (process.returncode, output, errors)
    assert errors == ""
    host.hear(output)
    host.look()
    return took


def test_a_monitor_killed_at_any_moment(
    namespace: None, guest: Path, qcow2: Callable[..., str], tmp_path: Path
) -> None:
    for program in ("passt", "qemu-storage-daemon"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here")
    host = Host(tmp_path, [str(guest), "--memory", "16M"], qcow2)
    typical = finish(host, 20)
    chance = random.Random(SEED)
    for number in range(KILLS):
        try:
            if chance.random() < 0.5:  # in its first moments, or in its work
                kill(host, after=chance.random() * 1.5 * typical)
            else:
                kill(host, acks=chance.randrange(1, 30))
        except AssertionError as err:
            raise AssertionError(f"VMM_KILL_SEED={SEED}, kill {number}: {err}") from None
    assert host.acknowledged > KILLS
    finish(host, 20)
    host.check_nothing_is_left()
    assert not list(host.share.iterdir())
