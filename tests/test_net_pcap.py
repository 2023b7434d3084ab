"""vmm/net/pcap.py: what is recorded is what passed, for tcpdump too."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.net_guest import MAC, NetGuest, random_frame
from vmm.errors import UsageError
from vmm.net import pcap
from vmm.net.config import Net
from vmm.net.pcap import Capture

OTHER = b"\x02\0\0\0\0\x09"


def read(path: Path) -> list[tuple[float, bytes]]:
    """(time, frame) of each record."""
    data = path.read_bytes()
    head = pcap.FILE_HEADER.unpack_from(data)
    assert head == (0xA1B23C4D, 2, 4, 0, 0, 262144, 1)
    at, found = pcap.FILE_HEADER.size, []
    while at < len(data):
        seconds, nanoseconds, size, whole = pcap.RECORD.unpack_from(data, at)
        at += pcap.RECORD.size
        assert size == whole and nanoseconds < 10**9
        found.append((seconds + nanoseconds / 1e9, data[at : at + size]))
        at += size
    assert at == len(data)
    return found


def record(path: Path, frames: list[bytes], back: list[bytes], **how: int) -> None:
    """Have a guest send `frames` and receive `back`, over a socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        name = str(path.with_suffix(".sock"))
        listener.bind(name)
        listener.listen()
        nic = Net("socket", name, pcap=str(path)).open(0)
        assert nic is not None
        with listener.accept()[0] as wire, NetGuest(nic, **how) as guest:
            for frame in frames:
                guest.send(frame)
            for frame in back:
                wire.sendall(len(frame).to_bytes(4, "big") + frame)
                assert guest.frame() == frame


@pytest.mark.parametrize("cut", [0, 1, 12, 20])
def test_both_directions(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a,b.pcap"
    begin = time.time()
    sent, back = [random_frame(60, OTHER), random_frame(30000, OTHER)], [random_frame(5000)]
    record(path, sent, back, cut=cut)
    found = read(path)
    assert [frame for _, frame in found] == sent + back
    times = [begin, *(when for when, _ in found), time.time()]
    assert times == sorted(times)


def test_tcpdump_reads_it(tmp_path: Path) -> None:
    if shutil.which("tcpdump") is None:
        pytest.skip("no tcpdump here")
    path = tmp_path / "x.pcap"
    arp = netns.arp_request(MAC, "10.0.0.2", "10.0.0.1")
    large = netns.ethernet(
        OTHER, MAC, 0x800, netns.ipv4("10.0.0.2", "10.0.0.1", 17, netns.udp(1, 2, bytes(60000)))
    )
    record(path, [arp, large], [])
    done = subprocess.run(
        ["tcpdump", "-nt", "-r", path.name], cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "ARP, Request who-has 10.0.0.1 tell 10.0.0.2, length 28",
        "IP 10.0.0.2.1 > 10.0.0.1.2: UDP, length 60000",
    ]


def test_a_file_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--net pcap=.*/no/such: No such file or directory"):
        Net("lan", "x", pcap=str(tmp_path / "no" / "such")).open(0)


def test_a_full_disk_ends_the_capture_alone() -> None:
    capture = Capture("/dev/full")
    for _ in range(40):
        capture.record([memoryview(bytes(65536))], 65536)
    assert capture.error == "--net pcap=/dev/full: No space left on device; the capture ends here"
    capture.record([memoryview(bytes(64))], 64)
    capture.close()


def test_the_file_is_closed_when_the_card_cannot_be(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match=r"--net socket=.*/nobody: No such file or directory"):
        Net("socket", str(tmp_path / "nobody"), pcap=str(tmp_path / "x")).open(0)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("how", [{}, {"packed": True}])
def test_a_reader_need_not_wait_for_the_end(tmp_path: Path, how: dict[str, int]) -> None:
    """Each direction is in the file as soon as the card is idle, before more passes."""
    path = tmp_path / "x.pcap"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        nic = Net("socket", str(tmp_path / "s"), pcap=str(path)).open(0)
        assert nic is not None
        assert read(path) == []  # a header, and no frame
        with listener.accept()[0] as wire, NetGuest(nic, **how) as guest:
            passed = []
            for _ in range(3):
                passed.append(random_frame(60, OTHER))
                guest.send(passed[-1])
                until(path, passed)
                passed.append(random_frame(1000))
                wire.sendall(len(passed[-1]).to_bytes(4, "big") + passed[-1])
                assert guest.frame() == passed[-1]
                until(path, passed)


def until(path: Path, frames: list[bytes]) -> None:
    """Wait until the file has `frames`."""
    limit = time.monotonic() + 20
    while [frame for _, frame in read(path)] != frames:
        assert time.monotonic() < limit
        time.sleep(0.01)
