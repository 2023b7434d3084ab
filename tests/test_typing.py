"""The package is typed for those who use it: mypy sees what a program does with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TYPED = ("boot", "events", "async_many", "inspect_memory", "host_functions", "vsock_service")

PROGRAM = """\
import vmm
from vmm import AsyncMachine, Machine, MachineConfig
from vmm.events import ConsoleLine, Paused, Stopped

def on_stop(event: Stopped) -> None:
    print(event.exit.kind)

def on_line(event: ConsoleLine) -> None:
    print(event.line)

def whole(m: Machine) -> None:
    m.subscribe(on_stop, Stopped)
    m.subscribe(on_line, Stopped)  # WRONG
    for event in m.events():
        print(event.time)
        print(event.line)  # WRONG
    for line in m.events(ConsoleLine):
        print(line.line.upper())
    m.bind_port(0x510, read=lambda offset, size: "x")  # WRONG
    print(m.exit.kind)  # WRONG
    vmm.Machines  # WRONG

async def main(config: MachineConfig) -> int:
    async with AsyncMachine(config) as m:
        async for event in m.events(Paused):
            print(event.why.upper())
        m.wait_for("x").upper()  # WRONG
        line: str = await m.wait_for("x")
        return (await m.wait()).status
"""


@pytest.mark.timeout(300)
def test_what_a_checker_says_of_programs(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    files = [str(EXAMPLES / f"{name}.py") for name in TYPED]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"),
         "--no-error-summary", "program.py", *files],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    said = done.stdout.splitlines()
    wrong = [n for n, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# WRONG")]
    lines = [int(line.split(":")[1]) for line in said if line.startswith("program.py:")]
    assert sorted(set(lines)) == wrong, done.stdout
    assert all(line.startswith("program.py:") for line in said), done.stdout
