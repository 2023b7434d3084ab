"""Documentation that runs: the fenced blocks of a page, one after the other, as its reader does.

The blocks of a page run in order in one directory, which is empty at first; `vmm`, `python` and
`pytest` are this project's. What a block needs, a block before it makes. Kinds of blocks:

    python, sh   programs; a `text` block right after one is what that prints, but for blanks at
                 the ends of lines
    console      lines that begin with `$ ` are commands; the lines after one are what it prints,
                 where `...` alone stands for any lines
    text, mermaid  pictures
    others       need one of the comments below

Comments right before a block say more:

    <!-- file: NAME -->     the block is no program but the file NAME, for those after it
    <!-- lane: linux -->    it needs a KVM that boots Linux
    <!-- status: N -->      it ends with this status (a program's)
    <!-- no run: WHY -->    it is run elsewhere; WHY says where
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"^((?:<!-- [a-z ]+: .*? -->\n)*)```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
_COMMENT = re.compile(r"<!-- ([a-z ]+): (.*?) -->\n")
_INDENTED = re.compile(
    r"^(?: {4,}|\t)(?:\$ |(?:vmm|make|pip|python3?|pytest|sudo|apt|apt-get|git) )"
)
LANGUAGES = {"python": [sys.executable, "-"], "sh": ["sh", "-eu", "-s"]}
PICTURES = ("text", "mermaid")
SECONDS = 400
"""For one block, in the emulated lane too: only the end of a hang."""


class Block(NamedTuple):
    """One block of a page, with the line it begins at."""

    page: str
    line: int
    language: str
    code: str
    comments: dict[str, str]
    prints: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def linux(self) -> bool:
        """Whether it needs a KVM that boots Linux."""
        return self.comments.get("lane") == "linux"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are programs or files, in order; AssertionError for one that
    nobody runs."""
    text = page.read_text()
    found: list[Block] = []
    end = 0
    for match in _BLOCK.finditer(text):
        comments = dict(_COMMENT.findall(match[1]))
        language, code = match[2], match[3]
        between, end = text[end : match.start()], match.end()
        line = text.count("\n", 0, match.start(3)) + 1
        after = bool(found) and not between.strip() and found[-1].language in LANGUAGES
        if "no run" in comments:
            continue
        if language == "text" and after and not comments:
            found[-1] = found[-1]._replace(prints=code)
        elif "file" in comments or language in LANGUAGES or language == "console":
            found.append(Block(page.name, line, language, code, comments))
        elif language not in PICTURES:
            raise AssertionError(f"{page.name}:{line}: nobody runs blocks of {language}")
    return found


def unfenced(page: Path) -> list[str]:
    """Lines of commands that stand in no fenced block, where nobody runs them."""
    inside, found = False, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif not inside and _INDENTED.match(line):
            found.append(f"{page.name}:{number}: {line.strip()}")
    return found


def environment(directory: Path) -> dict[str, str]:
    """Where `vmm`, `python`, `python3`, `pytest` are this project's."""
    bin_ = directory.parent / "bin"
    bin_.mkdir(exist_ok=True)
    for name, words in (
        ("vmm", "-m vmm"), ("python", ""), ("python3", ""), ("pytest", "-m pytest"),
    ):  # fmt: skip
        script = bin_ / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        script.chmod(0o755)
    return tiny.environment(PATH=f"{bin_}:{os.environ['PATH']}", TERM="dumb")


def run(block: Block, directory: Path) -> None:
    """Run it in `directory`; AssertionError where it fails, or prints something else."""
    if "file" in block.comments:
        path = directory / block.comments["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code)
    elif block.language == "console":
        _console(block, directory)
    else:
        status, printed = _call(block, LANGUAGES[block.language], block.code, directory)
        assert status == int(block.comments.get("status", 0)), f"{block}: {status}: {printed}"
        if block.prints is not None:
            _compare(block, printed, block.prints)


def _console(block: Block, directory: Path) -> None:
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        command, _, prints = part.partition("\n")
        _, printed = _call(block, ["sh", "-c", command], "", directory)
        _compare(block, printed, prints)


def _call(block: Block, command: list[str], code: str, directory: Path) -> tuple[int, str]:
    """The status and the output, with standard error after it where there is an error."""
    done = subprocess.run(
        command,
        input=code,
        cwd=directory,
        env=environment(directory),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    both = done.returncode or block.language == "console"
    return done.returncode, done.stdout + (done.stderr if both else "")


def _compare(block: Block, printed: str, expected: str) -> None:
    pattern = "".join(
        r"(?:.*\n)*" if line == "..." else re.escape(line.rstrip()) + r"\n"
        for line in expected.splitlines()
    )
    lines = "".join(line.rstrip() + "\n" for line in printed.splitlines())
    assert re.fullmatch(pattern, lines), f"{block}: printed\n{lines}and not\n{expected}"
