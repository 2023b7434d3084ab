"""The network device under Linux's own driver, over both transports: ping, HTTP both ways and
iperf3, through a tap and through passt; two guests on a private LAN; unbind and bind. Nothing is
left behind.

VMM_NET_MIB is how much is transferred each time: 200 take many minutes in the nested lane.
"""

from __future__ import annotations

import hashlib
import http.server
import os
import random
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support import netns, programs
from vmm import Machine, MachineConfig
from vmm.net import pcap
from vmm.testing.kernels import Kernel

MIB = 1 << 20
SIZE = int(os.environ.get("VMM_NET_MIB", "6"))
PATIENCE = 380 + 12 * SIZE
"""Seconds for the whole of it, on a busy emulated host."""
pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(PATIENCE + 20)]

HOST, GUEST = "10.9.0.1", "10.9.0.2"
OUT, GATEWAY = "10.7.0.2", "10.7.0.1"
ECHO = "10.8.0.1"
"""Another address of the host's, which a guest behind passt reaches; not the loopback."""
PORT = 8000

DHCP = """#!/bin/sh
[ "$1" = bound ] || exit 0
ifconfig $interface $ip netmask $subnet
[ -n "$mtu" ] && ifconfig $interface mtu $mtu
route add default gw $router
echo "lease: $ip from $router"
"""

# Without echo: what is typed would come anywhere between the lines printed.
FILE = f"""
stty -echo
mkdir /www; i=0; while [ $i -lt {SIZE} ]; do cat /seed; i=$((i+1)); done > /www/file
ifconfig lo 127.0.0.1
"""

SCRIPT = (
    FILE
    + f"""
echo "eth0: $(cat /sys/class/net/eth0/address) $(ls /sys/class/net/eth0/queues | tr '\\n' ' ')"
echo "eth1: mtu $(cat /sys/class/net/eth1/mtu)"
ifconfig eth0 {GUEST} netmask 255.255.255.0
ifconfig eth1 up
udhcpc -q -f -n -i eth1 -s /bin/dhcp 2>&1 | grep lease:
httpd -h /www -p 80
echo "tap ping: $(ping -q -c 3 -i 0.2 {HOST} | grep received)"
echo "large ping: $(ping -q -c 2 -s 9000 -i 0.2 {HOST} | grep received)"
echo "user ping: $(ping -q -c 3 -i 0.2 {ECHO} | grep received)"
fetch() {{
    before=$(cut -d ' ' -f 1 /proc/uptime)
    echo "$1 fetched: $(wget -q -O - http://$2:{PORT}/file | md5sum)"
    echo "$1 seconds: $before $(cut -d ' ' -f 1 /proc/uptime)"
}}
fetch tap {HOST}
fetch user {ECHO}
wget -q -T 3 -O - http://{GATEWAY}:{PORT}/file >/dev/null 2>&1 && echo "the loopback is reached"
echo "ready"
read line
/host/iperf3 -c {HOST} -t 1 -f M 2>&1 | sed 's/^/tap up: /' | grep -E 'sender|error'
/host/iperf3 -c {HOST} -t 1 -f M -R 2>&1 | sed 's/^/tap down: /' | grep -E 'receiver|error'
/host/iperf3 -c {ECHO} -t 1 -f M 2>&1 | sed 's/^/user up: /' | grep -E 'sender|error'
/host/iperf3 -c {ECHO} -t 1 -f M -R 2>&1 | sed 's/^/user down: /' | grep -E 'receiver|error'
cd /sys/bus/virtio/drivers/virtio_net
device=$(basename $(readlink /sys/class/net/eth0/device))
( while :; do wget -q -O /dev/null http://{HOST}:{PORT}/file; done ) 2>/dev/null &
load=$!
i=0; while [ $i -lt 50 ]; do
    echo $device > unbind
    echo $device > bind
    ifconfig eth0 {GUEST} netmask 255.255.255.0 || echo "lost: $i"
    [ $((i % 10)) = 0 ] && {{ ping -q -c 1 -W 5 {HOST} >/dev/null || echo "silent: $i"; }}
    i=$((i+1))
done
kill $load
echo "carrier $(cat /sys/class/net/eth0/carrier)"
echo "rounds done"
read line
sleep 0.5
echo "carrier $(cat /sys/class/net/eth0/carrier)"
echo "looked"
read line
sleep 0.5
echo "after: $(ping -q -c 2 -i 0.2 {HOST} | grep received)"
"""
)


@pytest.fixture
def namespace() -> Iterator[None]:
    """A host with an interface and a default route, for passt; this thread is in it."""
    with netns.network_namespace():
        netns.ip("tuntap add out mode tap")
        netns.ip(f"addr add {OUT}/24 dev out")
        netns.ip("link set out up")
        netns.ip(f"addr add {ECHO}/32 dev lo")
        netns.ip(f"route add default via {GATEWAY} dev out")
        # passt asks for echoes through sockets that need this.
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
        yield
        assert netns.interfaces() == ["out"]


@pytest.fixture
def seed() -> bytes:
    return random.Random(5).randbytes(MIB)


@pytest.fixture
def served(namespace: None, tmp_path: Path, seed: bytes) -> Iterator[str]:
    """An HTTP server in the namespace with a file: its MD5."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(seed * SIZE)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            pass  # a client that was killed

    server = Server(("0.0.0.0", PORT), partial(Handler, directory=str(tmp_path / "www")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hashlib.md5(seed * SIZE).hexdigest()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def iperf(namespace: None) -> Iterator[dict[str, Path]]:
    """A running server; the program's files for the guest."""
    files = programs.with_libraries("iperf3", "iperf3")
    command = [str(files["host/iperf3"]), "-s"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        yield files
        process.terminate()


def passts() -> list[int]:
    """Running passt processes that are our children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except FileNotFoundError:
            continue
        if "(passt" in name and rest.split()[1] == str(os.getpid()):
            found.append(int(stat.parent.name))
    return found


@contextmanager
def shown(machine: Machine) -> Iterator[None]:
    """What the guest printed, where a test fails."""
    try:
        yield
    except BaseException:
        print(machine.console.text()[-3000:])
        raise


def download(url: str) -> tuple[str, float]:
    """The MD5 of what is there, and MiB/s."""
    digest, size, begin = hashlib.md5(), 0, time.monotonic()
    with urllib.request.urlopen(url, timeout=120) as reply:
        while part := reply.read(MIB):
            digest.update(part)
            size += len(part)
    return digest.hexdigest(), size / MIB / (time.monotonic() - begin)


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_a_guest_on_a_tap_and_on_passt(
    cloud_kernel: Kernel,
    make_initrd: Callable[..., Path],
    served: str,
    iperf: dict[str, Path],
    seed: bytes,
    tmp_path: Path,
    transport: str,
) -> None:
    if shutil.which("passt") is None:
        pytest.skip("no passt here: apt-get install passt")
    initrd = make_initrd(
        SCRIPT,
        kernel=cloud_kernel,
        modules=[f"virtio_{transport}", "virtio_net"],
        files={"seed": seed, "bin/dhcp": DHCP, **iperf},
    )
    capture = tmp_path / "net.pcap"
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=PATIENCE, cpus=2,
        memory=512 * MIB, transport=transport,
        nets=[f"tap,address={HOST}/24,mac=52:54:00:00:00:05,queues=2,pcap={capture}",
              "user,forward=tcp:8080:80"],
    )  # fmt: skip
    with Machine(config) as machine, shown(machine):
        console, uart = machine.console, machine.platform.uart
        machine.start()
        console.wait_for("\nready", timeout=200)
        assert len(passts()) == 1
        for where in (f"{GUEST}", "127.0.0.1:8080"):
            digest, rate = download(f"http://{where}/file")
            assert digest == served
            print(f"from the guest at {where}: {rate:.1f} MiB/s")
        uart.receive(b"\n")
        console.wait_for("\nrounds done", timeout=PATIENCE)
        assert machine.platform.virtio is not None
        card = machine.platform.virtio.transports[0].device
        card.set_link(False)  # type: ignore[attr-defined]
        uart.receive(b"\n")
        console.wait_for("\nlooked", timeout=60)
        card.set_link(True)  # type: ignore[attr-defined]
        uart.receive(b"\n")
        ended = machine.wait()
        text = machine.console.text().replace("\r", "")
    print("\n".join(line for line in text.splitlines() if re.match(r"(tap|user) ", line)))
    assert ended is not None and ended.kind == "poweroff", f"{ended}\n{text[-3000:]}"
    assert "eth0: 52:54:00:00:00:05 rx-0 rx-1 tx-0 tx-1 \n" in text
    assert "eth1: mtu 65520\n" in text
    assert f"lease: {OUT} from {GATEWAY}\n" in text
    for name, count in (("tap", 3), ("large", 2), ("user", 3)):
        assert f"{name} ping: {count} packets transmitted, {count} packets received" in text
    for name in ("tap", "user"):
        assert f"{name} fetched: {served}" in text, text[-3000:]
        for way, side in (("up", "sender"), ("down", "receiver")):
            assert re.search(rf"{name} {way}: .* MBytes/sec .*{side}", text), text[-3000:]
    assert "lost: " not in text and "silent" not in text
    assert "the loopback is reached" not in text
    assert "carrier 1\nrounds done\ncarrier 0\nlooked\n" in text
    assert "after: 2 packets transmitted, 2 packets received" in text
    assert passts() == []
    assert largest_frame(capture) > 4 * 1514


def largest_frame(capture: Path) -> int:
    """Bytes of the largest frame recorded: segments crossed whole, if it is more than an MTU."""
    largest, at = 0, pcap.FILE_HEADER.size
    with open(capture, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        while at < end:
            file.seek(at)
            size = pcap.RECORD.unpack(file.read(pcap.RECORD.size))[2]
            largest = max(largest, size)
            at += pcap.RECORD.size + size
    return largest


LAN = (
    FILE
    + """
ifconfig eth0 10.5.0.$(cat /number) netmask 255.255.255.0
httpd -h /www -p 80
echo "mtu $(cat /sys/class/net/eth0/mtu)"
echo "ready"
read peer
echo "ping: $(ping -q -c 3 -i 0.2 $peer | grep received)"
before=$(cut -d ' ' -f 1 /proc/uptime)
echo "fetched: $(wget -q -O - http://$peer/file | md5sum)"
echo "seconds: $before $(cut -d ' ' -f 1 /proc/uptime)"
echo "done"
read line
"""
)


def test_two_guests_of_either_transport_on_a_private_lan(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], seed: bytes
) -> None:
    machines = []
    try:
        for number, transport in ((1, "mmio"), (2, "pci")):
            initrd = make_initrd(
                LAN,
                kernel=cloud_kernel,
                modules=[f"virtio_{transport}", "virtio_net"],
                files={"seed": seed, "number": f"{number}\n".encode()},
            )
            config = MachineConfig(
                str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=300,
                memory=512 * MIB, transport=transport, nets=["lan=test"],
            )  # fmt: skip
            machines.append(Machine(config))
            machines[-1].start()
        for machine in machines:
            machine.console.wait_for("\nready", timeout=150)
        for machine, peer in zip(machines, (2, 1), strict=True):
            machine.platform.uart.receive(b"10.5.0.%d\n" % peer)
        for machine in machines:
            machine.console.wait_for("\ndone", timeout=150)
        for machine in machines:
            machine.platform.uart.receive(b"\n")
            assert machine.wait().kind == "poweroff"  # type: ignore[union-attr]
    finally:
        for machine in machines:
            machine.close()
    for machine in machines:
        text = machine.console.text().replace("\r", "")
        print(re.findall(r"seconds: .*", text))
        assert "mtu 65520\n" in text
        assert "ping: 3 packets transmitted, 3 packets received" in text
        assert f"fetched: {hashlib.md5(seed * SIZE).hexdigest()}" in text
