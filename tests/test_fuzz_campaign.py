"""`make fuzz` (tests/fuzz/__main__.py): its options, and what becomes of a finding."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import campaign, native, parsers, targets
from tests.fuzz.planted_parsers import PLANTED


def fuzz(*words: str, root: Path = parsers.ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *words],
        cwd=root, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_every_target_is_listed() -> None:
    assert fuzz("--list").stdout.split() == campaign.names()
    assert len(set(campaign.names())) == len(campaign.names())
    assert set(native.TARGETS) | set(targets.names()) == set(campaign.names())


def test_wrong_usage() -> None:
    for words in (["--target", "nobody"], ["--minutes", "x"], ["--burn"]):
        done = fuzz(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done


def test_planted_bugs_of_a_target() -> None:
    done = fuzz("--planted", "--target", "index")
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert sum("index found it" in line for line in lines) == 2, done
    assert lines[-1] == "fuzz: 0 planted bugs were missed"


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
def test_a_finding_is_kept_and_told(tmp_path: Path) -> None:
    root, corpus = tmp_path / "root", tmp_path / "corpus"
    parsers.copy(root)
    bug = next(bug for bug in PLANTED if bug.name == "index: runs past the end")
    path = root / bug.file
    before = path.read_text()
    words = ["--target", "index", "--minutes", "0.5", "--corpus", str(corpus)]
    path.write_text(bug.apply(before))
    done = fuzz(*words, root=root)
    assert done.returncode == 1, done
    [kept] = corpus.glob("index-finding-*")
    assert f"fuzz: index: FINDING, its input is {kept}" in done.stdout
    assert "AssertionError" in done.stdout
    engine = [sys.executable, "-m", "tests.fuzz.engine", "index"]
    assert subprocess.run([*engine, str(kept)], cwd=root, check=False).returncode == 1
    path.write_text(before)
    assert subprocess.run([*engine, str(kept)], cwd=root, check=False).returncode == 0
