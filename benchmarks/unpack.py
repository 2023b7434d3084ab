"""Row u: a Debian kernel brought into guest memory, its payload unpacked or from the cache."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from unittest import mock

from benchmarks.series import Progress, Series, interleave
from vmm.boot.loader import load
from vmm.layout import MIB
from vmm.memory import GuestMemory
from vmm.testing.kernels import debian_kernel

REPETITIONS = 9
MEMORY = 256 * MIB


def measure(progress: Progress) -> list[Series]:
    """CPU time of `load` for the full kernel (XZ) and the cloud kernel (LZ4)."""
    full, cloud = debian_kernel("amd64"), debian_kernel("cloud-amd64")
    with tempfile.TemporaryDirectory(prefix="vmm-bench-") as scratch:
        contenders: dict[str, Callable[[], Sequence[float]]] = {
            "XZ, unpacked": lambda: [_load(str(full.vmlinuz), scratch, "0")],
            "XZ, from the cache": lambda: [_load(str(full.vmlinuz), scratch, "1G")],
            "LZ4, cache off": lambda: [_load(str(cloud.vmlinuz), scratch, "0")],
            "LZ4, cache on": lambda: [_load(str(cloud.vmlinuz), scratch, "1G")],
        }
        results = interleave(contenders, REPETITIONS, progress, "unpack", warm_up=1)
    return [
        Series(
            "u",
            "Debian kernel into guest memory, CPU",
            name,
            "ms",
            reference=name == "XZ, unpacked",
            samples=[sample[0] for sample in samples],
        )
        for name, samples in results.items()
    ]


def _load(kernel: str, directory: str, limit: str) -> float:
    memory = GuestMemory(MEMORY)
    try:
        with mock.patch.dict(os.environ, VMM_CACHE=directory, VMM_KERNEL_CACHE=limit):
            start = time.process_time()
            load(memory, kernel, [], "")
            return (time.process_time() - start) * 1e3
    finally:
        memory.close()
