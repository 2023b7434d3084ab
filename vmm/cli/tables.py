"""Files made from the tables of options: man page and shells' completions (hatch_build.py)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.cli.arguments import Parser

SHARE = {
    "bash": "bash-completion/completions/vmm",
    "zsh": "zsh/site-functions/_vmm",
    "fish": "fish/vendor_completions.d/vmm.fish",
}
"""Where each shell looks for completions under PREFIX/share."""


def parsers() -> dict[str, Parser]:
    """Every subcommand's parser by the subcommand's name, in the order of `vmm --help`."""
    from importlib import import_module

    from vmm.cli import COMMANDS

    return {name: import_module(f"vmm.cli.{name}").PARSER for name in COMMANDS}


def share() -> dict[str, str]:
    """Text by path under PREFIX/share."""
    from vmm.cli.completion import script
    from vmm.cli.manual import page

    made = {path: script(shell) for shell, path in SHARE.items()}
    return {"man/man1/vmm.1": page(), **made}
