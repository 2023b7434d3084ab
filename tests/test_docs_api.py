"""docs/api.md: every public name is there."""

from __future__ import annotations

from pathlib import Path

import vmm
from tests.support import pages
from vmm.aio import AsyncMachine
from vmm.config_schema import PROPERTIES
from vmm.events import Event
from vmm.machine.exits import STATUS

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def test_every_public_name_is_on_the_page() -> None:
    text = PAGE.read_text()
    kinds = [kind.__name__ for kind in Event.__subclasses__() if kind.__module__ == "vmm.events"]
    names = {*vmm.__all__, *kinds, *STATUS} - {"__version__"}
    names |= {name for name in vars(AsyncMachine) if not name.startswith("_")} - {"config"}
    missing = {name for name in names if name not in text}
    assert missing == set(), "exported, and not on docs/api.md"


def test_the_files_on_it_use_keys_that_exist() -> None:
    import tomllib

    files = [block for block in pages.blocks(PAGE) if "file" in block.comments]
    assert files
    for block in files:
        if block.comments["file"].endswith(".toml"):
            assert tomllib.loads(block.code).keys() <= PROPERTIES.keys()
