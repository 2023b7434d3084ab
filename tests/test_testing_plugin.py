"""The pytest plugin as a project meets it: pytest in a process of its own, on small test files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import host, projects, tiny
from tests.support.projects import run_pytest, write

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "pytest-project"
FACTORY = """
import pytest

def test_prints(machine_factory):
    machine = machine_factory({kernel!r}, memory="16M")
    machine.start()
    machine.console.wait_for("ready", timeout=60)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return projects.new(tmp_path)


def test_who_asks_for_no_machine_pays_for_none(project: Path) -> None:
    write(
        project,
        "import sys\n\ndef test_it():\n"
        "    print(sorted(name for name in sys.modules if name.split('.')[0] == 'vmm'))\n"
        "    assert 'vmm.machine' not in sys.modules and 'cffi' not in sys.modules\n",
    )
    done = run_pytest(project)
    assert done.returncode == 0, done.stdout


def test_markers_and_fixtures_are_told(project: Path) -> None:
    done = run_pytest(project, "--markers")
    assert "@pytest.mark.vmm(memory=, cpus=, kernel=, **keywords)" in done.stdout
    done = run_pytest(project, "--fixtures")
    for name in ("booted_machine", "lan", "machine", "machine_factory", "restored_machine"):
        assert f"\n{name}" in done.stdout


@pytest.mark.parametrize(
    "fixture", ["machine_factory", "booted_machine", "restored_machine", "lan"]
)
def test_without_kvm(project: Path, fixture: str) -> None:
    """Skipped with the doctor's sentence; failed where machines are required."""
    write(
        project,
        "import vmm.doctor\n"
        "examine = vmm.doctor.examine\n"
        "vmm.doctor.examine = lambda: examine('/no/such/kvm')\n"
        "def test_it({fixture}):\n    raise AssertionError('it ran')\n",
        fixture=fixture,
    )
    skipped = run_pytest(project)
    assert skipped.returncode == 0, skipped.stdout
    assert "1 skipped" in skipped.stdout
    assert "vmm: Nothing runs here: " in skipped.stdout
    failed = run_pytest(project, "--vmm-require")
    assert failed.returncode == 1
    assert "1 error" in failed.stdout
    assert "vmm: Nothing runs here: " in failed.stdout


@pytest.mark.needs_kvm
@pytest.mark.native_only
@pytest.mark.parametrize("how", ["option", "ini", "environment"])
def test_on_a_kvm_that_boots_no_linux(project: Path, how: str) -> None:
    write(project, "def test_it(booted_machine):\n    raise AssertionError('it ran')\n")
    if how == "option":
        skipped = run_pytest(project)
        assert "vmm: Only small guests run here" in skipped.stdout
        assert "1 skipped" in skipped.stdout
    if how == "ini":
        (project / "pytest.ini").write_text("[pytest]\nvmm_require = true\n")
    options = ["--vmm-require"] if how == "option" else []
    failed = run_pytest(project, *options, VMM_REQUIRE="1" if how == "environment" else "0")
    assert failed.returncode == 1, failed.stdout
    assert "vmm: Only small guests run here" in failed.stdout


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_factory_and_its_markers(project: Path, tmp_path: Path) -> None:
    write(
        project,
        FACTORY
        + """
@pytest.mark.vmm(memory="32M", cpus=2)
class TestMarked:
    @pytest.mark.vmm(cpus=3)
    def test_the_nearest_goes_first(self, machine_factory):
        machine = machine_factory({kernel!r})
        assert (machine.config.memory, machine.config.cpus) == (32 << 20, 3)

kept = []

def test_machines_are_closed(machine_factory):
    machine = machine_factory({kernel!r}, memory="16M")
    machine.start()
    kept.append(machine)

def test_they_were():
    assert kept[0].state == "closed"

@pytest.mark.vmm("512M")
def test_wrong_marker(machine_factory):
    pass
""",
        kernel=tiny.kernel(tmp_path, tiny.prints(b"ready\n") + tiny.HALT),
    )
    done = run_pytest(project)
    assert "4 passed, 1 error" in done.stdout, done.stdout
    assert "mark.vmm takes keywords only" in done.stdout


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_what_a_failure_tells(project: Path, tmp_path: Path) -> None:
    write(
        project,
        FACTORY
        + """
    assert machine.state == "somewhere else"

def test_ended(machine_factory):
    machine = machine_factory({faulty!r}, memory="16M")
    machine.start()
    assert machine.wait(timeout=60).status == 0
""",
        kernel=tiny.kernel(tmp_path, tiny.prints(b"one\nready\n") + tiny.HALT),
        faulty=tiny.kernel(tmp_path, tiny.TRIPLE_FAULT),
    )
    done = run_pytest(project, "--vmm-require")
    assert "2 failed" in done.stdout, done.stdout
    told, ended = done.stdout.split("test_ended", 1)
    assert "vmm machine 0: console, last 2 lines" in told
    assert "one\nready\n" in told
    assert "vmm machine 0: events" in told
    assert " s  started" in told
    assert "state: " in told
    assert "vmm machine 0: registers" in told
    assert "vCPU 0: 32-bit protected mode" in told
    assert "rip  " in told
    assert "vmm machine 0: failure report" in ended
    assert "triple fault" in ended


@pytest.mark.parametrize(
    ("word", "required"),
    [
        *(("", False), ("0", False), ("false", False), ("No", False), ("off", False), (" ", False)),
        *(("1", True), ("TRUE", True), ("yes", True), ("on", True), ("y", True)),
    ],
)
def test_words_for_vmm_require(
    word: str, required: bool, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    from vmm.testing import plugin

    monkeypatch.setenv("VMM_REQUIRE", word)
    assert plugin._required(pytestconfig) is required


def test_what_cannot_be_is_told_in_a_line(project: Path) -> None:
    write(
        project,
        """
import pytest
@pytest.mark.vmm(memroy="1G")
def test_typo(vmm_kernel): pass
""",
    )
    done = run_pytest(project)
    assert (
        "mark.vmm: memroy='1G': MachineConfig has no such keyword; is memory= meant?" in done.stdout
    )
    write(project, "def test_it(machine_factory): pass\n")
    done = run_pytest(project, VMM_REQUIRE="perhaps")
    assert "VMM_REQUIRE='perhaps' is none of 1, true, yes, on, 0, false, no, off" in done.stdout
    (project / "pytest.ini").write_text("[pytest]\nvmm_boot_timeout = soon\n")
    if host.unmet({"needs_kvm"}) is None:
        done = run_pytest(project)
        assert "vmm: vmm_boot_timeout = 'soon' is not a number of seconds" in done.stdout
    assert "vmm/testing" not in done.stdout


def test_a_kernel_that_is_not_there(project: Path) -> None:
    write(project, "def test_it(vmm_kernel):\n    pass\n")
    done = run_pytest(project, "--vmm-kernel", "/no/such/vmlinuz")
    assert done.returncode == 1
    assert "vmm: kernel /no/such/vmlinuz: no such file" in done.stdout


@pytest.mark.needs_kvm
@pytest.mark.native_only
def test_the_example_is_skipped_where_it_cannot_run() -> None:
    done = run_pytest(EXAMPLE)
    assert done.returncode == 0, done.stdout
    assert "11 skipped" in done.stdout, done.stdout


@pytest.mark.needs_linux_kvm
@pytest.mark.timeout(1500)
def test_the_example_under_linux(cloud_kernel: object) -> None:
    """Every fixture, as its project's own CI runs them: by two workers, machines required."""
    workers = [] if host.emulated() else ["-n", "2"]
    done = run_pytest(EXAMPLE, "--vmm-require", *workers, timeout=1400)
    assert done.returncode == 0, done.stdout
    assert "11 passed" in done.stdout
