"""vmm/cli/width.py: help fits the terminal, whichever it is, and goes to standard output."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from itertools import pairwise

import pytest

from vmm.cli import COMMANDS
from vmm.cli.width import NARROWEST, USUAL, WIDEST, columns, fit


def vmm(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmm", *arguments]
    base = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    return subprocess.run(
        command, env={**base, **env}, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("width", [40, 64, 80])
def test_help_fits_and_loses_no_word(command: str, width: int) -> None:
    words = [command, "--help"] if command else ["--help"]
    done = vmm(*words, COLUMNS=str(width))
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= width
    wide = vmm(*words, COLUMNS=str(WIDEST)).stdout
    assert "".join(done.stdout.split()) == "".join(wide.split())
    if command:
        assert done.stdout.startswith(f"usage: vmm {command}") and "--help" in done.stdout
        assert vmm("help", command, COLUMNS=str(width)).stdout == done.stdout


@pytest.mark.parametrize("command", ["run", "exec", "restore", "snapshot", "resize"])
@pytest.mark.parametrize("width", [50, 80])
def test_a_paragraph_of_help_is_filled(command: str, width: int) -> None:
    """No line ends early, but a paragraph's last and a list's."""
    lines = vmm(command, "--help", COLUMNS=str(width)).stdout.splitlines()
    for line, after in pairwise(lines):
        if line and after and not line[0].isspace() and not after[0].isspace():
            assert len(line) + 1 + len(after.split()[0]) > width or line.endswith((".", ":")), line


def test_without_a_terminal_it_is_the_usual_width() -> None:
    lines = vmm("run", "--help").stdout.splitlines()
    assert USUAL - 12 < max(map(len, lines)) <= USUAL


@pytest.mark.parametrize(("asked", "wide"), [(50, 50), (5, NARROWEST), (400, WIDEST), (0, USUAL)])
def test_a_terminals_own_width_counts(asked: int, wide: int) -> None:
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, asked, 0, 0))
        code = "from vmm.cli.width import columns; raise SystemExit(columns())"
        env = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        done = subprocess.run([sys.executable, "-c", code], stdout=theirs, env=env, check=False)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == wide


@pytest.mark.parametrize("said", ["", "x", "-3", "9" * 9, "²"])
def test_columns_that_are_no_number_are_left(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", said)
    assert NARROWEST <= columns() <= WIDEST


def test_a_folded_line_goes_on_under_its_words() -> None:
    assert fit("  one two three four", 12) == "  one two\n    three\n    four"
    assert fit("usage: a bb ccc dddd", 14) == "usage: a bb\n       ccc\n       dddd"
    assert fit("short\n\nlines", 12) == "short\n\nlines"


def test_help_of_what_is_no_command() -> None:
    done = vmm("help", "start")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vmm: 'start' is not a command; use one of: run, exec, ")
