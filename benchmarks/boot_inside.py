"""Row d's part in the nested lane: `python -m benchmarks.boot_inside DIRECTORY REPETITIONS`.

DIRECTORY has bzImage, vmlinux and initrd. Lines of progress, then one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks.series import interleave
from vmm.config import MachineConfig

MARK = b"bench: init runs"
CMDLINE = MachineConfig().default_cmdline
"""The same for all: vmm run's own."""
QEMU = [
    *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-nodefaults"),
    *("-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
]
ONE_BOOT = 180.0


def main(source: str, repetitions: int) -> None:
    """Boot everything in turns; print what it took."""
    with tempfile.TemporaryDirectory(prefix="vmm-bench-") as scratch:
        for name in ("bzImage", "vmlinux", "initrd"):
            _progress(f"copying {name}")
            shutil.copy(os.path.join(source, name), scratch)
        os.chdir(scratch)
        print(json.dumps(_measure(repetitions), separators=(",", ":")), flush=True)


def _measure(repetitions: int) -> dict[str, object]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.environ["PYTHONPATH"] = root
    vmm = os.path.join(os.path.dirname(sys.executable), "vmm")
    given = ["-initrd", "initrd", "-append", CMDLINE]
    contenders: dict[str, Callable[[], Sequence[float]]] = {
        "vmm run, bzImage": lambda: _boot([vmm, "run", "bzImage", "--initrd", "initrd"]),
        "vmm run, vmlinux": lambda: _boot([vmm, "run", "vmlinux", "--initrd", "initrd"]),
        "QEMU microvm, vmlinux": lambda: _boot(
            [*QEMU, "-M", "microvm", "-kernel", "vmlinux", *given]
        ),
        "QEMU pc, bzImage": lambda: _boot([*QEMU, "-M", "pc", "-kernel", "bzImage", *given]),
    }
    times = interleave(contenders, repetitions, _progress, "boots", warm_up=0)
    phases = {
        f"vmm run, {kernel}": [_phases(kernel, number) for number in range(2)]
        for kernel in ("bzImage", "vmlinux")
    }
    return {"times": times, "phases": phases}


def _boot(command: list[str]) -> Sequence[float]:
    """Seconds from the command to its end, and to init's first line."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    output = b""
    init = 0.0
    with process:
        while data := os.read(process.stdout.fileno(), 65536):
            output += data
            if not init and MARK in output:
                init = time.monotonic() - start
            if time.monotonic() - start > ONE_BOOT:
                process.kill()
    taken = time.monotonic() - start
    if process.returncode or not init:
        text = output.decode(errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {text}")
    return taken, init


def _phases(kernel: str, number: int) -> dict[str, float]:
    """One boot with a clock at each step; seconds by step."""
    _progress(f"the steps of {kernel}, {number + 1} of 2")
    command = [sys.executable, "-m", "benchmarks.boot_phases", repr(time.monotonic())]
    taken, _ = _boot([*command, "run", kernel, "--initrd", "initrd"])
    with open("phases.json") as file:
        phases: dict[str, float] = json.load(file)
    phases["out of Python"] = taken - sum(phases.values())
    return phases


def _progress(text: str) -> None:
    print(f"progress: {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
