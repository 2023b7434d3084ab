"""vmm/sandbox/cgroup.py, and the launcher's use of it: all that a helper starts ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bare import until
from tests.support.helpers import LOOSE
from tests.test_child import running, wait_for_pid
from vmm.child import Child
from vmm.sandbox import cgroup
from vmm.sandbox.cgroup import Cgroup


@pytest.fixture
def top() -> Iterator[Path]:
    """This process's cgroup, if it may be divided; nothing is left in it."""
    try:
        made = Cgroup("probe")
    except OSError as err:
        pytest.skip(f"no cgroup can be made here: {err}")
    made.close()
    top = Path(cgroup.directory())
    before = groups(top)
    yield top
    until(lambda: groups(top) <= before, "a cgroup is left")


def groups(top: Path) -> set[str]:
    return {each.name for each in top.iterdir() if each.name.startswith(cgroup.PREFIX)}


def of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line for line in lines if line.startswith("0::")).rpartition("/")[2]


STRAYS = "(setsid /bin/sh -c 'echo $$ > {0}/stray; trap \"\" TERM; while :; do sleep 1; done') & " \
    "echo $$ > {0}/pid; exec sleep 1000"  # fmt: skip


@pytest.mark.parametrize("keeper", [True, False])
def test_what_a_helper_has_started_ends_with_it(tmp_path: Path, top: Path, keeper: bool) -> None:
    child = Child(["/bin/sh", "-c", STRAYS.format(tmp_path)], LOOSE, keeper=keeper)
    pid, stray = wait_for_pid(tmp_path / "pid"), wait_for_pid(tmp_path / "stray")
    (name,) = groups(top)
    assert name.startswith(f"{cgroup.PREFIX}{os.getpid()}-") and name.endswith("-sh")
    assert of(pid) == of(stray) == name != of(os.getpid())
    child.close()
    assert not running(pid)
    until(lambda: not running(stray) and groups(top) == set())


@pytest.mark.parametrize("keeper", [True, False])
def test_and_when_we_are_killed(tmp_path: Path, top: Path, keeper: bool) -> None:
    code = (
        "import time; from vmm.child import Child; from tests.support.helpers import LOOSE\n"
        f"c = Child(['/bin/sh', '-c', {STRAYS.format(tmp_path)!r}], LOOSE, keeper={keeper})\n"
        "time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        try:
            pid, stray = wait_for_pid(tmp_path / "pid"), wait_for_pid(tmp_path / "stray")
            assert of(stray) == of(pid) != of(os.getpid())
        finally:
            parent.send_signal(signal.SIGKILL)
    until(lambda: not running(pid) and not running(stray))
    until(lambda: groups(top) == set())


def test_what_a_killed_process_has_left_is_swept(top: Path) -> None:
    """Killed between making the cgroup and starting who removes it."""
    with subprocess.Popen(["/bin/true"]) as gone:
        pass
    left = top / f"{cgroup.PREFIX}{gone.pid}-0-x"
    left.mkdir()
    Cgroup("probe").close()
    assert not left.exists()


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "directory", lambda: "")
    child = Child(["/bin/sh", "-c", "exit 3"], LOOSE)
    assert child.wait(20) and child.how() == "has ended (status 3)"
    child.close()


def test_one_that_has_ended_at_once(top: Path) -> None:
    for keeper in (False, True):
        child = Child(["/bin/sh", "-c", "exit 3"], LOOSE, keeper=keeper)
        assert child.wait(20) and child.how() == "has ended (status 3)"
        child.close()
        child.close()


def test_a_forked_child_leaves_it(top: Path, tmp_path: Path) -> None:
    child = Child(["/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000"], LOOSE)
    pid = wait_for_pid(tmp_path / "pid")
    forked = os.fork()
    if not forked:
        child.close()
        os._exit(0)
    os.waitpid(forked, 0)
    assert running(pid) and len(groups(top)) == 1
    child.close()


def test_names_in_mountinfo() -> None:
    assert cgroup._unescaped(rb"/a\040b\134c") == "/a b\\c"
    assert cgroup._unescaped("/é".encode()) == "/é"
