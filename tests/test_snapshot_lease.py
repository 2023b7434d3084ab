"""vmm.snapshot.lease: files of a snapshot that somebody changes under a machine restored from it.

What would end the process with SIGBUS runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import Machine, MachineConfig, StateError
from vmm.snapshot import lease

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane]
WORD = 0x300000
"""A place that the guest does not write to; COUNTER is one that it does."""

SCRIPT = f"""
import os, sys, time
from vmm import Machine
from vmm.snapshot import lease
how = sys.argv[1]
def counts(m):
    before = m.memory.read_u32({tiny.COUNTER})
    limit = time.monotonic() + 60
    while m.memory.read_u32({tiny.COUNTER}) == before:
        assert time.monotonic() < limit, "the guest stands still"
with Machine.restore("snapshot") as m, Machine.restore("snapshot") as other:
    m.start()
    counts(m)
    copies = m.clone(2) if how == "copies" else []
    os.truncate("snapshot/memory", 4096)
    for each in (m, *copies):
        counts(each)
        assert each.memory.read({WORD}, 4) == b"word", each.memory.read({WORD}, 4)
    m.pause()
    other.start()
    counts(other)
    for each in copies:
        each.close()
assert not lease._leases
print("all right")
"""


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    with Machine(tiny_config(tmp_path)) as m:
        m.memory.write(WORD, b"word")
        m.start()
        m.snapshot(str(tmp_path / "snapshot"))
    return tmp_path / "snapshot"


def tiny_config(directory: Path) -> MachineConfig:
    return MachineConfig(tiny.kernel(directory, tiny.COUNTING), memory="8M")


@pytest.mark.parametrize("how", ["alone", "copies"])
def test_a_file_cut_short_under_machines_that_run(snapshot: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        cwd=snapshot.parent, env=tiny.environment(), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "all right\n"), done.stderr


def test_a_file_written_to(snapshot: Path) -> None:
    with Machine.restore(str(snapshot)) as m:
        with open(snapshot / "memory", "r+b") as file:
            file.seek(WORD)
            file.write(b"ruin")
        assert m.memory.read(WORD, 4) == b"word"
        m.start()
        m.pause()
        m.snapshot(str(snapshot.parent / "second"))  # it is whole all the same
    with Machine.restore(str(snapshot.parent / "second"), verify=True) as m:
        assert m.memory.read(WORD, 4) == b"word"


def test_no_way_back_to_what_the_file_held(snapshot: Path) -> None:
    with Machine.restore(str(snapshot)) as m:
        m.checkpoint()
        os.truncate(snapshot / "memory", 8 << 20)
        with pytest.raises(StateError, match="somebody has changed the snapshot's file"):
            m.rollback()
        m.checkpoint()
        m.memory.write(WORD, b"more")
        m.rollback()
        assert m.memory.read(WORD, 4) == b"word"


def test_nothing_is_left_of_a_lease(snapshot: Path) -> None:
    Machine.restore(str(snapshot)).close()  # the watcher stays
    before = tiny.descriptors()
    with Machine.restore(str(snapshot)), Machine.restore(str(snapshot)):
        assert len(lease._leases) == 1
    assert lease._leases == {}
    assert tiny.opened_since(before) == []
    os.truncate(snapshot / "memory", 0)  # at once


def test_where_there_is_none(snapshot: Path) -> None:
    """Somebody has the file open for writing: it is mapped as ever."""
    with open(snapshot / "memory", "r+b"), Machine.restore(str(snapshot)) as m:
        assert lease._leases == {}
        assert m.memory.read(WORD, 4) == b"word"


def test_a_forked_child_has_none(snapshot: Path) -> None:
    with Machine.restore(str(snapshot)):
        child = os.fork()
        if not child:
            os._exit(bool(lease._leases) or lease._watcher)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert lease._leases


def test_a_memory_that_is_over_another_file_needs_the_former_no_longer(snapshot: Path) -> None:
    with Machine.restore(str(snapshot)) as m:
        for number in range(3):
            m.snapshot(str(snapshot.parent / f"next{number}"), track=True)
            assert len(lease._leases) == 1
        os.truncate(snapshot / "memory", 0)
        assert m.memory.read(WORD, 4) == b"word"
