"""examples/replay_entropy.py: the device alone, and under Linux's own driver."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.replay_entropy import ReplayEntropy
from tests.support.virtio_driver import BUFFERS, Driver
from vmm.testing.kernels import Kernel

EXAMPLE = Path(__file__).parents[1] / "examples" / "replay_entropy.py"


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 50


@pytest.mark.parametrize("size", [1, 7, 10, 25, 100])
def test_the_file_comes_over_and_over(size: int) -> None:
    with Driver(ReplayEntropy(b"0123456789")) as driver:
        got = b""
        for _ in range(20):
            driver.rings[0].add([(BUFFERS, size, True)])
            driver.kick()
            assert driver.rings[0].used()[0][1] == size
            got += driver.memory.read(BUFFERS, size)
        assert got == (b"0123456789" * (2 * size))[: 20 * size]


@pytest.mark.needs_linux_kvm
@pytest.mark.timeout(200)
def test_linux_reads_it(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "entropy").write_text("replayed again and again\n")
    initrd = make_initrd(
        "cat /sys/class/misc/hw_random/rng_current; head -c 2000 /dev/hwrng > /tmp/x;"
        "echo lines: $(grep -ac '^replayed again and again$' /tmp/x)",
        kernel=cloud_kernel,
        modules=["virtio_mmio", "virtio_rng"],
    )
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path / "entropy"), str(cloud_kernel.vmlinuz),
         str(initrd)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "virtio_rng.0" in done.stdout
    # The kernel takes some for itself in between: whole lines are what is sure.
    assert int(done.stdout.split("lines: ")[1].split()[0]) > 40
