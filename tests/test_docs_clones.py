"""docs/clones.md: every snippet runs and prints what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import pages

SNIPPETS = pages.snippets(Path(__file__).parents[1] / "docs" / "clones.md")


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.timeout(330)
@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_snippet(snippet: pages.Snippet, tmp_path: Path) -> None:
    pages.run(snippet, tmp_path)


def test_both_are_there() -> None:
    assert len(SNIPPETS) == 2
