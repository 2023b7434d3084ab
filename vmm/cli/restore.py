"""`vmm restore`: go on with a machine that was kept in a snapshot."""

from __future__ import annotations

from vmm.cli.arguments import HELP, Option, Parser, Spelled
from vmm.cli.run import EPILOG, keywords, see_through
from vmm.cli.run import PARSER as RUN
from vmm.cli.say import answer
from vmm.errors import EXIT_OK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

SHARED = (
    "--console", "--port", "--drive", "--net", "--vsock", "--control", "--timeout", "--grace",
    "--on-panic", "--sandbox", "--verbose",
)  # fmt: skip
"""Options of `vmm run` for what is outside the guest; those given replace what the machine had."""
DISKS, VERIFY, PAGES, CLOCK = "--disks", "--verify", "--pages", "--clock"
TRUSTED = "--trusted"

PARSER = Parser(
    "vmm restore",
    "Go on with the machine kept in the snapshot DIR. It has the memory, processors and devices it "
    "had; options say what is at the other end of them now.",
    (
        *(option for option in RUN.options if option.name in SHARED),
        Option(
            DISKS,
            metavar="HOW",
            default="overlay",
            help="overlay: what the guest writes goes with the machine; write: into the snapshot",
        ),
        Option(
            PAGES,
            metavar="HOW",
            default="map",
            help="map the snapshot's files; uffd: another process hands pages over (uffd=SOCKET: "
            "one that is there)",
        ),
        Option(
            CLOCK,
            metavar="HOW",
            default="step",
            help="step: the time since the snapshot has passed for the guest; keep: its clocks go "
            "on from where they were",
        ),
        Option(
            TRUSTED,
            help="open files, sockets and networks of this host that the snapshot names, whoever "
            "made it; otherwise only if this user made it here",
        ),
        Option(VERIFY, help="read all of the snapshot first, and compare it with its checksums"),
    ),
    operand="DIR",
    epilog=EPILOG,
)


def main(argv: Sequence[str]) -> int:
    """Restore and run; the exit status (see EPILOG)."""
    args = PARSER.parse(argv)
    if args.given(HELP):
        answer(PARSER.help_text())
        return EXIT_OK
    from vmm.machine import Machine

    def make() -> Machine:
        return Machine.restore(
            args.operands[0],
            verify=args.given(VERIFY),
            disks=args.value(DISKS),
            pages=args.value(PAGES),
            clock=args.value(CLOCK),
            trusted=True if args.given(TRUSTED) else None,
            **values,
        )

    with Spelled(args):
        values: dict[str, Any] = {"console": "auto", **keywords(args)}
        return see_through(make, args)
