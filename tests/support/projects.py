"""Projects of somebody else's, whose tests boot machines: pytest in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import tiny

SMALL = """
from pathlib import Path
import pytest
from vmm.testing.kernels import kernel_at

PLACE = 0x300000

@pytest.fixture
def vmm_kernel():
    return kernel_at(Path({kernel!r}))

@pytest.fixture
def vmm_initrd(tmp_path):
    path = tmp_path / "initrd"
    path.write_bytes(b"initrd")
    return path

@pytest.fixture
def vmm_ready():
    return None
"""
"""A conftest.py for guests of a few instructions; tests are marked `agent=False`."""
MARKED = "import pytest\npytestmark = pytest.mark.vmm(memory='16M', agent=False)\n"


def new(directory: Path) -> Path:
    """A project in `directory` with nothing but a pytest configuration."""
    project = directory / "project"
    project.mkdir()
    (project / "pytest.ini").write_text("[pytest]\n")
    return project


def small(directory: Path) -> Path:
    """A project whose kernel counts at tiny.COUNTER for ever."""
    project = new(directory)
    text = SMALL.format(kernel=tiny.kernel(directory, tiny.COUNTING))
    (project / "conftest.py").write_text(text)
    return project


def write(project: Path, text: str, **values: str) -> None:
    (project / "test_it.py").write_text(text.format(**values) if values else text)


def run_pytest(
    directory: Path, *arguments: str, timeout: float = 250, **env: str
) -> subprocess.CompletedProcess[str]:
    """pytest on `directory`, as somebody else's project."""
    words = ["-p", "no:cacheprovider", "-rs", *arguments]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=directory, env={**kept, **env},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
