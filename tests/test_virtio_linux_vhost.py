"""Linux's own drivers on devices that the host's kernel serves: vhost-net and vhost-vsock."""

from __future__ import annotations

import hashlib
import http.server
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support import netns
from tests.test_virtio_linux_vsock import vsock_pipe
from vmm import Machine, MachineConfig
from vmm.testing.kernels import Kernel
from vmm.virtio.vhost_net import VhostNic
from vmm.virtio.vhost_vsock import VhostVsock

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(300)]

__all__ = ["vsock_pipe"]

MIB = 1 << 20
SIZE = 8
HOST, GUEST, CID, PORT = "10.9.0.1", "10.9.0.2", 0x7654321, 8000
ANY = 0xFFFFFFFF

SCRIPT = f"""
stty -echo
mkdir /www; i=0; while [ $i -lt {SIZE} ]; do cat /seed; i=$((i+1)); done > /www/file
ifconfig eth0 {GUEST} netmask 255.255.255.0
httpd -h /www -p 80
echo "fetched: $(wget -q -O - http://{HOST}:{PORT}/file | md5sum)"
vsock-pipe listen 1000 cat &
echo "asked: $(vsock-pipe connect 2 $(cat /port) < /www/file)"
echo "ready"
read line
cd /sys/bus/virtio/drivers/virtio_net
device=$(basename $(readlink /sys/class/net/eth0/device))
for i in 1 2 3 4 5; do
    echo $device > unbind; echo $device > bind
    ifconfig eth0 {GUEST} netmask 255.255.255.0
done
echo "ping: $(ping -q -c 3 -i 0.2 {HOST} | grep received)"
echo "done"
read line
"""


@pytest.fixture
def namespace() -> Iterator[None]:
    if not Path("/dev/vhost-net").exists():
        pytest.skip("no /dev/vhost-net here: modprobe vhost_net")
    with netns.network_namespace():
        yield
        assert netns.interfaces() == []


@pytest.fixture
def served(namespace: None, tmp_path: Path) -> Iterator[str]:
    """An HTTP server with a file: its MD5."""
    (tmp_path / "www").mkdir()
    data = random.Random(9).randbytes(MIB)
    (tmp_path / "www" / "file").write_bytes(data * SIZE)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = partial(Handler, directory=str(tmp_path / "www"))
    server = http.server.ThreadingHTTPServer(("0.0.0.0", PORT), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hashlib.md5(data * SIZE).hexdigest()
    server.shutdown()
    thread.join()
    server.server_close()


def answer(listener: socket.socket) -> None:
    """Tell one program of the guest's the MD5 of what it sends."""
    sock, (cid, _) = listener.accept()
    with sock:
        assert cid == CID
        digest = hashlib.md5()
        while data := sock.recv(1 << 16):
            digest.update(data)
        sock.sendall(digest.hexdigest().encode())


def connect(port: int) -> socket.socket:
    """To the guest's port; its program may be about to listen there."""
    limit = time.monotonic() + 60
    while True:
        sock = socket.socket(socket.AF_VSOCK)
        sock.settimeout(60)
        try:
            sock.connect((CID, port))
            return sock
        except OSError:
            sock.close()
            assert time.monotonic() < limit
            time.sleep(0.1)


def test_a_guest_on_vhost(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], vsock_pipe: Path, served: str
) -> None:
    with socket.socket(socket.AF_VSOCK) as listener:
        listener.bind((ANY, ANY))
        listener.listen()
        initrd = make_initrd(
            SCRIPT,
            kernel=cloud_kernel,
            modules=["virtio_pci", "virtio_net", "vmw_vsock_virtio_transport"],
            files={
                "seed": random.Random(9).randbytes(MIB), "bin/vsock-pipe": vsock_pipe,
                "port": b"%d" % listener.getsockname()[1],
            },
        )  # fmt: skip
        config = MachineConfig(
            str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=280, cpus=2,
            memory=512 * MIB, transport="pci", vsock=f"cid={CID},vhost",
            nets=[f"tap,address={HOST}/24,queues=2,vhost=on"],
        )  # fmt: skip
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        with Machine(config) as machine:
            assert isinstance(machine.virtio_device("net0"), VhostNic)
            assert isinstance(machine.virtio_device("vsock"), VhostVsock)
            machine.start()
            machine.console.wait_for("\nready", timeout=200)
            with urllib.request.urlopen(f"http://{GUEST}/file", timeout=120) as reply:
                assert hashlib.md5(reply.read()).hexdigest() == served
            with connect(1000) as sock:
                sock.sendall(b"hello")
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(100, socket.MSG_WAITALL) == b"hello"
            machine.platform.uart.receive(b"\n")
            machine.console.wait_for("\ndone", timeout=100)
            machine.platform.uart.receive(b"\n")
            ended = machine.wait()
            text = machine.console.text().replace("\r", "")
    assert ended.kind == "poweroff", text[-3000:]
    assert f"fetched: {served}" in text
    assert f"asked: {served}" in text
    assert "ping: 3 packets transmitted, 3 packets received" in text
