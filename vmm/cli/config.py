"""`vmm config`: check a machine's file and print it normalised, or print such files' schema."""

from __future__ import annotations

from vmm.cli.arguments import HELP, Option, Parser, Spelled
from vmm.cli.say import answer
from vmm.errors import EXIT_OK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = "--schema"
ALL = "--all"

PARSER = Parser(
    "vmm config",
    "Check FILE, a machine as TOML or JSON, and print it normalised: as JSON, with absolute paths "
    "and sizes in bytes. Nothing it names is opened.",
    (
        Option(ALL, help="print what is at its default too"),
        Option(SCHEMA, help="print the JSON schema (draft 2020-12) of such files instead"),
    ),
    operand="FILE",
    instead=SCHEMA,
    epilog="""\
The keys are the keywords of vmm.MachineConfig:
  kernel = "vmlinuz"
  memory = "512M"
  drives = ["root.img,snapshot"]
exit status: 0, or 2 where the file is wrong, with one line that names it and the line or key.
""",
)


def main(argv: Sequence[str]) -> int:
    """Check or print; the exit status."""
    args = PARSER.parse(argv)
    if args.given(HELP):
        answer(PARSER.help_text())
        return EXIT_OK
    if args.given(SCHEMA):
        from vmm.config_file import schema_text

        answer(schema_text())
        return EXIT_OK
    import json

    from vmm.config import MachineConfig

    with Spelled(args):
        config = MachineConfig.load(args.operands[0])
    answer(json.dumps(config.to_dict(defaults=args.given(ALL)), indent=2) + "\n")
    return EXIT_OK
