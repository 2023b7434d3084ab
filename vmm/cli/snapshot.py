"""`vmm snapshot`: make a snapshot of a running machine, or check one."""

from __future__ import annotations

import os

from vmm.cli.arguments import HELP, Option, Parser
from vmm.cli.say import answer
from vmm.errors import EXIT_OK, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CONTROL, BASE, DISKS, TRACK, STOP, CHECK = (
    "--control", "--base", "--disks", "--track", "--stop", "--check",
)  # fmt: skip

PARSER = Parser(
    "vmm snapshot",
    "Keep a running machine, one started with --control PATH, in a new directory DIR: memory, "
    "processors, devices, disks. `vmm restore DIR` goes on from there.",
    (
        Option(CONTROL, metavar="PATH", help="the machine's control socket"),
        Option(BASE, metavar="DIR", help="an earlier snapshot: keep what differs from it"),
        Option(
            DISKS,
            metavar="HOW",
            default="copy",
            help="copy (by reflink where that works), or keep: leave the images where they are",
        ),
        Option(TRACK, help="have the machine's memory mapped from DIR, for the next --base DIR"),
        Option(STOP, help="end the machine when the snapshot is made, with status 0"),
        Option(CHECK, help="check the snapshot DIR instead: all of it, and those it is based on"),
    ),
    operand="DIR",
    epilog="""\
exit status: 0; 2 wrong usage, or a damaged snapshot; 69 the host cannot write it, or no machine
is there.
""",
)


def main(argv: Sequence[str]) -> int:
    """Ask the machine, or check; the exit status."""
    args = PARSER.parse(argv)
    if args.given(HELP):
        answer(PARSER.help_text())
        return EXIT_OK
    path = args.operands[0]
    if args.given(CHECK):
        from vmm.cli.status import StatusLine
        from vmm.snapshot.store import Snapshot

        with Snapshot(path, trusted=True) as snapshot, StatusLine(f"checking {path}"):
            snapshot.verify()
        return EXIT_OK
    if not args.given(CONTROL):
        raise UsageError(
            f"vmm snapshot {path}: which machine? --control PATH, as it was started with "
            "(or --check, to look at a snapshot)"
        )
    from vmm.cli.control import ask

    request: dict[str, object] = {
        "path": os.path.abspath(path),
        "disks": args.value(DISKS),
        "track": args.given(TRACK),
        "stop": args.given(STOP),
    }
    if args.given(BASE):
        request["base"] = os.path.abspath(args.value(BASE))
    from vmm.cli.status import StatusLine

    target = str(request["path"])
    with StatusLine(f"keeping the machine in {path}", lambda: _written(target)):
        ask(args.value(CONTROL), {"snapshot": request})
    return EXIT_OK


def _written(target: str) -> str:
    """How much of the snapshot `target` is on disk: it is made beside its place."""
    import glob

    from vmm.units import format_size

    directory, name = os.path.split(target)
    pattern = f"{glob.escape(os.path.join(directory, '.' + name))}.*.partial/*"
    size = 0
    for file in glob.iglob(pattern):
        try:
            size += os.stat(file).st_blocks * 512
        except OSError:  # it has just been moved to its place
            continue
    return f": {format_size(size >> 20 << 20)}" if size >> 20 else ""
