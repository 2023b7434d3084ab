"""vmm/machine/unclosed.py: machines that are not closed are told of, and closed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.bare import bare_machine, until
from vmm import HostError, Machine, MachineConfig

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(60)]


def descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sorted(found)


@pytest.mark.parametrize("kernel", [False, True], ids=["bare", "kernel"])
@pytest.mark.parametrize("state", ["created", "stopped"])
def test_one_that_nothing_refers_to(state: str, kernel: bool, tmp_path: Path) -> None:
    """Nor does who watches for guests that halt, once it has stopped."""
    gc.collect()
    before = descriptors()
    if kernel:
        machine = Machine(MachineConfig(tiny.kernel(tmp_path, tiny.SPIN), rng=True))
    else:
        machine = bare_machine("1: jmp 1b")
    if state == "stopped":
        machine.start()
        machine.stop()
    with pytest.warns(ResourceWarning, match=f"unclosed <Machine {state}: "):
        del machine
        until(lambda: gc.collect() >= 0 and descriptors() == before)


def test_one_that_is_closed_or_could_not_be_made_says_nothing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    image = tmp_path / "d.img"
    image.write_bytes(bytes(1 << 20))
    with Machine(MachineConfig(memory=16 << 20, drives=[image])):
        with pytest.raises(HostError):
            Machine(MachineConfig(memory=16 << 20, drives=[image]))
        gc.collect()
    gc.collect()
    assert not [one for one in recwarn if one.category is ResourceWarning]


PROGRAM = """
import sys
from vmm import Machine, MachineConfig
m = Machine(MachineConfig({kernel!r}, memory="64M", vsock="cid=9,path=v.sock"))
n = Machine(MachineConfig({kernel!r}, memory="64M"))
n.close()
if {running}:
    m.start()
print(m.state)
{end}
"""


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("end", ["", "sys.exit(3)", "1 / 0"])
def test_at_the_end_of_the_process(running: bool, end: str, tmp_path: Path) -> None:
    text = PROGRAM.format(kernel=tiny.kernel(tmp_path, tiny.HALT), running=running, end=end)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", text],
        cwd=tmp_path, env=tiny.environment(), capture_output=True, text=True, timeout=50,
        check=False,
    )  # fmt: skip
    state = "running" if running else "created"
    assert done.stdout == f"{state}\n"
    assert done.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1)
    assert done.stderr.count("ResourceWarning: unclosed") == 1
    assert f"unclosed <Machine {state}: " in done.stderr
    assert not (tmp_path / "v.sock").exists()


def test_faults_are_public() -> None:
    import vmm

    assert vmm.faults.Faults.__module__.startswith("vmm.faults")
    assert "faults" in vmm.__all__
