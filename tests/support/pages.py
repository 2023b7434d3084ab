"""Documentation whose snippets run: the fenced blocks of a page, and what they need.

A block of `python` or `sh` is run in a directory of its own. A comment before it says more:

    <!-- guest: CODE -->    the file `vmlinuz` is a tiny guest that runs CODE, an expression in the
                            names of tests.support.tiny
    <!-- file: NAME -->     the block is no program but the file NAME, for those after it
    <!-- no run: WHY -->    it is run elsewhere; WHY says where

A block of `text` right after one is what that prints, but for blanks at the ends of lines.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.support import tiny

_BLOCK = re.compile(
    r"^(?:<!-- (guest|file|no run): (.*?) -->\n)?```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL
)
LANGUAGES = {"python": [sys.executable, "-"], "sh": ["sh", "-e", "-s"]}


class Snippet(NamedTuple):
    """A program on a page, with the line it begins at."""

    page: str
    line: int
    language: str
    code: str
    guest: str
    prints: str | None
    files: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """The programs on a page, in order."""
    text = page.read_text()
    found: list[Snippet] = []
    files: dict[str, str] = {}
    end = 0
    for match in _BLOCK.finditer(text):
        kind, value, language, code = match.groups()
        between, end = text[end : match.start()], match.end()
        if kind == "file":
            files = {**files, value: code}
        elif kind == "no run":
            continue
        elif language == "text" and found and not between.strip():
            found[-1] = found[-1]._replace(prints=code)
        elif language in LANGUAGES:
            line = text.count("\n", 0, match.start(3)) + 1
            guest = value if kind == "guest" else "HALT"
            found.append(Snippet(page.name, line, language, code, guest, None, files))
        elif language != "text":
            raise AssertionError(f"{page.name}: nobody runs blocks of {language}")
    return found


def run(snippet: Snippet, directory: Path) -> None:
    """Run it in `directory`; AssertionError where it fails, or prints something else."""
    for name, content in snippet.files.items():
        (directory / name).write_text(content)
    guest = tiny.kernel(directory, eval(snippet.guest, dict(vars(tiny))))
    os.rename(guest, directory / "vmlinuz")
    (directory / "initrd.img").write_bytes(b"070701" + bytes(506))
    for name in ("disk.img", "data.img"):
        with open(directory / name, "wb") as file:
            file.truncate(1 << 20)
    command = directory / "bin" / "vmm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vmm "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        LANGUAGES[snippet.language],
        input=snippet.code,
        cwd=directory,
        env=tiny.environment(PATH=f"{command.parent}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{snippet}: {done.stdout}{done.stderr}"
    if snippet.prints is not None:
        printed = [line.rstrip() for line in done.stdout.splitlines()]
        assert printed == snippet.prints.splitlines(), str(snippet)
