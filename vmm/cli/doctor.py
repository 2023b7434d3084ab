"""`vmm doctor`: what this host can run, and what to do where it cannot."""

from __future__ import annotations

import os

from vmm.cli.arguments import HELP, Option, Parser
from vmm.cli.say import STDOUT, answer
from vmm.errors import EXIT_HOST, EXIT_OK, UsageError
from vmm.kvm import DEV_KVM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.cli.arguments import Arguments

EXIT_LACKS = 1
"""Of --kernel and --config."""
EPILOG = """\
exit status:
  0    KVM can be used here and the report is made; whether stock Linux runs is
       in its verdict (runs_linux in the JSON)
  1    with --kernel or --config: it lacks what vmm exec --root DIR needs
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
        Option(
            "--kernel",
            metavar="FILE",
            help="look at this kernel instead: what it has of what vmm's devices and vmm exec need",
        ),
        Option("--config", metavar="FILE", help="look at this kernel's .config instead"),
    ),
    epilog=EPILOG,
)


def main(argv: Sequence[str]) -> int:
    """Examine and report; the exit status (see EPILOG)."""
    args = PARSER.parse(argv)
    if args.given(HELP):
        answer(PARSER.help_text())
        return EXIT_OK
    if args.given("--kernel") or args.given("--config"):
        return _kernel(args)
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


def _kernel(args: Arguments) -> int:
    """Look at a kernel, or its configuration, and not at this host."""
    from vmm.cli.width import columns
    from vmm.doctor import kernel

    if args.given("--kernel") and args.given("--config"):
        raise UsageError("--kernel and --config: give one; a kernel's .config is found beside it")
    if args.given("--kernel"):
        report = kernel.look_at_kernel(args.value("--kernel"))
    else:
        report = kernel.look_at_config(args.value("--config"))
    if args.given("--json"):
        import json

        answer(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        answer(kernel.render(report, columns()))
    return EXIT_LACKS if report.missing else EXIT_OK
