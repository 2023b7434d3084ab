"""Runs the targets that are written in Python, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.fuzz.planted import Planted

ROOT = Path(__file__).parents[2]
COPIED = ("vmm", "tests")
WITHOUT = ("corpus", "*.so.*", "results")


def copy(directory: Path) -> None:
    """Copy the sources to `directory`, for bugs to be planted in."""
    for name in COPIED:
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns(*WITHOUT))


def run(
    target: str,
    *,
    runs: int,
    seconds: float,
    seed: int = 1,
    keep: Path | None = None,
    root: Path = ROOT,
) -> tuple[int, str]:
    """Replay and generate inputs of `target` (several: with commas) with the sources in `root`; the
    exit status (0: nothing was found) and what was said. `keep`: where the input of a finding is
    written to."""
    words = [sys.executable, "-m", "tests.fuzz.engine", target, f"--seed={seed}", f"--runs={runs}"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONSAFEPATH", None)  # the sources are those of the current directory
    if keep is not None:
        environment["FUZZ_FINDING"] = str(keep)
    try:
        done = subprocess.run(
            [*words, f"--seconds={seconds}"],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=(seconds + 20) * (1 + target.count(",")) + 60,
        )
    except subprocess.TimeoutExpired:
        return 124, f"FINDING {target}: an input without an end, which holds the interpreter"
    return done.returncode, done.stderr + done.stdout


def run_with(bug: Planted, target: str, root: Path, **how: object) -> tuple[int, str]:
    """The same with `bug` planted in the copy of the sources in `root`, for this once."""
    path = root / bug.file
    before = path.read_text()
    path.write_text(bug.apply(before))
    try:
        return run(target, root=root, **how)  # type: ignore[arg-type]
    finally:
        path.write_text(before)
