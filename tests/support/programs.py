"""Programs of the host's for guests: their files with the libraries they want, or compiled here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PATH = "/sbin:/usr/sbin:/bin:/usr/bin"
_SOURCES = Path(__file__).parent


def with_libraries(package: str, *names: str) -> dict[str, Path]:
    """Host programs by their place in the guest, `host/NAME`, and the libraries they want.

    The test is skipped where one is missing; `package` is what to install.
    """
    files: dict[str, Path] = {}
    for name in names:
        path = shutil.which(name, path=PATH)
        if path is None:
            pytest.skip(f"no {name} here: apt-get install {package}")
        files[f"host/{name}"] = Path(path)
        libraries = subprocess.run(["ldd", path], capture_output=True, text=True, check=True)
        for library in re.findall(r"(/\S+\.so\S*)", libraries.stdout):
            files[library.lstrip("/")] = Path(library)
    return files


def compiled(name: str, directory: Path) -> Path:
    """tests/support/NAME.c as a static program in `directory`."""
    path = directory / name
    source = _SOURCES / f"{name}.c"
    subprocess.run(["gcc", "-static", "-O1", "-o", str(path), str(source)], check=True)
    return path
