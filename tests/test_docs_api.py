"""docs/api.md: every snippet runs and prints what it says, and every public name is there."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmm
from tests.support import pages
from vmm.aio import AsyncMachine
from vmm.config_schema import PROPERTIES
from vmm.events import Event
from vmm.machine.exits import STATUS

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
SNIPPETS = pages.snippets(PAGE)
README = pages.snippets(Path(__file__).parents[1] / "README.md")


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.timeout(330)
@pytest.mark.parametrize("snippet", [*SNIPPETS, *README], ids=str)
def test_snippet(snippet: pages.Snippet, tmp_path: Path) -> None:
    pages.run(snippet, tmp_path)


def test_there_are_snippets_of_all_kinds() -> None:
    assert {snippet.language for snippet in SNIPPETS} == {"python", "sh"}
    assert sum(snippet.prints is not None for snippet in SNIPPETS) >= 6
    assert any(snippet.files for snippet in SNIPPETS)


def test_every_public_name_is_on_the_page() -> None:
    text = PAGE.read_text()
    kinds = [kind.__name__ for kind in Event.__subclasses__() if kind.__module__ == "vmm.events"]
    names = {*vmm.__all__, *kinds, *STATUS} - {"__version__"}
    names |= {name for name in vars(AsyncMachine) if not name.startswith("_")} - {"config"}
    missing = {name for name in names if name not in text}
    assert missing == set(), "exported, and not on docs/api.md"


def test_the_files_on_it_use_keys_that_exist() -> None:
    import tomllib

    for snippet in SNIPPETS:
        for name, content in snippet.files.items():
            if name.endswith(".toml"):
                assert tomllib.loads(content).keys() <= PROPERTIES.keys()
