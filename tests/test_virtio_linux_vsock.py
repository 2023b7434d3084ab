"""The socket device under Linux's own driver, over both transports: data both ways, many
connections, unbind and bind under load.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import programs
from vmm import Machine, MachineConfig
from vmm.testing.kernels import Kernel

pytestmark = [
    pytest.mark.needs_linux_kvm,
    pytest.mark.timeout(400),
    pytest.mark.parametrize("transport", ["mmio", "pci"]),
]

MIB = 1 << 20
SIZE = int(os.environ.get("VMM_VSOCK_MIB", "32"))
"""MiB each way; 100 take 40 s in the nested lane."""
PARALLEL = 50
PATIENCE = 240
"""Seconds: only the end of a hang, on a busy host too."""
ROUNDS = 50
DRIVER = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport"

SCRIPT = f"""
stty -echo  # what is typed would come anywhere between the lines printed
vsock-pipe listen 1000 md5sum &
vsock-pipe listen 1001 cat &
echo "listening"
read line
i=0; while [ $i -lt {SIZE} ]; do cat /seed; i=$((i+1)); done | vsock-pipe connect 2 2000
echo "sent"
read line
i=0; while [ $i -lt {PARALLEL} ]; do
    ( head -c 20000 /seed | vsock-pipe connect 2 2001 | cmp - /part && echo same >> /tmp/same ) &
    i=$((i+1))
done
while [ "$(wc -l < /tmp/same)" != {PARALLEL} ]; do sleep 0.1; done
echo "parallel done"
vsock-pipe connect 2 2999 < /dev/null 2>&1 | sed 's/^/refused: /'
echo "asked: $(echo question | vsock-pipe connect 2 2002)"
read line
cd {DRIVER}
device=$(echo virtio*)
( while :; do vsock-pipe connect 2 2004 < /seed && touch /loaded || sleep 0.05; done ) \\
    > /dev/null 2>&1 &
load=$!
while [ ! -e /loaded ]; do sleep 0.05; done  # a connection reset too early may wait for a minute
i=0; while [ $i -lt {ROUNDS} ]; do
    echo $device > unbind
    echo $device > bind
    [ $((i % 10)) = 0 ] && echo done | vsock-pipe connect 2 2003
    i=$((i+1))
done
kill $load
vsock-pipe listen 1002 cat &
echo "bound again"
read line
"""


@pytest.fixture(scope="module")
def vsock_pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return programs.compiled("vsock_pipe", tmp_path_factory.mktemp("pipe"))


@pytest.fixture
def seed() -> bytes:
    return random.Random(7).randbytes(MIB)


@pytest.fixture
def machine(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], vsock_pipe: Path, seed: bytes,
    tmp_path: Path, transport: str,
) -> Iterator[Machine]:  # fmt: skip
    initrd = make_initrd(
        SCRIPT,
        kernel=cloud_kernel,
        modules=[f"virtio_{transport}", "vmw_vsock_virtio_transport"],
        files={"bin/vsock-pipe": vsock_pipe, "seed": seed, "part": seed[:20000]},
    )
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=380, cpus=2,
        transport=transport, vsock=f"cid=5,path={tmp_path}/v",
    )  # fmt: skip

    def answer(sock: socket.socket) -> None:
        sock.sendall(read_all(sock).upper())

    with Machine(config) as machine:
        machine.bind_vsock(2002, answer)
        machine.start()
        yield machine


def connect(path: Path, port: int) -> socket.socket:
    """A connection to the guest's `port`; it may be about to listen there."""
    limit = time.monotonic() + PATIENCE
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(120)
        sock.connect(str(path))
        sock.sendall(b"CONNECT %d\n" % port)
        line = b""
        while not line.endswith(b"\n") and (byte := sock.recv(1)):
            line += byte
        if line:
            assert line.startswith(b"OK ")
            return sock
        sock.close()
        assert time.monotonic() < limit, f"port {port} was refused"
        time.sleep(0.1)


def listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(120)
    sock.bind(path)
    sock.listen(64)
    return sock


class Taken:
    """A listener that takes whatever comes, one connection after the other (a context manager).

    Attributes:
        count, size: connections and bytes taken.
        data: the first bytes.
    """

    def __init__(self, path: str) -> None:
        self.count = self.size = 0
        self.data = b""
        self._server = listen(path)
        self._server.settimeout(None)
        self._thread = threading.Thread(target=self._take)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()

    def _take(self) -> None:
        with contextlib.suppress(OSError):  # it was shut down
            while True:
                with self._server.accept()[0] as sock, contextlib.suppress(ConnectionError):
                    self.count += 1
                    while part := sock.recv(MIB):
                        self.size += len(part)
                        self.data = (self.data + part)[:1000]


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(MIB), b""))


def test_a_guests_sockets(machine: Machine, tmp_path: Path, seed: bytes) -> None:
    path, console = tmp_path / "v", machine.console
    console.wait_for("listening", timeout=120)
    want = hashlib.md5()
    for _ in range(SIZE):
        want.update(seed)

    begin = time.monotonic()
    with connect(path, 1000) as sock:
        for _ in range(SIZE):
            sock.sendall(seed)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).split()[0].decode() == want.hexdigest()
    print(f"host to guest: {SIZE / (time.monotonic() - begin):.1f} MiB/s")

    got = hashlib.md5()
    size = 0
    with listen(f"{path}_2000") as server:
        machine.platform.uart.receive(b"\n")
        begin = time.monotonic()
        sock = server.accept()[0]
        while part := sock.recv(MIB):
            got.update(part)
            size += len(part)
        sock.close()
    print(f"guest to host: {SIZE / (time.monotonic() - begin):.1f} MiB/s")
    assert size == SIZE * MIB
    assert got.hexdigest() == want.hexdigest()
    console.wait_for("sent", timeout=PATIENCE)

    # 50 connections at once from the host ...
    begin = time.monotonic()
    socks = [connect(path, 1001) for _ in range(PARALLEL)]
    for number, sock in enumerate(socks):
        sock.sendall(seed[number * 20000 : (number + 1) * 20000])
        sock.shutdown(socket.SHUT_WR)
    for number, sock in enumerate(socks):
        assert read_all(sock) == seed[number * 20000 : (number + 1) * 20000]
        sock.close()
    print(f"{PARALLEL} connections to the guest: {time.monotonic() - begin:.1f} s")

    # ... and from the guest.
    with listen(f"{path}_2001") as server:
        threads = []

        def echo(sock: socket.socket) -> None:
            with sock:
                sock.sendall(read_all(sock))

        machine.platform.uart.receive(b"\n")
        begin = time.monotonic()
        for _ in range(PARALLEL):
            threads.append(threading.Thread(target=echo, args=(server.accept()[0],)))
            threads[-1].start()
        for thread in threads:
            thread.join(PATIENCE)
        console.wait_for("parallel done", timeout=PATIENCE)
    print(f"{PARALLEL} connections from the guest: {time.monotonic() - begin:.1f} s")
    assert "reset by peer" in console.wait_for(re.compile("refused: .*\n"), timeout=PATIENCE)

    assert "QUESTION" in console.wait_for(re.compile("asked: .*\n"), timeout=PATIENCE)

    loads, probes = Taken(f"{path}_2004"), Taken(f"{path}_2003")
    with connect(path, 1001) as held, loads, probes:
        machine.platform.uart.receive(b"\n")
        console.wait_for("bound again", timeout=200)
        with pytest.raises(OSError):  # it was reset with the device
            while held.send(b"x"):
                time.sleep(0.1)
    with connect(path, 1002) as sock:
        sock.sendall(b"still here")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"still here"
    print(f"{loads.size / MIB:.1f} MiB over {loads.count} connections meanwhile")
    assert loads.size > 0
    assert probes.data == b"done\n" * (ROUNDS // 10)
    machine.platform.uart.receive(b"\n")
    assert machine.wait(PATIENCE).kind == "poweroff"
    machine.close()
    assert not path.exists()
