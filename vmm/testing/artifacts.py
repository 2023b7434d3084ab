"""What a failing test leaves in a directory of its own, for a CI to keep.

    report.html              all of it on one axis, see `vmm.testing.page`
    machine-0.console.log    what the machine printed, as it was
    machine-0.events.jsonl   its events and the calls on it, a JSON object a line, with the times of
                             CLOCK_MONOTONIC; the first line is about the machine
    machine-0.registers.txt  the registers of its vCPUs, or its failure report

A test that fails more than once (subtests, an error after it) leaves report-2.html and so on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pytest

    from vmm.testing.look import Look

NAME_MAX = 100
REPORTS_MAX = 20
"""Reports of one test."""
DIRECTORIES_MAX = 500
"""Failing tests that leave something in one directory."""


def leave(
    base: Path,
    item: pytest.Item,
    report: pytest.TestReport,
    looks: list[Look],
    phases: list[tuple[str, float, float]],
    number: int,
    left_out: int,
) -> list[tuple[str, object]]:
    """Write the files of a failure, the `number`-th of `item`; properties for JUnit.

    Raises:
        OSError: they cannot be written.
    """
    from vmm.testing import page

    if number > REPORTS_MAX:
        raise OSError(f"it has left {REPORTS_MAX} reports already")
    directory = _directory(base, item)
    suffix = f"-{number}" if number > 1 else ""
    properties: list[tuple[str, object]] = []
    for at, look in enumerate(looks):
        stem = f"machine-{at}{suffix}"
        recorder = look.recorder
        console = recorder.console() if recorder else look.console.encode("utf-8", "replace")
        (directory / f"{stem}.console.log").write_bytes(console)
        (directory / f"{stem}.events.jsonl").write_text(_events(look), encoding="utf-8")
        (directory / f"{stem}.registers.txt").write_text(look.registers + "\n", encoding="utf-8")
        properties.append((f"vmm_machine_{at}", look.state))
    path = directory / f"report{suffix}.html"
    path.write_text(page.render(item, report, looks, phases, left_out), encoding="utf-8")
    return [("vmm_report", os.fspath(path)), *properties]


def _directory(base: Path, item: pytest.Item) -> Path:
    """A directory below `base` for `item`, made; its name is safe whatever a parameter's is."""
    name = re.sub(r"[^A-Za-z0-9_.\[\]-]+", "-", item.nodeid.replace("::", "-"))
    name = re.sub(r"\.\.+|-\.?-+", "-", name).strip(".-")
    if name != item.nodeid.replace("::", "-").replace("/", "-") or len(name) > NAME_MAX:
        mark = hashlib.sha256(item.nodeid.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        name = f"{name[-NAME_MAX:].strip('.-')}-{mark}"
    run = int(getattr(item, "execution_count", 1))
    if run > 1:  # pytest-rerunfailures
        name += f"-run{run}"
    directory = base / name
    if not directory.is_dir():
        base.mkdir(parents=True, exist_ok=True)
        if sum(1 for _ in os.scandir(base)) >= DIRECTORIES_MAX:
            raise OSError(f"{base} has those of {DIRECTORIES_MAX} tests already")
        directory.mkdir(exist_ok=True)
    return directory


def _events(look: Look) -> str:
    recorder = look.recorder
    first = {
        "event": "machine", "time": recorder.marks["asked"] if recorder else look.time,
        "state": look.state, "looked_at": look.time,
        "marks": recorder.marks if recorder else {}, "config": config_of(look),
    }  # fmt: skip
    rows = [event.to_dict() for event in look.events]
    rows += [call.to_dict() for call in recorder.calls] if recorder else []
    rows.sort(key=lambda row: float(str(row["time"])))
    return "".join(json.dumps(row, default=str) + "\n" for row in [first, *rows])


def config_of(look: Look) -> dict[str, object]:
    """The machine's configuration, as far as it is plain."""
    config = look.machine.config
    try:
        return dict(config.to_dict())
    except Exception:  # a device of the test's own, which has no text
        return {"kernel": str(config.kernel), "memory": config.memory, "cpus": config.cpus}
