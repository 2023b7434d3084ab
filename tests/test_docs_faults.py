"""docs/faults.md: every snippet runs and prints what it says, and every fault is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import pages
from vmm.faults import Faults
from vmm.faults.disk import DiskFaults
from vmm.faults.net import NetFaults

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.timeout(330)
@pytest.mark.parametrize("snippet", pages.snippets(PAGE), ids=str)
def test_snippet(snippet: pages.Snippet, tmp_path: Path) -> None:
    pages.run(snippet, tmp_path)


def test_every_fault_is_on_the_page() -> None:
    text = PAGE.read_text()
    names = {name for kind in (Faults, DiskFaults, NetFaults) for name in vars(kind)}
    inner = {"cut", "write_cut", "write_log", "close", "tell", "is_volatile", "device"}
    missing = {name for name in names - inner if not name.startswith("_") and name not in text}
    assert missing == set()
