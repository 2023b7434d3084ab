"""`vmm resize`: have a disk of a running machine grow."""

from __future__ import annotations

from vmm.cli.arguments import HELP, Option, Parser
from vmm.cli.say import answer
from vmm.errors import EXIT_OK, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CONTROL, SIZE = "--control", "--size"

PARSER = Parser(
    "vmm resize",
    "Have a disk of a running machine grow, one started with --control PATH, and tell the guest. "
    "DISK is blk0 for its first --drive, blk1 for the next ...",
    (
        Option(CONTROL, metavar="PATH", help="the machine's control socket"),
        Option(
            SIZE,
            metavar="SIZE",
            help="what the disk is to have, as 20G; without: what its image has, which somebody "
            "else has enlarged",
        ),
    ),
    operand="DISK",
    epilog="""\
exit status: 0; 2 wrong usage, a smaller size, or an image that cannot grow; 69 the host has no
space for it, or no machine is there.
""",
)


def main(argv: Sequence[str]) -> int:
    """Ask the machine; the exit status."""
    args = PARSER.parse(argv)
    if args.given(HELP):
        answer(PARSER.help_text())
        return EXIT_OK
    disk = args.operands[0]
    if not args.given(CONTROL):
        raise UsageError(
            f"vmm resize {disk}: which machine? --control PATH, as it was started with"
        )
    request: dict[str, object] = {"disk": disk}
    if args.given(SIZE):
        from vmm.units import parse_size

        request["size"] = parse_size(args.value(SIZE), SIZE)
    from vmm.cli.control import ask

    answer(f"{disk}: {ask(args.value(CONTROL), {'resize': request})['size']} bytes\n")
    return EXIT_OK
