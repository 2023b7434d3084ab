"""README and docs/ beside the parsers: each option is in a page, and a page has no other."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from vmm.block.drive import FLAGS, KEYS, LIMITS
from vmm.cli import COMMANDS, USAGE, run
from vmm.cli.arguments import Option, Parser
from vmm.net.config import KINDS

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
FOREIGN = "other-tools.md"
"""The page of other programs' options; tests/test_cli_foreign.py has it."""
OTHERS = {
    "--path",  # of python -m vmm.testing.kernels
    "--linux", "--spoil",  # of make soak
    "--vmm-kernel", "--vmm-require", "--vmm-artifacts",  # of the pytest plugin
    "--reruns", "--pdb", "--full-trace", "--junit-xml",  # of pytest
    "--reload-rules", "--name-match",  # of udevadm
    "--no-install-recommends",  # of apt-get
    "--landlock",  # of cloud-hypervisor
    "--target", "--minutes", "--corpus", "--list", "--planted",  # of python -m tests.fuzz
    "--machines", "--cycles", "--seed",  # of python -m tests.soak
}  # fmt: skip
"""Options of other programs in the pages."""
NAME = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def parser(command: str) -> Parser:
    found = import_module(f"vmm.cli.{command}").PARSER
    assert isinstance(found, Parser)
    return found


OPTIONS = {name for command in COMMANDS for option in parser(command).options
           for name in option.names}  # fmt: skip


def named(text: str) -> set[str]:
    return set(NAME.findall(text))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_is_in_a_page(command: str) -> None:
    text = "\n".join(text for name, text in PAGES.items() if name != FOREIGN)
    missing = {option.name for option in parser(command).options} - named(text)
    assert missing == set()
    assert f"vmm {command}" in text and f"vmm {command}" in USAGE


@pytest.mark.parametrize("name", sorted(PAGES.keys() - {FOREIGN}))
def test_a_page_has_no_option_that_is_not(name: str) -> None:
    assert named(PAGES[name]) - OPTIONS - OTHERS == set()


def test_help_and_messages_name_no_option_that_is_not() -> None:
    text = USAGE + "".join(parser(command).help_text() for command in COMMANDS)
    assert named(text) - OPTIONS == set()


def rows() -> dict[str, tuple[str, str]]:
    """README's table of `vmm run`: the option, with what is said of it and its default."""
    found = {}
    for line in PAGES["README.md"].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith(("| `--", "| `-v`")) and len(cells) >= 2:
            default = cells[2] if len(cells) > 2 else ""
            found[sorted(named(cells[0]))[0]] = (line, default.strip("` |"))
    return found


@pytest.mark.parametrize("option", run.PARSER.options[:-1], ids=lambda option: option.name)
def test_the_table_of_the_readme(option: Option) -> None:
    """Its value's name and its default are those of --help."""
    line, default = rows()[option.name]
    if option.default:
        assert default == option.default
    else:
        assert default in ("none", "", "ACPI")
    values = option.metavar.split(",")[0]
    assert values.partition("=")[0] in line or option.name == "--vsock"
    assert ("repeatable" in line or "several" in line) == option.repeat


def test_the_table_has_no_row_too_many() -> None:
    assert rows().keys() <= {option.name for option in run.PARSER.options}


def test_the_keys_of_disks_and_cards() -> None:
    """README names each key, and --help those that it has room for exist."""
    disk, card = rows()["--drive"][0], rows()["--net"][0]
    for key in FLAGS + KEYS + LIMITS:
        assert re.search(rf"\b{key}\b", disk), key
    for key in {key for keys in KINDS.values() for key in keys}:
        if key.startswith("tx-"):
            assert "`,tx-...`" in card
        else:
            assert re.search(rf"\b{key}\b", card), key
    helps = {option.name: option.help for option in run.PARSER.options}
    keys = set(re.findall(r",([a-z-]+)", helps["--drive"]))
    assert keys <= {*FLAGS, *KEYS, *LIMITS}
    keys = set(re.findall(r" ,([a-z-]+)", helps["--net"]))
    assert keys <= {key for keys in KINDS.values() for key in keys}
