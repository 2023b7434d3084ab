"""`vmm doctor`: what this host can run, and what to do where it cannot."""

from __future__ import annotations

import os

from vmm.cli.arguments import HELP, Option, Parser
from vmm.cli.say import STDOUT, answer
from vmm.errors import EXIT_HOST, EXIT_OK
from vmm.kvm import DEV_KVM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

EPILOG = """\
exit status:
  0    KVM can be used here and the report is made; whether stock Linux runs is
       in its verdict (runs_linux in the JSON)
  2    wrong usage
  69   KVM cannot be used; the report says why, and what to do
"""

PARSER = Parser(
    "vmm doctor",
    "Say which KVM this host has and what will run on it, which helper programs and devices there "
    "are, what each is for, and how to get what is missing.",
    (
        Option("--json", help="the report as JSON"),
        Option(
            "--device", metavar="PATH", default=DEV_KVM, help=f"the KVM device (default {DEV_KVM})"
        ),
    ),
    epilog=EPILOG,
)


def main(argv: Sequence[str]) -> int:
    """Examine and report; the exit status (see EPILOG)."""
    args = PARSER.parse(argv)
    if args.given(HELP):
        answer(PARSER.help_text())
        return EXIT_OK
    from vmm.doctor import examine

    report = examine(args.value("--device"))
    if args.given("--json"):
        import json

        answer(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        from vmm.cli.width import columns
        from vmm.doctor.text import render

        colour = os.isatty(STDOUT) and os.environ.get("TERM", "dumb") != "dumb"
        colour = colour and not os.environ.get("NO_COLOR")
        answer(render(report, colour=colour, width=columns()))
    return EXIT_OK if report.usable else EXIT_HOST
