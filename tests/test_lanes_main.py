"""tests/lanes/__main__.py: what its last line and its exit status say."""

from __future__ import annotations

import os
import subprocess
import sys
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
