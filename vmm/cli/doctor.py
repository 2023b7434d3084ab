"""`vmm doctor`: what this host can run, and what to do where it cannot."""

from __future__ import annotations

import json
import os
import sys

from vmm.cli.arguments import Parser
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


def parser() -> Parser:
    """The options of `vmm doctor`."""
    p = Parser("vmm doctor", "Say which KVM this host has and what will run on it.", EPILOG)
    p.add_argument("--json", action="store_true", help="the report as JSON")
    p.add_argument(
        "--device", metavar="PATH", default=DEV_KVM, help=f"the KVM device (default {DEV_KVM})"
    )
    return p


def main(argv: Sequence[str]) -> int:
    """Examine and report; the exit status (see EPILOG)."""
    args = parser().parse_args(argv)
    from vmm.doctor import examine

    report = examine(args.device)
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        from vmm.doctor.text import render

        colour = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        sys.stdout.write(render(report, colour=colour and not os.environ.get("NO_COLOR")))
    return EXIT_OK if report.usable else EXIT_HOST
