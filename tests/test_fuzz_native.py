"""The C path of virtqueues under sanitizers: a seeded run, and planted bugs that it must find.

`make fuzz` does the same for hours, with libFuzzer; see tests/fuzz.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.fuzz import native
from tests.fuzz.planted import Planted
from tests.fuzz.planted_native import PLANTED

RUNS = {"rings": 150_000, "frames": 8_000, "requests": 20_000}
"""Inputs of a seeded run: some seconds each."""
TO_FIND = {"rings": 800_000, "frames": 40_000, "requests": 60_000}
"""Inputs within which a planted bug must be found; most are within a hundredth of them."""
SECONDS = 120
"""Only the end of a hang."""
QUICK = (
    "region end", "head bound by one", "loops", "indirect length", "descriptor read twice",
    "too many available", "used unmasked", "interrupt event", "sector overflow",
    "header read twice", "status size", "spill bound", "spill longer than it is",
    "window compaction: none", "window compaction: buffers stay",
    "window compaction: count of chains", "window room", "hold order", "filter's tag",
)  # fmt: skip
CHOSEN = [
    bug for bug in PLANTED if bug.name in QUICK or os.environ.get("VMM_FUZZ_PLANTED") == "all"
]

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the objects of the harness and of the C path."""
    directory = tmp_path_factory.mktemp("native")
    try:
        native.objects(directory)
        native.harness(directory)
    except native.BuildError as err:
        if "asan" in str(err) or "ubsan" in str(err):
            pytest.skip(f"gcc has no sanitizers here: {err}")
        raise
    return directory


@pytest.mark.parametrize("target", native.TARGETS)
def test_a_seeded_run_finds_nothing(target: str, built: Path) -> None:
    program = native.link(target, built)
    status, said = native.run(program, target, runs=RUNS[target], seconds=SECONDS)
    assert status == 0, said
    assert f"{RUNS[target]} made" in said  # all of them, not what time was left for


@pytest.mark.parametrize("bug", CHOSEN, ids=str)
def test_a_planted_bug_is_found(bug: Planted, built: Path, tmp_path: Path) -> None:
    native.build_with(bug, tmp_path)
    for target in bug.by:
        program = native.link(target, built, tmp_path)
        keep = tmp_path / f"finding-{target}"
        status, said = native.run(program, target, runs=TO_FIND[target], seconds=SECONDS, keep=keep)
        assert status != 0, f"{target} did not find it: {said}"
        assert any(word in said for word in native.FOUND), said
        assert keep.stat().st_size, "the input is kept"


def test_inputs_are_the_same_for_a_seed(built: Path, tmp_path: Path) -> None:
    program = native.link("requests", built)
    last = []
    for seed in (7, 7, 8):
        keep = tmp_path / "kept"  # the last input, where nothing is found
        native.run(program, "requests", runs=100, seconds=SECONDS, seed=seed, keep=keep)
        last.append(keep.read_bytes())
    assert last[0] == last[1] != last[2]


def test_the_quick_ones_are_of_the_table() -> None:
    assert set(QUICK) <= {bug.name for bug in PLANTED}
    assert len({bug.name for bug in PLANTED}) == len(PLANTED)
