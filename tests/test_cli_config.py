"""`vmm config`, and `vmm run` with a file."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from tests.support import tiny
from tests.test_public import loaded_after
from vmm.config_schema import SCHEMA
from vmm.errors import EXIT_USAGE

needs_kvm = pytest.mark.needs_kvm


def test_the_schema_is_printed() -> None:
    done = tiny.run("config", "--schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == SCHEMA
    jsonschema.Draft202012Validator.check_schema(json.loads(done.stdout))


def test_a_good_file_is_printed_normalised(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text("kernel = 'k'\nmemory = '1.5G'\ncpus = 1\ndrives = ['d.img,readonly']\n")
    done = tiny.run("config", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    assert data == {
        "kernel": f"{tmp_path}/k",
        "memory": 3 << 29,
        "drives": [{"path": f"{tmp_path}/d.img", "readonly": True}],
    }
    again = tmp_path / "again.json"
    again.write_text(done.stdout)
    assert tiny.run("config", str(again)).stdout == done.stdout
    whole = json.loads(tiny.run("config", "--all", str(again)).stdout)
    assert whole["cpus"] == 1 and whole.items() >= {"kernel": f"{tmp_path}/k"}.items()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no FILE given (see vmm config --help)"),
        (["{}/wrong.toml"], "{}/wrong.toml: cpus: 'x' is not a whole number"),
        (["{}/bad.toml"], "{}/bad.toml: line 2: Cannot overwrite a value"),
        (["{}/kernel"], "{}/kernel: a configuration's name ends in .toml or .json"),
        (["{}/nosuch.json"], "{}/nosuch.json: No such file or directory"),
        (["a.toml", "b.toml"], "only one FILE can be given, not 'a.toml' and 'b.toml' (see vmm"),
        (["--schema", "x"], "'x' is one argument too many (see vmm config --help)"),
        (["--shema"], "'--shema' is no option; --schema is one (see vmm config --help)"),
    ],
    ids=str,
)
def test_wrong_use(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "wrong.toml").write_text("cpus = 'x'")
    (tmp_path / "bad.toml").write_text("cpus = 1\ncpus = 1")
    done = tiny.run("config", *(word.format(tmp_path) for word in arguments))
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    assert done.stderr.startswith("vmm: " + says.format(tmp_path))
    assert done.stderr.count("\n") == 1


# --- vmm run --------------------------------------------------------------------------------------


@needs_kvm
@pytest.mark.parametrize("name", ["machine.toml", "machine.json"])
def test_a_machine_runs_from_a_file(tmp_path: Path, name: str) -> None:
    kernel = tiny.kernel(tmp_path, tiny.prints(b"hi\n") + tiny.exits(9))
    text = f'kernel = "{Path(kernel).name}"\nmemory = "16M"\n'
    if name.endswith("json"):
        text = json.dumps({"kernel": Path(kernel).name, "memory": 16 << 20})
    (tmp_path / name).write_text(text)
    done = tiny.run("run", str(tmp_path / name))
    assert (done.returncode, done.stdout) == (9, "hi\n")  # on this terminal, as without a file


@needs_kvm
@pytest.mark.one_lane
def test_options_beside_a_file_override_and_add(tmp_path: Path) -> None:
    kernel = tiny.kernel(tmp_path, tiny.exits(9))
    file = tmp_path / "machine.toml"
    file.write_text(f'kernel = "{kernel}"\nmemory = "16M"\nappend = "one"\ncpus = 2\n')
    done = tiny.run("run", str(file), "--cpus", "1", "--append", "two", "-v")
    assert done.returncode == 9
    assert "vmm: 1 vCPU (host), 16 MiB of memory\n" in done.stderr
    assert "pci=conf1,noearly one two\n" in done.stderr


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("cpus = 2", [], "{}: kernel is missing; it is the path of a bzImage or vmlinux"),
        ("kernel = 'k'\ncpus = 0", [], "{}: cpus: 0 is not a number from 1 to 254"),
        ("kernel = 'k'\ncpus = 2", ["--cpus", "0"], "--cpus 0 is not a number from 1 to 254"),
        ("kernel = ", [], "{}: line 1"),
        ("kernel = 'nosuch'", [], "vmm: kernel {dir}/nosuch: no such file"),
    ],
    ids=str,
)
def test_wrong_files_to_run(tmp_path: Path, text: str, options: list[str], says: str) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(text)
    done = tiny.run("run", str(file), *options)
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    assert says.replace("{}", str(file)).replace("{dir}", str(tmp_path)) in done.stderr
    assert done.stderr.startswith("vmm: ") and done.stderr.count("\n") == 1


def test_without_a_file_nothing_of_this_is_loaded() -> None:
    loaded = loaded_after(
        "from vmm.cli.run import PARSER, configure; configure(PARSER.parse(['k', '--cpus', '2']))"
    )
    assert not loaded & {"vmm.config_file", "vmm.config_schema", "json", "tomllib", "re"}
