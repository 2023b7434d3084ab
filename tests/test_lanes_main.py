"""tests/lanes/__main__.py: what its last line and its exit status say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.lanes.nested import ROOT

MIXED = """
import pytest
def test_one(): pass
def test_two(): pass
def test_bad(): assert 0
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
@pytest.mark.skip
def test_skipped(): pass
"""


def lanes(tmp_path: Path, tests: str, **env: str) -> tuple[int, list[str]]:
    (tmp_path / "test_sample.py").write_text(tests)
    done = subprocess.run(
        [sys.executable, "-m", "tests.lanes", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "VMM_SKIP_LANES": "nested", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_the_last_line_counts_failures_and_errors(tmp_path: Path) -> None:
    status, lines = lanes(tmp_path, MIXED)
    assert lines[-1] == "2 passed, 2 failed, 1 skipped"
    assert status == 1
    failed = [line for line in lines if line.startswith("native lane FAILED: ")]
    assert [line.split("::")[1] for line in failed] == [
        "test_bad: assert 0", 'test_error: failed on setup with "ValueError"',
    ]  # fmt: skip


def test_success_is_status_0_and_a_lane_left_out_is_said(tmp_path: Path) -> None:
    status, lines = lanes(tmp_path, "def test_one(): pass")
    assert (status, lines[-1]) == (0, "1 passed, 0 failed, 0 skipped")


@pytest.mark.parametrize(
    "tests", ["import nothing_of_that_name", "def test_x(:", "import os; os._exit(0)"]
)
def test_tests_that_do_not_run_are_a_failure(tmp_path: Path, tests: str) -> None:
    status, lines = lanes(tmp_path, tests)
    assert (status, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")


def test_an_unknown_lane_is_refused(tmp_path: Path) -> None:
    status, lines = lanes(tmp_path, "", VMM_SKIP_LANES="nestet")
    assert status == 2
    assert lines == ["lanes: VMM_SKIP_LANES: nestet: the lanes are native and nested"]


FAULTS = """
import os, sys, pytest
pytestmark = pytest.mark.needs_kvm
def test_before(): pass
@pytest.mark.skip
def test_skipped(): pass
def test_crash():
    if not any("--deselect" in word for word in sys.argv):
        open("/proc/sysrq-trigger", "w").write("c")
def test_triple_fault():
    if not os.path.exists("/tmp/once"):
        open("/tmp/once", "w").close()
        assert 0, "vCPU 1: triple fault at 0xfffffff0"
def test_bad(): assert 0, "something else"
"""


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64")
def test_faults_of_the_emulator_are_told_of_and_tried_again() -> None:
    # Within the clone, which the lane has, and the conftest.py of its tests.
    with tempfile.TemporaryDirectory(dir=ROOT / "tests", prefix=".sample-") as directory:
        status, lines = lanes(Path(directory), FAULTS, VMM_SKIP_LANES="native")
    text = "\n".join(lines)
    assert "the emulated machine ended by itself" in text
    assert text.count("test_before PASSED") == 1
    assert text.count("test_bad FAILED") == 1  # not tried again
    assert "nested lane: 3 passed, 1 failed, 1 skipped" in text
    assert "nested lane: 2 RERUN for faults of the emulated processor" in text
    assert status == 1
