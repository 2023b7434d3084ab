"""Row d: Debian's cloud kernel from the command to init and out.

boot_inside does it: on this host if its KVM runs stock Linux, else in the nested lane, where all
monitors are emulated alike.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.series import Progress, Series
from tests.lanes.nested import ROOT, NestedLane
from tests.support import host
from vmm.errors import HostError
from vmm.testing import initrds
from vmm.testing.kernels import cache_directory, debian_kernel

REPETITIONS = 3
TIME_LIMIT = 900.0
MARK = "bench: init runs"
REFERENCE = "QEMU microvm, vmlinux"


def measure(progress: Progress) -> list[Series]:
    """vmm run and QEMU on the same bzImage, ELF and initrd; and what our time goes into."""
    kernel = debian_kernel("cloud-amd64")
    # Not below /tmp, which in the lane is another file system.
    home = cache_directory() / "bench"
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="boot-") as scratch:
        shutil.copy(kernel.vmlinuz, f"{scratch}/bzImage")
        shutil.copy(kernel.vmlinux(), f"{scratch}/vmlinux")
        initrds.build(f"echo '{MARK}'").write(Path(scratch) / "initrd")
        answer = _boot(scratch, progress)
    rows = []
    for index, comparison in enumerate(("command to init and out", "command to init")):
        for name, samples in answer.times.items():
            taken = [sample[index] for sample in samples]
            rows.append(Series("d", comparison, name, "s", name == REFERENCE, "", taken))
    for name, runs in answer.phases.items():
        for phase in runs[0]:
            taken = [run[phase] for run in runs]
            rows.append(Series("d", f"where {name} spends it", phase, "s", False, "", taken))
    return rows


@dataclass
class Answer:
    """What boot_inside prints: samples of (seconds to the end, to init), and seconds by step."""

    times: dict[str, list[list[float]]]
    phases: dict[str, list[dict[str, float]]]


class Listener:
    """Takes boot_inside's output: lines of progress, and the rest."""

    def __init__(self, progress: Progress) -> None:
        self.said: list[str] = []
        self._progress = progress
        self._held = b""

    def hear(self, data: bytes) -> None:
        *lines, self._held = (self._held + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            if text.startswith("progress: "):
                self._progress(f"boot: {text.removeprefix('progress: ')}")
            else:
                self.said.append(text)


def _boot(scratch: str, progress: Progress) -> Answer:
    listener = Listener(progress)
    command = [sys.executable, "-m", "benchmarks.boot_inside", scratch, str(REPETITIONS)]
    if host.runs_linux():
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                listener.hear(line)
        status = process.returncode
    else:
        progress("boot: starting the nested lane")
        with NestedLane(log=lambda text: None) as lane:
            status = lane.run(command, output=listener.hear, timeout=TIME_LIMIT)
    if status or not listener.said:
        raise HostError("boot: no boot was measured:\n" + "\n".join(listener.said[-20:]))
    return Answer(**json.loads(listener.said[-1]))
