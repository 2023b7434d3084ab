"""tests/lanes/emulator.py: the installed QEMU, and what a lane of it does with interrupts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lanes import emulator
from tests.lanes.nested import RESULTS, NestedLane
from vmm.testing import initrds
from vmm.testing.kernels import Kernel

QEMU = Path(shutil.which("qemu-system-x86_64") or "/nonexistent")
pytestmark = pytest.mark.skipif(not QEMU.exists(), reason="no qemu-system-x86_64")


def version(program: Path) -> str:
    command = [program, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def mended(tmp_path: Path) -> Path:
    if "version 7.2." not in version(QEMU):
        pytest.skip("not the QEMU that has the fault")
    program = emulator.mended(QEMU, tmp_path / "qemu")
    assert program is not None
    return program


def test_one_instruction_is_replaced(mended: Path) -> None:
    before, after = QEMU.read_bytes(), mended.read_bytes()
    assert len(before) == len(after)
    pages = range(0, len(before), 4096)
    page = next(at for at in pages if before[at : at + 4096] != after[at : at + 4096])
    changed = [at for at in range(page, page + 8192) if before[at : at + 1] != after[at : at + 1]]
    assert len(changed) == changed[-1] - changed[0] + 1 == 6
    assert before[page + 8192 :] == after[page + 8192 :]
    assert version(mended) == version(QEMU)


def test_what_is_not_recognised_is_left_alone(mended: Path, tmp_path: Path) -> None:
    again = mended.read_bytes()
    assert emulator.mend(again) is None
    assert emulator.mend(QEMU.read_bytes() * 2) is None  # found twice
    assert emulator.mended(mended, tmp_path / "again") is None
    assert not (tmp_path / "again").exists()


@pytest.mark.timeout(900)
def test_guests_do_not_hang_where_qemu_kicks_its_processors(cloud_kernel: Kernel) -> None:
    """Ten times a second, one thread serves them all: without the mend the first guest hung."""
    run = [sys.executable, "-m", "vmm", "run", str(cloud_kernel.vmlinux()), "--cpus", "4"]
    run += ["--append", "quiet", "--timeout", "400", "--initrd", f"{RESULTS}/initrd.img"]
    heard = bytearray()
    with NestedLane(memory=1024) as lane:
        initrds.build("echo processors: $(nproc)\n").write(lane.results / "initrd.img")
        assert lane.run(run, output=heard.extend, timeout=800) == 0, heard
    assert b"processors: 4" in heard
