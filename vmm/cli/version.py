"""`vmm version`: which vmm this is, and what it has with it."""

from __future__ import annotations

from vmm.cli.arguments import HELP, Option, Parser
from vmm.cli.say import answer
from vmm.errors import EXIT_OK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PARSER = Parser(
    "vmm version",
    "Say which vmm this is, what was compiled into it, and which optional libraries it found.",
    (Option("--json", help="the same as JSON"),),
    epilog="exit status: 0, or 2 for wrong usage.\n",
)


def main(argv: Sequence[str]) -> int:
    """Tell; the exit status."""
    args = PARSER.parse(argv)
    if args.given(HELP):
        answer(PARSER.help_text())
        return EXIT_OK
    from vmm.doctor.parts import about, pieces

    if args.given("--json"):
        import json

        found = {
            part.name: {"there": part.there, "value": part.value, "purpose": part.purpose}
            for part in pieces()
        }
        answer(json.dumps({**about(), "parts": found}, indent=2) + "\n")
        return EXIT_OK
    told = about()
    lines = [
        f"vmm {told['version']}",
        f"{'Python':<16}{told['python']} ({told['executable']})",
        f"{'installed':<16}{told['where']}",
    ]
    lines += [f"{part.name:<16}{part.value or 'not there'} ({part.purpose})" for part in pieces()]
    answer("\n".join(lines) + "\n")
    return EXIT_OK
