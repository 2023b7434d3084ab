"""vmm/__init__.py: the public names, and what importing them costs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import vmm

NOT_AT_START = (
    *("argparse", "asyncio", "dataclasses", "enum", "inspect", "json", "logging", "pathlib"),
    *("re", "subprocess", "typing"),
)
"""Modules that cost more to import than a machine takes to start (docs/architecture.md)."""


@pytest.mark.parametrize("name", vmm.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(vmm, name) is not None
    if name in ("errors", "events", "faults"):
        assert getattr(vmm, name).__name__ == f"vmm.{name}"
    elif name != "__version__":
        assert getattr(vmm, name).__name__ == name


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vmm' has no attribute 'Machines'"):
        vmm.Machines  # noqa: B018


def test_the_version_is_the_packages() -> None:
    assert importlib.metadata.version("vmm-kvm") == vmm.__version__


def loaded_after(statement: str) -> set[str]:
    """Modules loaded by `statement` that a bare interpreter has not loaded."""
    code = (
        f"import sys; before = set(sys.modules); {statement}; "
        "print(*sorted(set(sys.modules) - before))"
    )
    # -S, -I: no site packages, whose .pth files may import what they like.
    path = f"import sys; sys.path[:0] = {sys.path!r}; "
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", path + code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_vmm_loads_nothing_else() -> None:
    assert {name for name in loaded_after("import vmm") if name != "__future__"} == {"vmm"}


@pytest.mark.parametrize(
    "statement",
    [
        "import vmm; vmm.Machine, vmm.MachineConfig, vmm.UsageError",
        "from vmm.cli import run, arguments, say, supervise",
        "import vmm.boot, vmm.boot.registers, vmm.cpu, vmm.machine.platform, vmm.tables.acpi",
    ],
)
def test_a_start_loads_no_costly_module(statement: str) -> None:
    assert loaded_after(statement) & set(NOT_AT_START) == set()
