"""The man page, vmm(1), made from the tables of options."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.cli.arguments import Parser

DESCRIPTION = (
    "vmm is a KVM virtual machine monitor. It boots a Linux kernel through /dev/kvm, runs one "
    "command in such a machine, keeps machines in directories and goes on from there."
)
ENVIRONMENT = (
    ("VMM_CACHE", "where kernels and what is made once are kept (default ~/.cache/vmm)"),
    ("NO_COLOR", "no colours in the report of vmm doctor"),
    ("COLUMNS", "how wide help and reports are, instead of the terminal's width"),
)


def page() -> str:
    """The whole page, for man(1)."""
    from vmm import __version__
    from vmm.cli.tables import parsers

    lines = [
        f'.TH VMM 1 "" "vmm {__version__}" "User Commands"',
        *(".SH NAME", "vmm \\- run virtual machines with KVM"),
        *(".SH SYNOPSIS", ".nf"),
        *(f".B {_escape(parser.usage)}" for parser in parsers().values()),
        *(".fi", ".SH DESCRIPTION", _escape(DESCRIPTION)),
    ]
    for name, parser in parsers().items():
        lines += [f".SH VMM {name.upper()}", *_command(parser)]
    lines += [".SH ENVIRONMENT"]
    for name, text in ENVIRONMENT:
        lines += [".TP", f".B {name}", _escape(text)]
    lines += [".SH SEE ALSO", "The pages in share/doc/vmm/docs beside this one's share/man."]
    return "\n".join(lines) + "\n"


def _command(parser: Parser) -> list[str]:
    lines = [_escape(parser.summary)]
    for option in parser.options:
        names = ", ".join(f"\\fB{_escape(name)}\\fR" for name in option.names)
        value = option.metavar and _escape(parser.metavar(option))
        lines += [".TP", names + (f"\\fI{value}\\fR" if value else ""), _escape(option.help)]
    if parser.epilog:
        lines += [".PP", ".nf", *map(_escape, parser.epilog.rstrip("\n").split("\n")), ".fi"]
    return lines


def _escape(text: str) -> str:
    """`text` as roff prints it as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{text}" if text[:1] in (".", "'") else text
