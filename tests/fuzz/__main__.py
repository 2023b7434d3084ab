"""`make fuzz`: search for bugs for as long as is wanted.

    python -m tests.fuzz [--minutes N] [--target NAME] [--corpus DIRECTORY] [--planted] [--list]

Every target in turn gets the same share of the time; with --target (which may be given more than
once) those alone. Inputs that reach something new are kept in the corpus directory, so that the
next run begins where this one ended; findings are in it too, and the exit status is 1 if there are
any. --planted plants every bug of the tables instead, and says which are found and how soon.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.fuzz import campaign, native

DEFAULT_CORPUS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmm-fuzz"
MINUTES = 120.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("make fuzz", description="Search for bugs.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all targets together")
    parser.add_argument("--target", action="append", choices=campaign.names(), metavar="NAME")
    parser.add_argument("--corpus", type=Path, default=DEFAULT_CORPUS, metavar="DIRECTORY")
    parser.add_argument("--planted", action="store_true", help="look for planted bugs")
    parser.add_argument(
        "--coverage", action="store_true", help="of the C path by the corpus, at the end"
    )
    parser.add_argument("--list", action="store_true", help="the targets")
    given = parser.parse_args(arguments)
    targets = given.target or campaign.names()
    if given.list:
        print("\n".join(campaign.names()))
        return 0
    try:
        if given.planted:
            return campaign.planted(targets)
        status = campaign.search(targets, given.minutes * 60, given.corpus)
        if given.coverage:
            campaign.coverage(targets, given.corpus)
        return status
    except native.BuildError as err:
        print(f"fuzz: {err}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
