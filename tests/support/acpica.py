"""ACPICA's tools (acpica-tools) on tables of ours: the implementation Linux itself has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SUSPICIOUS = re.compile(
    r"error|warning|remark|invalid|unknown|unexpected|could not|failed|bad |truncat|overrun", re.I
)


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (apt install acpica-tools)")
    return path


def disassemble(directory: Path, name: str, table: bytes) -> str:
    """The table's source, as `iasl -d` tells it; fails at anything it says is wrong."""
    (directory / f"{name}.aml").write_bytes(table)
    said = iasl(directory, "-d", f"{name}.aml")
    assert not SUSPICIOUS.search(said), said
    return (directory / f"{name}.dsl").read_text()


def recompile(directory: Path, name: str) -> bytes:
    """What `iasl` makes of the source `name`.dsl, with 0 errors, warnings and remarks."""
    # -oa: no optimizations, so that the result can be compared. The prefix ends at a dot.
    said = iasl(directory, "-oa", "-we", "-p", f"again-{name}", f"{name}.dsl")
    assert "0 Errors, 0 Warnings, 0 Remarks" in said, said
    return (directory / f"again-{name}.aml").read_bytes()


def iasl(directory: Path, *arguments: str) -> str:
    """What `iasl` says when it succeeds."""
    done = subprocess.run(
        [tool("iasl"), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def execute(directory: Path, dsdt: bytes, commands: str, *options: str) -> str:
    """The output of `commands` in ACPICA's interpreter, which has loaded `dsdt`."""
    path = directory / "dsdt.aml"
    path.write_bytes(dsdt)
    done = subprocess.run(
        [tool("acpiexec"), *options, "-b", commands, str(path)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
