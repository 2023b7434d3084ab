"""The wheel of this clone, and a venv with it that anybody may use, for tools/stranger."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "/usr/bin/python3"
VENV = "VMM_STRANGER_VENV"
"""Names a venv that was made on the host, where this lane has no network to make one."""


def build_wheel(out: Path) -> Path:
    """A wheel of the clone as it is, in `out`."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, ROOT],
        check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def make_venv() -> Path:
    """A directory under /var/tmp, which every lane sees, with `venv` in it; the caller removes it.

    Raises:
        OSError, subprocess.CalledProcessError: it cannot be made.
    """
    place = Path(tempfile.mkdtemp(prefix="vmm-stranger-venv-", dir="/var/tmp"))
    try:
        place.chmod(0o755)
        wheel = build_wheel(place)
        quiet = {"check": True, "stdin": subprocess.DEVNULL, "capture_output": True}
        subprocess.run([PYTHON, "-m", "venv", place / "venv"], **quiet)  # type: ignore[call-overload]
        pip = [place / "venv/bin/pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, f"{wheel}[full]", "pytest"], **quiet)  # type: ignore[call-overload]
        compiled = [place / "venv/bin/python", "-m", "compileall", "-q", place / "venv/lib"]
        subprocess.run(compiled, check=False, capture_output=True)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return place


def arguments(directory: Path) -> list[str]:
    """What tools/stranger is told of where vmm comes from."""
    ready = os.environ.get(VENV)
    return ["--venv", ready] if ready else ["--wheel", str(build_wheel(directory))]
