"""vmm/testing/machines.py and bounded.py by way of the plugin: whose machines live how long."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import projects, tiny
from tests.support.projects import MARKED, run_pytest, write


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return projects.new(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return projects.small(tmp_path)


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_fixtures_leave_each_others_machines_alone(small: Path) -> None:
    write(
        small,
        MARKED
        + """
def test_booted_then_restored(booted_machine, restored_machine):
    assert (booted_machine.state, restored_machine.state) == ("running", "running")

def test_restored_then_booted(restored_machine, booted_machine):
    assert (booted_machine.state, restored_machine.state) == ("running", "running")

KEPT = []

def test_a_factorys_too(request, machine_factory, vmm_kernel, machine):
    mine = machine_factory(vmm_kernel)
    mine.start()
    KEPT.extend([mine, machine, request.getfixturevalue("restored_machine"), *mine.clone(2)])
    assert [made.state for made in KEPT] == ["running", "created"] + ["running"] * 3

def test_all_were_closed():
    assert [made.state for made in KEPT] == ["closed"] * 5
""",
    )
    done = run_pytest(small)
    assert "4 passed" in done.stdout, done.stdout


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_failing_test_stops_no_other(project: Path, tmp_path: Path) -> None:
    """A function of the test that waits for ever, a close that raises, a subtest, pdb."""
    read = b"\x66\xba\x10\x05\xed"  # mov dx, 0x510; in eax, dx
    write(
        project,
        """
import threading, time
import pytest

KEPT = []

@pytest.mark.timeout(40)
def test_waits(machine_factory):
    machine = machine_factory({waiting!r}, memory="16M")
    called, go = threading.Event(), threading.Event()
    def answer(offset, size):
        called.set()
        go.wait()
        return 0
    machine.bind_port(0x510, 4, read=answer)
    machine.start()
    assert called.wait(20)
    assert 0, "before the guest could go on"

def test_close_raises(machine_factory):
    one, two, three = (machine_factory({counting!r}, memory="16M") for _ in range(3))
    for machine in (one, two, three):
        machine.start()
    def bad(): raise OSError("a part of it does not close")
    two.at_close(bad)
    KEPT.extend([one, two, three])

def test_close_waits(machine_factory):
    one, two = (machine_factory({counting!r}, memory="16M") for _ in range(2))
    one.at_close(lambda: threading.Event().wait())
    two.start()
    KEPT.append(two)

def test_all_were_closed():
    assert [machine.state for machine in KEPT] == ["closed"] * 4

def test_subtests(machine_factory, subtests):
    machine = machine_factory({counting!r}, memory="16M")
    machine.start()
    with subtests.test("one"):
        assert 0
    with subtests.test("two"):
        assert machine.state == "running"
    with subtests.test("three"):
        before, until = machine.memory.read_u32(0x200000), time.monotonic() + 20
        while machine.memory.read_u32(0x200000) == before:
            assert time.monotonic() < until, "the guest stands still"
    machine.pause()
    with subtests.test("four"):
        assert 0
    with subtests.test("five"):
        assert machine.state == "paused"

@pytest.mark.xfail
def test_expected(machine_factory):
    machine_factory({counting!r}, memory="16M")
    assert 0
""",
        waiting=tiny.kernel(tmp_path, read + tiny.HALT),
        counting=tiny.kernel(tmp_path, tiny.COUNTING),
    )
    done = run_pytest(project, "-rf", "--vmm-artifacts=kept", timeout=55)
    first, rest = done.stdout.split("_ test_subtests", 1)
    assert "not to be had within 2 s\nvCPU 0 is in answer (" in first
    assert "a part of it does not close" in done.stdout
    assert "closing vmm machine 1 (" in done.stdout
    assert "LateError: the machine does not close; it is in <lambda> (" in done.stdout
    assert re.search(r"RuntimeWarning: .*: vCPU 0 is in answer \(.*; what that uses", done.stdout)
    assert "contains 2 failed subtests" in rest
    assert "SUBFAILED[one]" in done.stdout
    assert "1 xfailed" in done.stdout
    assert "SUBFAILED[four]" in done.stdout
    for passed in ("[two]", "[three]", "[five]"):
        assert passed not in done.stdout, done.stdout
    assert "test_all_were_closed" not in done.stdout, done.stdout
    names = sorted(path.name for path in (project / "kept").iterdir())
    assert names == ["test_it.py-test_subtests", "test_it.py-test_waits"]  # and none for xfail
    reports = (project / "kept" / "test_it.py-test_subtests").glob("report*.html")
    assert len(list(reports)) == 2  # one for each subtest


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_debugger_finds_it_running(project: Path, tmp_path: Path) -> None:
    write(
        project,
        "def test_it(machine_factory):\n"
        "    machine = machine_factory({kernel!r}, memory='16M')\n"
        "    machine.start()\n"
        "    assert 0\n",
        kernel=tiny.kernel(tmp_path, tiny.COUNTING),
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pdb"]
    done = subprocess.run(
        command, cwd=project, input="p 'it is', machine.state\nq\n", capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert "('it is', 'running')" in done.stdout, done.stdout


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_machines_of_a_module_and_of_a_session(project: Path, tmp_path: Path) -> None:
    kernel = tiny.kernel(tmp_path, tiny.prints(b"ready\n") + tiny.COUNTING)
    (project / "conftest.py").write_text(
        f"""
import pytest

@pytest.fixture(scope="session")
def hub(session_machine_factory):
    return session_machine_factory.boot(
        {kernel!r}, memory="16M", agent=False, initrds=[{__file__!r}], ready="ready"
    )

@pytest.fixture(scope="module")
def server(module_machine_factory):
    machine = module_machine_factory({kernel!r})
    machine.start()
    return machine
"""
    )
    for name in ("one", "two"):
        (project / f"test_{name}.py").write_text(
            f"""
import pytest
pytestmark = pytest.mark.vmm(memory="{24 if name == "one" else 32}M")
import builtins
kept = builtins.__dict__.setdefault("kept", [])

def test_first(server, hub):
    assert server.config.memory == {24 if name == "one" else 32} << 20
    assert not kept or (kept[0].state == "closed" and kept[1] is hub)
    kept[:] = [server, hub]
    server.memory.write(0x300000, b"{name}")

def test_second(server, hub):
    assert server.memory.read(0x300000, 3) == b"{name}"
    assert hub.state == server.state == "running"

def test_fails(server, request):
    assert 0

def test_uses_none():
    assert 0
"""
        )
    done = run_pytest(project)
    assert "4 failed, 4 passed" in done.stdout, done.stdout
    assert done.stdout.count("vmm machine 0: registers") == 2
    assert "vmm machine 1" not in done.stdout  # the hub is no machine of test_fails
