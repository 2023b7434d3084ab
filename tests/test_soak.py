"""`make soak` in short: every kind of cycle once, a small crowd, and the soak's own verdict."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import figures
from tests.soak.figures import growth

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


def soak(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """A soak in a process of its own: what is left of other tests does not count."""
    run = f"import sys; from tests.soak import __main__ as soak\n{code}\n"
    run += "sys.exit(soak.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", run, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.timeout(300)
def test_nothing_is_left_of_any_cycle() -> None:
    done = soak("--minutes", "0.05", "--cycles", "1", "--machines", "20", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "soak: flat: " in done.stdout


LEAKS = {
    "descriptors": "os.open('/dev/null', os.O_RDONLY)",
    "threads": "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
    "children": "left.append(subprocess.Popen(['/bin/sleep', '60']))",
    "files": "tempfile.mkdtemp()",
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_leak_is_found(what: str) -> None:
    """Of a cycle that leaves something."""
    code = f"""
import os, subprocess, tempfile, threading, time
left = []
done = []
def leaks(path, rng):
    done.append(0)
    if len(done) > soak.WARM_UP:
        {LEAKS[what]}
soak.available = lambda: [leaks]
soak.PATIENCE = 0.1
soak.Soak._crowd = lambda self: None
import atexit
atexit.register(lambda: [(each.kill(), each.wait()) for each in left])
"""
    done = soak("--minutes", "0", "--cycles", "5", code=code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "soak: FAILED" in done.stdout
    assert "not as at the begin" in done.stdout


def test_a_cycle_that_fails_is_told() -> None:
    code = """
def breaks(path, rng):
    raise ValueError("a bug")
soak.available = lambda: [breaks]
soak.Soak._crowd = lambda self: None
"""
    done = soak("--minutes", "0", "--cycles", "5", "--seed", "77", code=code)
    assert done.returncode == 1
    assert "breaks (seed 77)" in done.stdout
    assert "ValueError: a bug" in done.stdout


def test_memory_that_grows_is_seen_in_noise() -> None:
    rng = random.Random(1)
    flat = [50 * MIB + rng.randrange(2 * MIB) for _ in range(400)]
    assert abs(growth(flat)) < 4096
    assert growth([each + 20000 * n for n, each in enumerate(flat)]) == pytest.approx(
        20000, rel=0.2
    )
    assert growth([1, 2]) == 0


def test_the_figures_see_what_there_is(tmp_path: Path) -> None:
    before = figures.take(tmp_path)
    fd = os.open("/dev/null", os.O_RDONLY)
    (tmp_path / "a").touch()
    try:
        now = figures.take(tmp_path)
    finally:
        os.close(fd)
    assert now.descriptors == before.descriptors + 1
    assert now.files == before.files + 1
