"""Row d: Debian's cloud kernel from the command to init and out, in the nested lane.

This host's side: it starts the lane, boot_inside runs there. On hosts without VT-x or AMD-V the
lane is where stock Linux boots; all monitors are emulated alike there.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.series import Progress, Series
from tests.lanes.nested import NestedLane
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
        answer = _ask_lane(scratch, progress)
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


def _ask_lane(scratch: str, progress: Progress) -> Answer:
    said: list[str] = []
    held = b""

    def hear(data: bytes) -> None:
        nonlocal held
        *lines, held = (held + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            if text.startswith("progress: "):
                progress(f"boot: {text.removeprefix('progress: ')}")
            else:
                said.append(text)

    progress("boot: starting the nested lane")
    with NestedLane(log=lambda text: None) as lane:
        command = [sys.executable, "-m", "benchmarks.boot_inside", scratch, str(REPETITIONS)]
        status = lane.run(command, output=hear, timeout=TIME_LIMIT)
    if status or not said:
        raise HostError("boot: the nested lane's part failed:\n" + "\n".join(said[-20:]))
    return Answer(**json.loads(said[-1]))
