"""guest/: the bare-metal virtio driver, compiled when it changed, and run under a monitor.

The same ELF file boots by PVH under `vmm run` and under QEMU. A job is a group of NAME=NUMBER
arguments (see guest/main.c); one start of a machine carries out several and answers each with such
a group.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.native import compiled
from vmm.errors import HostError

DIRECTORY = Path(__file__).with_name("guest")
LINKER_SCRIPT = DIRECTORY / "guest.ld"
FLAGS = (
    *("-O2", "-Wall", "-Wextra", "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie"),
    *("-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none"),
    *("-fno-asynchronous-unwind-tables", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"),
    *("-Wl,-z,noexecstack", f"-Wl,-T,{LINKER_SCRIPT}"),
)
TIME_LIMIT = 120.0
NETWORK, DISK = 1, 2
"""Of a job's `test`."""

QEMU = (
    *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-m", "256M"),
    *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
    *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
)
MACHINES = {
    "mmio": ("-M", "microvm", "-global", "virtio-mmio.force-legacy=false"),
    "pci": ("-M", "pc"),
}
QEMU_DEVICE = {"mmio": "device", "pci": "pci"}
"""How the names of QEMU's virtio devices end."""
QEMU_STATUS = 1
"""What isa-debug-exit makes of 0."""

Job = Mapping[str, int]


def program() -> str:
    """Path of the ELF file."""
    return compiled("guest", sorted(DIRECTORY.iterdir()), FLAGS)


def vmm(bus: str, *options: str) -> list[str]:
    """`vmm run` of the guest with its devices over `bus`; `run` adds the jobs."""
    command = os.path.join(os.path.dirname(sys.executable), "vmm")
    return [command, "run", program(), "--transport", bus, *options, "--append"]


def qemu(bus: str, *options: str) -> list[str]:
    """The same for QEMU."""
    return [*QEMU, *MACHINES[bus], *options, "-kernel", program(), "-append"]


def run(
    command: Sequence[str], jobs: Sequence[Job], *, prefix: Sequence[str] = ()
) -> list[dict[str, int]]:
    """Have the guest do `jobs`; what it answers to each."""
    words = ["; " * bool(number) + _words(job) for number, job in enumerate(jobs)]
    whole = [*prefix, *command, " ".join(words)]
    try:
        done = subprocess.run(
            whole,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIME_LIMIT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{command[0]}: the bench guest did not end: {error}") from None
    answers = [
        {name: int(value) for name, _, value in map(_parts, line.split()[1:])}
        for line in done.stdout.splitlines()
        if line.startswith("result ")
    ]
    expected = QEMU_STATUS if command[0] == QEMU[0] else 0
    if done.returncode != expected or len(answers) != len(jobs):
        raise HostError(
            f"{' '.join(whole)} ended with {done.returncode}: {done.stdout} {done.stderr}".strip()
        )
    return answers


def _words(job: Job) -> str:
    return " ".join(f"{name}={value}" for name, value in job.items())


def _parts(word: str) -> tuple[str, str, str]:
    return word.partition("=")
