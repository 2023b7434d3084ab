"""vmm/testing/snapshots.py by way of the plugin: which tests share one, and what failed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import projects
from tests.support.projects import MARKED, run_pytest, write


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return projects.small(tmp_path)


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_snapshot_is_shared_by_content(small: Path) -> None:
    """Who prepares otherwise has another machine; who prepares alike has the same snapshot."""
    for name in ("one", "two"):
        (small / name).mkdir()
        (small / name / "conftest.py").write_text(
            "import pytest\n@pytest.fixture\ndef vmm_prepare():\n"
            f"    def prepare(machine): machine.memory.write(0x300000, b'{name}')\n"
            "    return prepare\n"
        )
        (small / name / f"test_{name}.py").write_text(
            MARKED + "@pytest.mark.parametrize('again', range(2))\n"
            "def test_it(restored_machine, again):\n"
            f"    assert restored_machine.memory.read(0x300000, 3) == b'{name}'\n"
        )
    write(
        small,
        MARKED
        + """
import functools

def put(machine, text): machine.memory.write(0x300000, text)

class Of:
    def __init__(self, text): self.text = text
    def prepare(self, machine): put(machine, self.text)

HOW = {
    "closure": lambda text: lambda machine: put(machine, text),
    "partial": lambda text: functools.partial(put, text=text),
    "method": lambda text: Of(text).prepare,
    "default": lambda text: eval(
        "lambda machine, text=text: put(machine, text)", {**globals(), "text": text}
    ),
}

@pytest.fixture(params=["red_", "blue"])
def colour(request):
    return request.param.encode()

@pytest.fixture(params=sorted(HOW))
def vmm_prepare(request, colour):
    return HOW[request.param](colour)

def test_parameters(restored_machine, colour):
    assert restored_machine.memory.read(0x300000, 4) == colour

class TestRequest:
    @pytest.fixture(params=[b"one1", b"two2"])
    def vmm_prepare(self, request):
        return lambda machine: put(machine, request.param)

    @pytest.mark.parametrize("again", range(2))
    def test_it(self, restored_machine, request, again):
        told = request.node.callspec.params["vmm_prepare"]
        assert restored_machine.memory.read(0x300000, 4) == told

TEXT = b"old_"

class TestGlobals:
    @pytest.fixture
    def vmm_prepare(self):
        return lambda machine: put(machine, TEXT)

    @pytest.mark.parametrize("text", [b"old_", b"new_", b"old_"])
    def test_it(self, monkeypatch, request, text):
        monkeypatch.setitem(globals(), "TEXT", text)
        machine = request.getfixturevalue("restored_machine")
        assert machine.memory.read(0x300000, 4) == text

class TestImages:
    @pytest.fixture
    def vmm_prepare(self):
        return None

    def test_another_kernel_at_the_same_path(self, request, vmm_kernel):
        kernel = vmm_kernel.vmlinuz
        code = bytes(kernel.read_bytes())
        first = request.getfixturevalue("restored_machine")
        at = first.memory.read(0x100000, 2)
        assert at == b"\\xff\\x05"
        kernel.write_bytes(code.replace(b"\\xff\\x05", b"\\xff\\x0d"))  # it counts down

    def test_it_is_another(self, restored_machine, vmm_kernel):
        assert restored_machine.memory.read(0x100000, 2) == b"\\xff\\x0d"

def test_how_many(tmp_path_factory):
    base = tmp_path_factory.getbasetemp() / "vmm-snapshots"
    made = [path for path in base.iterdir() if path.is_dir()]
    assert len(made) == 2 + 2 * 4 + 2 + 2 + 2, made
""",
    )
    done = run_pytest(small, "-p", "no:randomly", "one", "two", "test_it.py")
    assert done.returncode == 0, done.stdout
    assert "22 passed" in done.stdout, done.stdout


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_the_workers_of_xdist_share_a_snapshot(small: Path) -> None:
    write(
        small,
        MARKED
        + """
import os
@pytest.fixture
def vmm_prepare():
    def prepare(machine): machine.memory.write(0x300000, os.getpid().to_bytes(4, "little"))
    return prepare

@pytest.mark.parametrize("n", range(6))
def test_it(restored_machine, n, tmp_path_factory):
    base = tmp_path_factory.getbasetemp().parent
    made = [path for path in (base / "vmm-snapshots").iterdir() if path.is_dir()]
    assert len(made) == 1
""",
    )
    done = run_pytest(small, "-n", "2")
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_boot_that_fails_is_tried_once(small: Path) -> None:
    write(
        small,
        MARKED
        + """
import time
TRIED = []

class TestRestored:
    @pytest.fixture
    def vmm_prepare(self):
        def prepare(machine):
            TRIED.append(1)
            raise RuntimeError("the service did not come up")
        return prepare

    @pytest.mark.parametrize("n", range(3))
    def test_it(self, restored_machine, n): pass

    def test_tried_once(self): assert len(TRIED) == 1

class TestSkipped:
    @pytest.fixture
    def vmm_prepare(self):
        def prepare(machine):
            TRIED.append(1)
            pytest.skip("no such service here")
        return prepare

    @pytest.mark.parametrize("n", range(2))
    def test_it(self, restored_machine, n): pass

    def test_tried_once(self): assert len(TRIED) == 2

class TestStuck:
    @pytest.fixture
    def vmm_prepare(self):
        return lambda machine: machine.wait_for("what never comes")

    @pytest.mark.parametrize("n", range(2))
    def test_it(self, restored_machine, n): pass

class TestBooted:
    @pytest.fixture
    def vmm_ready(self):
        return "up and running"

    @pytest.mark.parametrize("n", range(3))
    def test_it(self, booted_machine, n): pass
""",
    )
    (small / "pytest.ini").write_text("[pytest]\nvmm_boot_timeout = 2\nvmm_prepare_timeout = 1.5\n")
    done = run_pytest(small, "-rsE", timeout=100)
    assert "2 passed, 2 skipped, 8 errors" in done.stdout, done.stdout
    assert done.stdout.count("no such service here") >= 1
    told = "vmm: the machine of this snapshot did not come up for test_it.py::TestRestored::"
    # In a CI pytest repeats whole messages in its summary.
    reports = done.stdout.partition("short test summary info")[0]
    assert reports.count(told + "test_it[0]") == 2
    assert "and is tried once a session: RuntimeError: the service did not come up" in done.stdout
    assert "vmm_prepare has taken more than 1.5 s" in done.stdout
    assert "vmm: this machine did not come up for test_it.py::TestBooted::test_it[0]" in done.stdout
    assert "During handling" not in done.stdout
    assert "vmm/testing" not in done.stdout, "a traceback shows the plugin's own lines"
