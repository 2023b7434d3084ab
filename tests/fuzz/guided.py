"""Runs a target under Atheris: libFuzzer, guided by the coverage of the Python that parses.

python -m tests.fuzz.guided TARGET [LIBFUZZER OPTION ...] [DIRECTORY ...]
"""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-untyped,unused-ignore]

with atheris.instrument_imports(include=["vmm"]):
    from tests.fuzz import targets

    EVERY = {target.name: target for target in targets.every()}  # imported here, or not traced


def main(arguments: list[str]) -> None:
    run = EVERY[arguments[1]].start()
    atheris.Setup([arguments[0], *arguments[2:]], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
