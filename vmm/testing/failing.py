"""A test that fails: what its report is given, and what it leaves for a CI to keep."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmm import VmmError
from vmm.testing.look import Look

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.testing.machines import MachineFactory

MACHINES_MAX = 16
"""Machines of one test that are looked at."""
WITHIN = 20.0
"""Seconds for all of them."""
EXPECTED = (VmmError, OSError, EOFError, subprocess.SubprocessError)
"""What calls of vmm raise on purpose: where in vmm tells a test's author nothing."""

_phases: pytest.StashKey[list[tuple[str, float, float]]] = pytest.StashKey()
_count: pytest.StashKey[int] = pytest.StashKey()


def hide_frames() -> None:
    """Have tracebacks end at the test's own line, where vmm raised something on purpose.

    pytest looks for this name among a frame's globals; --full-trace shows all."""
    for name, module in list(sys.modules.items()):
        if name == "vmm" or name.startswith("vmm."):
            module.__dict__.setdefault("__tracebackhide__", _expected)


def _expected(info: pytest.ExceptionInfo[BaseException]) -> bool:
    return isinstance(info.value, EXPECTED)


def phase(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Note when a phase of `item` (setup, call, teardown) began and ended."""
    behind = time.monotonic() - time.time()
    phases = item.stash.setdefault(_phases, [])
    phases.append((str(call.when), call.start + behind, call.stop + behind))


def tell(
    item: pytest.Item,
    call: pytest.CallInfo[None],
    report: pytest.TestReport,
    factories: list[MachineFactory],
    directory: Path | None,
) -> None:
    """Add to `report` what is known of the machines, and leave it in a directory below `directory`.

    Raises nothing: whatever is wrong here is told in the report.
    """
    looks: list[Look] = []
    until = time.monotonic() + WITHIN
    left_out = 0
    for factory in factories:
        for machine in list(factory.machines):
            if len(looks) >= MACHINES_MAX or time.monotonic() > until:
                left_out += 1
                continue
            look = Look(machine, f"vmm machine {len(looks)}", factory.recorder(machine))
            looks.append(look)
            try:
                report.sections += look.sections()
            except Exception as err:
                report.sections.append((look.name, f"{type(err).__name__}: {err}"))
    if left_out:
        report.sections.append(("vmm machines", f"{left_out} more are not shown"))
    if directory is None or not looks:
        return
    number = item.stash[_count] = item.stash.get(_count, 0) + 1
    try:
        from vmm.testing.artifacts import leave

        properties = leave(
            directory, item, report, looks, item.stash.get(_phases, []), number, left_out
        )
    except Exception as err:
        report.sections.append(("vmm report", f"cannot be written: {type(err).__name__}: {err}"))
        return
    report.sections.append(("vmm report", str(dict(properties)["vmm_report"])))
    item.user_properties += properties  # JUnit takes those of the last phase
    report.user_properties += properties
