"""vmm/descriptors.py: calls of a machine that meet the limit of files at any step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

PROGRAM = """
import gc, os, resource, shutil, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from tests.support.bare import bare_machine
from vmm import Machine, MachineConfig
from vmm.errors import HostError

call, path = sys.argv[1:]
image = f"{path}/disk.img"
open(image, "wb").truncate(1 << 20)
options = {"drives": [f"{image},snapshot"], "rng": True, "nets": ["lan=a"], "console": "none"}

def snapshot(machine):
    machine.snapshot(f"{path}/kept")

def clone(machine):
    machine.clone().close()

def restore(machine):
    Machine.restore(f"{path}/whole").close()

def rollback(machine):
    machine.rollback()

def checkpoint(machine):
    machine.checkpoint()

class Fill(list):
    def clear_(self):
        while self:
            os.close(self.pop())

fill = Fill()

def free(count):
    fill.clear_()
    try:
        while True:
            fill.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for _ in range(count):
        os.close(fill.pop())

machine = bare_machine("1: jmp 1b", **options)
machine.start()
machine.snapshot(f"{path}/whole")
machine.checkpoint()
do = globals()[call]
do(machine)
gc.collect()
def here():
    return sorted(os.readlink(f"/proc/self/fd/{fd}").rstrip("0123456789") for fd in
                  os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}"))

before = here()
told = 0
for left in range(60):
    shutil.rmtree(f"{path}/kept", ignore_errors=True)
    free(left)
    try:
        do(machine)
        worked = True
    except HostError as err:
        worked = False
        fill.clear_()
        assert "this process has all 300" in str(err), err
        told += 1
    fill.clear_()
    gc.collect()
    if not worked:
        shutil.rmtree(f"{path}/kept", ignore_errors=True)
        do(machine)  # what it needs for the next, as layers of disks, is not left over
        gc.collect()
        now = here()
        more = [each for each in now if now.count(each) > before.count(each)
                and not each.startswith(("/var/tmp", "/tmp"))]
        assert len(now) <= len(before), (left, more)
    elif left > 2:
        break
assert worked
assert machine.state == "running", machine
machine.checkpoint()
machine.rollback()
machine.close()
print(told > 0)
"""


@pytest.mark.parametrize("call", ["checkpoint", "rollback", "snapshot", "clone", "restore"])
def test_it_is_said_and_nothing_is_left(call: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, call, str(tmp_path)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    assert done.stdout == ("False\n" if call == "rollback" else "True\n")
