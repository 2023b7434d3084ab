"""Row f: a disk, driven by the bench guest at the processor's speed, over MMIO and PCI.

Beside `vmm run`: QEMU with an iothread, with each of its ways of doing I/O that suit a file in the
page cache, and fio on the host with the same file, which is the most there is to have.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence

from benchmarks import bare
from benchmarks.bare import Job
from benchmarks.series import Progress, Series, interleave
from vmm.errors import HostError
from vmm.layout import KIB, MIB
from vmm.testing.kernels import cache_directory

ROUNDS = {"mmio": 9, "pci": 5}
"""QEMU's pc takes six seconds to start where KVM interprets its firmware."""
MILLISECONDS = 250
SIZE = 256 * MIB
"""Of each of two images, one to read and one to write: they stay in the page cache."""
AIO = ("io_uring", "threads")
READ, WRITE = "read.img", "write.img"

JOBS: dict[str, Job] = {
    "4 KiB random read, QD1": {"random": 1, "depth": 1},
    "4 KiB random read, QD32": {"random": 1, "depth": 32},
    "4 KiB random write, QD1": {"random": 1, "depth": 1, "write": 1},
    "4 KiB random write, QD32": {"random": 1, "depth": 32, "write": 1},
    "1 MiB sequential read, QD8": {"size": MIB, "depth": 8},
    "1 MiB sequential write, QD8": {"size": MIB, "depth": 8, "write": 1},
    "no data (GET_ID), QD1": {"identify": 1, "depth": 1},
}


def measure(progress: Progress) -> list[Series]:
    """Every job over each bus."""
    home = cache_directory() / "bench"
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="blk-") as scratch:
        progress("blk: writing the images")
        for name in (READ, WRITE):
            make_image(os.path.join(scratch, name), SIZE)
        rows = []
        for bus in ("mmio", "pci"):
            rows += _compare(bus, scratch, progress)
    return rows


def make_image(path: str, size: int) -> None:
    """An image whose every 4 KiB begin with their offset, as the guest wants to find it."""
    with open(path, "wb") as file:
        for start in range(0, size, MIB):
            file.write(
                b"".join(
                    offset.to_bytes(8, "little").ljust(4 * KIB, b"\xa5")
                    for offset in range(start, start + MIB, 4 * KIB)
                )
            )


def job(name: str, bus: str, milliseconds: int = MILLISECONDS) -> dict[str, int]:
    """The arguments of JOBS[name]."""
    whole = {"test": bare.DISK, "pci": int(bus == "pci"), "milliseconds": milliseconds}
    return {**whole, "check": 1, **JOBS[name]}


def vmm(bus: str, path: str) -> list[str]:
    """The command for one image."""
    return bare.vmm(bus, "--drive", path)


def qemu(bus: str, path: str, aio: str) -> list[str]:
    """The same for QEMU."""
    drive = f"if=none,id=disk,format=raw,aio={aio},file={path}"
    device = f"virtio-blk-{bare.QEMU_DEVICE[bus]},drive=disk,iothread=io"
    return bare.qemu(bus, "-object", "iothread,id=io", "-drive", drive, "-device", device)


def _compare(bus: str, scratch: str, progress: Progress) -> list[Series]:
    def under(command: Callable[[str], list[str]]) -> Callable[[], Sequence[float]]:
        return lambda: _both(command, bus, scratch)

    reference = "QEMU microvm" if bus == "mmio" else "QEMU pc"
    contenders: dict[str, Callable[[], Sequence[float]]] = {
        "vmm run": under(lambda path: vmm(bus, path))
    }
    for aio in AIO:
        contenders[f"{reference}, aio={aio}"] = under(lambda path, aio=aio: qemu(bus, path, aio))
    if bus == "mmio":
        contenders["fio on the host"] = lambda: [_fio(name, scratch) for name in JOBS]
    results = interleave(contenders, ROUNDS[bus], progress, f"blk over {bus}")
    rows = []
    for index, name in enumerate(JOBS):
        unit = "µs" if name.endswith("QD1") else "MB/s" if "MiB" in name else "1000/s"
        series = [
            Series("f", f"{bus}: {name}", who, unit, False, "", [row[index] for row in samples])
            for who, samples in results.items()
            if samples[0][index]
        ]
        theirs = [each for each in series if each.contender.startswith(reference)]
        better = min if unit == "µs" else max
        better(theirs, key=lambda each: each.median).reference = True
        rows += series
    return rows


def _both(command: Callable[[str], list[str]], bus: str, scratch: str) -> list[float]:
    """The jobs that read and those that write, each kind in one machine, in the order of JOBS."""
    figures: dict[str, float] = {}
    for image, write in ((READ, 0), (WRITE, 1)):
        names = [name for name in JOBS if JOBS[name].get("write", 0) == write]
        jobs = [job(name, bus) for name in names]
        answers = bare.run(command(os.path.join(scratch, image)), [jobs[0], *jobs])[1:]
        for name, got in zip(names, answers, strict=True):
            figures[name] = figure(name, got["requests"], got["nanoseconds"], got["median"])
    return [figures[name] for name in JOBS]


def figure(name: str, requests: int, nanoseconds: int, median: int) -> float:
    """Microseconds of the middle request where one waits for the other, so that a moment another
    process had the processor does not count; else MB or thousands a second."""
    if not requests:
        raise HostError(f"{name}: not one request came back")
    if name.endswith("QD1"):
        return median / 1e3
    if "MiB" in name:
        return requests * MIB / nanoseconds * 1e3
    return requests / nanoseconds * 1e6


def _fio(name: str, scratch: str) -> float:
    """The same by fio; 0 where it has nothing like it."""
    if "identify" in JOBS[name]:
        return 0.0
    write, size = JOBS[name].get("write", 0), JOBS[name].get("size", 4 * KIB)
    kind = ("rand" if JOBS[name].get("random") else "") + ("write" if write else "read")
    command = [
        *("fio", "--name=limit", f"--filename={os.path.join(scratch, WRITE if write else READ)}"),
        *(f"--rw={kind}", f"--bs={size}", f"--iodepth={JOBS[name]['depth']}", "--thread"),
        *("--ioengine=io_uring", "--time_based", f"--runtime={MILLISECONDS}ms", "--ramp_time=20ms"),
        *("--invalidate=0", "--randrepeat=0", "--norandommap", "--fsync_on_close=0"),
        *("--allow_file_create=0", "--lat_percentiles=1", "--output-format=json"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"fio: {error}; `make setup` installs it") from None
    (answer,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    got = answer["write" if write else "read"]
    median = got["lat_ns"]["percentile"]["50.000000"]
    return figure(name, got["total_ios"], got["runtime"] * 1_000_000, median)
