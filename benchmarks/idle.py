"""Row i: processor time of a monitor whose guest halts, with few devices and with many.

The guest halts with interrupts enabled, and no timer of it runs: what is used is the monitor's own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import guests
from benchmarks.series import Progress, Series, interleave
from benchmarks.start import QEMU
from vmm.errors import HostError

ROUNDS = 5
SETTLE, SECONDS = 1.5, 3.0
IDLE = b"\xfb" + guests.HALT[1:]  # sti; hlt; jmp to the hlt
DEVICES = "with a disk, entropy, a balloon and (ours) a socket"


def measure(progress: Progress) -> list[Series]:
    """`vmm run` beside QEMU microvm, bare and with devices."""
    with tempfile.TemporaryDirectory(prefix="vmm-bench-") as scratch:
        kernel = os.path.join(scratch, "idle.elf")
        Path(kernel).write_bytes(guests.pvh_elf(IDLE))
        image = os.path.join(scratch, "disk.img")
        Path(image).write_bytes(bytes(1 << 20))
        vmm = [os.path.join(os.path.dirname(sys.executable), "vmm"), "run", kernel]
        vmm += ["--console", "none"]
        ours = ["--drive", f"{image},readonly", "--rng", "--balloon"]
        ours += ["--vsock", f"cid=9,path={scratch}/vsock"]
        theirs = ["-drive", f"if=none,id=d,file={image},format=raw,readonly=on"]
        theirs += ["-device", "virtio-blk-device,drive=d", "-device", "virtio-rng-device"]
        theirs += ["-device", "virtio-balloon-device"]
        rows = []
        for title, ours_more, theirs_more in (("", [], []), (DEVICES, ours, theirs)):
            contenders: dict[str, Callable[[], Sequence[float]]] = {
                "vmm run": lambda more=ours_more: [_used([*vmm, *more])],  # type: ignore[misc]
                "QEMU microvm": lambda more=theirs_more: [  # type: ignore[misc]
                    _used([*QEMU[:-1], *more, "-kernel", kernel])
                ],
            }
            results = interleave(contenders, ROUNDS, progress, "idle", warm_up=0)
            for name, samples in results.items():
                what = f"processor time of an idle machine {title}".strip()
                row = Series("i", what, name, "ms/s")
                row.reference = name == "QEMU microvm"
                row.samples = [sample[0] for sample in samples]
                rows.append(row)
    return rows


def _used(command: list[str]) -> float:
    """Milliseconds of processor time that `command` uses a second, once it has started."""
    null = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=null, stdout=null, stderr=subprocess.PIPE) as process:
        try:
            time.sleep(SETTLE)
            begin, before = time.monotonic(), _processor_time(process.pid)
            time.sleep(SECONDS)
            used, taken = _processor_time(process.pid) - before, time.monotonic() - begin
            if process.poll() is not None:
                raise ProcessLookupError
        except OSError:
            assert process.stderr is not None
            said = process.stderr.read().decode(errors="replace").strip()
            raise HostError(f"{' '.join(command)} has ended: {said}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return used / taken * 1e3


def _processor_time(pid: int) -> float:
    """Seconds that all threads of a process have run."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9
