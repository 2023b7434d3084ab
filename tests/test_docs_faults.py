"""docs/faults.md: every fault is there."""

from __future__ import annotations

from pathlib import Path

from vmm.faults import Faults
from vmm.faults.disk import DiskFaults
from vmm.faults.net import NetFaults

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"


def test_every_fault_is_on_the_page() -> None:
    text = PAGE.read_text()
    names = {name for kind in (Faults, DiskFaults, NetFaults) for name in vars(kind)}
    inner = {"cut", "write_cut", "write_log", "close", "tell", "is_volatile", "device"}
    missing = {name for name in names - inner if not name.startswith("_") and name not in text}
    assert missing == set()
