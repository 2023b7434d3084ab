"""Row g: a network card on a tap, driven by the bench guest at the processor's speed.

The tap is in a network namespace made here. What the guest sends goes to a station that is nobody:
the host's kernel counts it and drops it. What it receives comes from flood.c, which sends as many
frames as the guest asks for, as TCP's acknowledgements would have it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import bare
from benchmarks.bare import Job
from benchmarks.native import compiled
from benchmarks.series import Progress, Series, interleave
from vmm.errors import HostError

ROUNDS = {"mmio": 9, "pci": 5}
MILLISECONDS = 250
TAP = "tap0"
SMALL = 1514
"""Bytes of a frame with a packet of 1,500."""
LARGE = 54 + 45 * 1448
"""One that the kernel cuts into 45, or has put together of as many: what "64 KiB" comes to."""

JOBS: dict[str, Job] = {
    "transmit, 64 KiB": {"size": LARGE, "depth": 32},
    "transmit, 1,500 bytes": {"size": SMALL, "depth": 128},
    "receive, 64 KiB": {"receive": 1, "size": LARGE, "depth": 16},
    "receive, 1,500 bytes": {"receive": 1, "size": SMALL, "depth": 128},
}


def measure(progress: Progress) -> list[Series]:
    """Every job over each bus."""
    with Network() as network:
        return [row for bus in ("mmio", "pci") for row in _compare(bus, network, progress)]


class Network:
    """A namespace with a tap in it, and somebody who sends frames there.

    Attributes:
        prefix: before a command that is to run in the namespace.
    """

    def __init__(self) -> None:
        self.name = f"vmm-bench-{os.getpid()}"
        self.prefix = ["ip", "netns", "exec", self.name]
        self._sender: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Network:
        self._run("ip", "netns", "add", self.name)
        try:
            for which in ("all", "default"):  # whose multicasts would be counted as well
                path = f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6"
                self._run(*self.prefix, "sh", "-c", f"! test -e {path} || echo 1 >{path}")
            ip = ("ip", "-n", self.name)
            self._run(*ip, "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr")
            self._run(*ip, "link", "set", TAP, "up")
            source = Path(__file__).with_name("flood.c")
            flood = compiled("flood", [source], ("-O2", "-Wall"))
            self._sender = subprocess.Popen([*self.prefix, flood, TAP], stdout=subprocess.PIPE)
            assert self._sender.stdout is not None
            if self._sender.stdout.readline() != b"ready\n":
                raise HostError("flood cannot send to the tap; its message is above")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._sender is not None:
            self._sender.kill()
            self._sender.communicate()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)

    def received(self) -> int:
        """Frames the tap has taken from guests since it is there."""
        path = f"/sys/class/net/{TAP}/statistics/rx_packets"
        return int(self._run(*self.prefix, "cat", path))

    def _run(self, *command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise HostError(f"net: {error}; `make setup` installs iproute2") from None
        if done.returncode:
            root = "" if os.geteuid() == 0 else " (the network rows need root)"
            raise HostError(f"net: {' '.join(command)}: {done.stderr.strip()}{root}")
        return done.stdout


def job(name: str, bus: str, milliseconds: int = MILLISECONDS) -> dict[str, int]:
    """The arguments of JOBS[name]."""
    whole = {"test": bare.NETWORK, "pci": int(bus == "pci"), "milliseconds": milliseconds}
    return {**whole, **JOBS[name]}


def vmm(bus: str) -> list[str]:
    """The command."""
    return bare.vmm(bus, "--net", f"tap={TAP}")


def qemu(bus: str) -> list[str]:
    """The same for QEMU; vhost-net is another thing to measure, where there is one."""
    netdev = f"tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off"
    device = f"virtio-net-{bare.QEMU_DEVICE[bus]},netdev=net"
    return bare.qemu(bus, "-netdev", netdev, "-device", device)


def run(command: Sequence[str], jobs: Sequence[Job], network: Network) -> list[dict[str, int]]:
    """Have the guest do `jobs`; every frame it sent must have come to the tap."""
    before = network.received()
    answers = bare.run(command, jobs, prefix=network.prefix)
    sent = sum(answer["sent"] for answer in answers)
    arrived = network.received() - before
    if arrived != sent:
        raise HostError(f"{command[0]}: of {sent} frames {arrived} came to the tap")
    return answers


def _compare(bus: str, network: Network, progress: Progress) -> list[Series]:
    reference = "QEMU microvm" if bus == "mmio" else "QEMU pc"

    def under(command: list[str]) -> Callable[[], Sequence[float]]:
        return lambda: _all(command, bus, network)

    contenders = {"vmm run": under(vmm(bus)), reference: under(qemu(bus))}
    results = interleave(contenders, ROUNDS[bus], progress, f"net over {bus}")
    rows = []
    for index, name in enumerate(JOBS):
        unit = "MB/s" if "KiB" in name else "1000/s"
        for who, samples in results.items():
            taken = [row[index] for row in samples]
            rows.append(Series("g", f"{bus}: {name}", who, unit, who == reference, "", taken))
    return rows


def _all(command: list[str], bus: str, network: Network) -> list[float]:
    jobs = [job(name, bus) for name in JOBS]
    answers = run(command, [jobs[0], *jobs], network)[1:]
    figures = []
    for each, answer in zip(jobs, answers, strict=True):
        a_second = answer["frames"] / answer["nanoseconds"] * 1e9
        figures.append(a_second * (LARGE / 1e6 if each["size"] == LARGE else 1e-3))
    return figures
