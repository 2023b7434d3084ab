"""vmm/cli/status.py: a line that says what takes so long, on a terminal only, and then gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.tiny import AtTerminal
from vmm.cli import say, status

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

WAITS = b" s, and nothing on the console yet (Ctrl-A x ends it)"


def screen(output: bytes) -> list[str]:
    """The lines a terminal shows of `output`, which moves the cursor by line ends alone."""
    lines, column = [""], 0
    for part in re.findall(r"\r|\n|\x1b\[K|[^\r\n\x1b]+", output.decode()):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            column = 0
            continue
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
            continue
        else:
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
        column = len(lines[-1])
    return lines


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    return tiny.kernel(tmp_path, tiny.SILENT_ECHO)


def test_it_goes_away_with_the_first_output(kernel: str) -> None:
    with AtTerminal("run", "--memory", "16M", kernel, term="xterm") as person:
        seen = person.expect(WAITS)
        assert re.search(rb"\r\x1b\[Kvmm: started, \d+$", seen)
        person.type(b"a")
        after = person.expect(b"[a]")
        assert screen(b"vmm: " + WAITS + after + b"[a]") == ["[a]"]
        person.type(b"q")
        assert person.wait() == 7
        assert b"nothing" not in person.output  # it did not come back
        assert person.is_restored


def test_it_goes_away_at_the_end(kernel: str) -> None:
    with AtTerminal("run", "--memory", "16M", kernel, term="xterm") as person:
        person.expect(WAITS)
        person.type(b"\x01x")
        assert person.wait() == 130
        lines = screen(b"vmm: " + WAITS + person.output)
        assert lines[0] == "vmm: nothing was ever written to the console (ttyS0)"
        assert lines[1].startswith("vmm: vCPU 0 was running at 0x")
        assert lines[2:] == ["vmm: ended from the keyboard (Ctrl-A x) (status 130)", ""]


def test_lines_of_ours_take_it_away(kernel: str) -> None:
    with AtTerminal("run", "--memory", "16M", "--no-acpi", kernel, term="xterm") as person:
        person.expect(WAITS)
        person.kill(signal.SIGTERM)
        assert person.wait() == 143
        lines = screen(b"vmm: " + WAITS + person.output)
        assert [line for line in lines if "nothing on the console yet" in line] == []


@pytest.mark.parametrize("term", ["dumb", ""])
def test_not_on_a_terminal_that_cannot_erase(kernel: str, term: str) -> None:
    with AtTerminal("run", "--memory", "16M", "--timeout", "1.6", kernel, term=term) as person:
        assert person.wait() == 124
        assert b"started" not in person.output


def test_never_in_a_pipe(kernel: str) -> None:
    done = tiny.run(
        "run", "--memory", "16M", "--timeout", "1.6", kernel, env=tiny.environment(TERM="xterm")
    )
    assert done.returncode == 124
    assert "started" not in done.stderr and "\x1b" not in done.stderr


def test_not_in_the_background(tmp_path: Path, kernel: str) -> None:
    """vmm run ... &: the terminal is the shell's."""
    script = (
        "import os, subprocess, sys; "
        "done = subprocess.run(sys.argv[1:], process_group=0); sys.exit(done.returncode)"
    )
    command = tiny.command(
        "run", "--memory", "16M", "--console", "none", "--timeout", "1.6", kernel
    )
    with on_terminal([command[0], "-c", script, *command]) as (master, process):
        assert process.wait(60) == 124
        assert b"started" not in os.read(master, 65536)


class on_terminal:
    def __init__(self, command: list[str]) -> None:
        self.master, slave = os.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: os.login_tty(os.dup(0)),
            env=tiny.environment(TERM="xterm"),
        )  # fmt: skip
        os.close(slave)

    def __enter__(self) -> tuple[int, subprocess.Popen[bytes]]:
        return self.master, self.process

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_what_the_guest_prints_stays_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest's console line may hold escape sequences, and be longer than the terminal is wide."""
    reading, writing = os.pipe()
    monkeypatch.setattr(say, "STDERR", writing)
    monkeypatch.setattr(status, "PERIOD", 0.01)
    monkeypatch.setattr(status, "_is_possible", lambda: True)
    with status.StatusLine("x", lambda: ": \x1b[2J\x07\n" + "y" * 200):
        time.sleep(0.2)
    os.close(writing)
    with open(reading, "rb") as file:
        written = file.read().decode()
    assert written.startswith("\r\x1b[Kvmm: x, 0 s:  [2J  yyy") and written.endswith("\r\x1b[K")
    versions = written.split("\r\x1b[K")[1:-1]
    assert {len(line) for line in versions} == {79}
    assert all(line.isprintable() for line in versions)
    assert say.before_line is None
