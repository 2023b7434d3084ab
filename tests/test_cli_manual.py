"""vmm/cli/manual.py: the man page says what --help says, and man(1) can show it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from vmm.cli.manual import page
from vmm.cli.tables import parsers


@pytest.fixture(scope="module")
def shown() -> str:
    """The page as mandoc shows it, in one line."""
    program = shutil.which("mandoc")
    if program is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(
        [program, "-Tutf8", "-Owidth=400"], input=page(), capture_output=True, text=True, check=True
    )
    return " ".join(re.sub(".\b", "", done.stdout).split())


def test_it_has_no_mistake() -> None:
    program = shutil.which("mandoc")
    if program is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(
        [program, "-Tlint", "-Wwarning"], input=page(), capture_output=True, text=True, check=False
    )
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []


def test_every_option_is_shown_with_its_words(shown: str) -> None:
    for name, parser in parsers().items():
        assert f"VMM {name.upper()}" in shown and f"{parser.usage} " in shown
        assert " ".join(parser.summary.split()) in shown
        for option in parser.options:
            head = ", ".join(option.names) + parser.metavar(option)
            assert f"{head} {' '.join(option.help.split())}" in shown, (name, option.name)
        assert " ".join(parser.epilog.split()) in shown
