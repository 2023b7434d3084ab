"""hatch_build.py and pyproject.toml: the wheel and the sdist that a release would put on PyPI."""

from __future__ import annotations

import ast
import email
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import hatch_build
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = PROJECT["name"]
FROM_PYPI = re.compile(
    r"""pip3? install(?: +-\S+)* +['"]?vmm(?:\[[^\]]*\])?(?=['"\s`=<>~]|$)""", re.M
)
"""A command that installs the package `vmm` of PyPI, which is somebody else's."""


def pythons() -> Iterator[str]:
    """Every Python here that the project is for."""
    places = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    places += sorted(Path.home().glob(".pyenv/versions/3.*/bin"))
    for minor in (11, 12, 13, 14):
        for place in places:
            found = place / f"python3.{minor}"
            # pyenv's own shims are there for versions that are not chosen
            if found.exists() and "shims" not in found.parts:
                yield str(found)
                break


def build(out: Path, *arguments: str, cwd: Path = ROOT, **env: str) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", out, *arguments, cwd],
        env={**os.environ, **env}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    build(out)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(out, filter="data")
    return next(out.iterdir())


@pytest.fixture(scope="module")
def bare_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without a C compiler."""
    return build(tmp_path_factory.mktemp("bare"), "--wheel", cwd=sdist, CC="/bin/false")


def install(wheel: Path, directory: Path, python: str = sys.executable) -> Path:
    """A fresh venv with the wheel in it; its bin directory."""
    subprocess.run([python, "-m", "venv", "--without-pip", directory], check=True)
    pip = [sys.executable, "-m", "pip", "--python", directory / "bin" / "python"]
    pip += ["--disable-pip-version-check", "install", "-q", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    return directory / "bin"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd="/"
    )


def test_pypi_takes_the_tag_and_auditwheel_agrees(wheel: Path) -> None:
    found = re.fullmatch(r"vmm_kvm-.*-py3-none-(manylinux_2_(\d+)_x86_64)\.whl", wheel.name)
    assert found and 17 <= int(found[2]) <= 28, wheel.name
    shown = run(sys.executable, "-m", "auditwheel", "show", wheel)
    assert f'following platform tag:\n"{found[1]}"' in shown.stdout.replace(": ", ":\n"), shown


def test_the_metadata_are_as_pypi_wants_them(dist: Path) -> None:
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    assert checked.returncode == 0, checked.stdout


def test_what_is_compiled_is_stripped_and_the_agent_needs_no_library(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        elves = {n: data for n in archive.namelist() if (data := archive.read(n))[:4] == b"\x7fELF"}
        modes = {i.filename: i.external_attr >> 16 for i in archive.infolist()}
    library = next(n for n in elves if n.endswith("/_kernel.so"))
    agent = next(n for n in elves if "/vmm-agent-" in n)
    assert len(elves) == 2
    for data in elves.values():
        assert b".symtab" not in data and b".debug_info" not in data
    assert b"libc.so.6" in elves[library]
    assert b"ld-linux" not in elves[agent] and b".dynamic" not in elves[agent]
    assert modes[agent] & 0o111


def test_the_sdist_has_sources_alone_and_makes_the_same_wheel(sdist: Path, wheel: Path) -> None:
    there = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    made = [n for n in there if re.search(r"/_abi\.py$|\.so$|vmm-agent-|^build/|\.pyc$", n)]
    assert made == []
    assert {"pyproject.toml", "hatch_build.py", "bin/vmm", "vmm/agent/main.c"} <= there
    with zipfile.ZipFile(wheel) as archive:
        modules = {n for n in archive.namelist() if n.startswith("vmm/") and n.endswith(".py")}
    assert {str(p.relative_to(ROOT)) for p in ROOT.glob("vmm/**/*.py")} == modules


def test_the_wheel_has_man_page_completions_and_documents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n.partition(".data/data/")[2] for n in archive.namelist()}
    assert {
        "share/man/man1/vmm.1",
        "share/bash-completion/completions/vmm",
        "share/zsh/site-functions/_vmm",
        "share/fish/vendor_completions.d/vmm.fish",
        *(f"share/doc/vmm/docs/{page.name}" for page in ROOT.glob("docs/*.md")),
    } <= names


@pytest.mark.parametrize("python", list(pythons()))
def test_a_fresh_venv_with_the_wheel(wheel: Path, tmp_path: Path, python: str) -> None:
    """One wheel for every Python: the compiled library knows nothing of it."""
    bin = install(wheel, tmp_path / "venv", python)
    version = run(bin / "vmm", "version")
    assert version.returncode == 0, version.stderr
    assert version.stdout.startswith(f"vmm {PROJECT['version']}\n")
    assert re.search(r"^C path +compiled", version.stdout, re.M), version.stdout
    assert re.search(r"^agent +compiled", version.stdout, re.M), version.stdout
    assert run(bin / "vmm", "doctor", "--json").returncode in (0, 69)
    assert (tmp_path / "venv/share/man/man1/vmm.1").exists()
    uses = "from vmm.virtio import kernel; import cffi; assert kernel.library() is not None"
    assert run(bin / "python", "-c", uses).returncode == 0


def test_without_a_compiler_it_is_said_what_is_not_there(
    bare_wheel: Path, dist: Path, tmp_path: Path
) -> None:
    assert bare_wheel.name.endswith("-py3-none-any.whl")
    bin = install(bare_wheel, tmp_path / "venv")
    bare = ("/usr/bin/env", "-u", "CC", f"PATH={bin}", f"VMM_CACHE={tmp_path}", bin / "vmm")
    version = run(*bare, "version")
    assert re.search(r"^C path +not there", version.stdout, re.M), version.stdout
    assert re.search(r"^agent +not there", version.stdout, re.M), version.stdout
    parts = json.loads(run(*bare, "doctor", "--json").stdout)["parts"]
    assert not parts["C path"]["there"] and not parts["agent"]["there"]
    assert "gcc" in parts["C path"]["mend"] and "gcc" in parts["agent"]["mend"]
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        said = run(*bare, "run", tiny.kernel(tmp_path, tiny.exits(7)), "-v")
        assert said.returncode == 7 and "built without a C compiler" in said.stderr, said
    # The mend is one, where PyPI has what was built here.
    mend = parts["C path"]["mend"].partition("; then ")[2]
    assert mend.startswith("pip install ") and mend.endswith(NAME)
    pip = f"{sys.executable} -m pip --python {bin}/python {mend.removeprefix('pip ')}"
    mended = subprocess.run(
        pip.split(), env={**os.environ, "PIP_FIND_LINKS": str(dist)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert mended.returncode == 0, mended.stderr
    assert re.search(r"^C path +compiled", run(*bare, "version").stdout, re.M)


def names_of_other_people(text: str) -> list[str]:
    return [match[0] for match in FROM_PYPI.finditer(text)]


def test_no_text_installs_somebody_elses_package() -> None:
    assert names_of_other_people("run pip install 'vmm[full]'") and NAME != "vmm"
    assert names_of_other_people("`pip install -U vmm`")
    assert not names_of_other_people("pip install 'vmm-kvm[full]'")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    files = [ROOT / name for name in listed if name] or list(ROOT.glob("**/*.md"))
    for path in files:
        if path == Path(__file__) or path.suffix not in (".md", ".py", ".toml", ".sh", ".yml", ""):
            continue
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        assert names_of_other_people(text) == [], path
        if path.name == "pyproject.toml":
            project = tomllib.loads(text)["project"]
            extras = project.get("optional-dependencies", {}).values()
            needed = [
                *project.get("dependencies", ()),
                *(each for extra in extras for each in extra),
            ]
            assert "vmm" not in {re.split(r"[^\w.-]", each)[0] for each in needed}, path


def test_messages_name_no_file_that_the_wheel_lacks() -> None:
    """docs/ is in the repository, and in PREFIX/share/doc/vmm: a message cannot tell which."""
    for path in ROOT.glob("vmm/**/*.py"):
        tree = ast.parse(path.read_text())
        # Strings that stand alone: docstrings, of attributes too.
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?:docs|examples|tests|tools)/\w[\w./-]*", node.value)
                if id(node) in docstrings:
                    pages = [n for n in named if re.fullmatch(r"docs/[a-z]+\.md", n)]
                    assert all((ROOT / page).exists() for page in pages), (path, pages)
                elif "share/doc/vmm" not in node.value:
                    assert named == [], (path, node.lineno, named)


def test_links_on_pypi_lead_somewhere() -> None:
    text = "See [docs/a.md](docs/a.md), [us](https://x.org/y) and [below](#more)."
    there = hatch_build.linked_readme(text, "https://x.org/vmm")
    assert "[docs/a.md](https://x.org/vmm/blob/HEAD/docs/a.md)" in there
    nowhere = hatch_build.linked_readme(text, "")
    assert nowhere == "See docs/a.md, [us](https://x.org/y) and [below](#more)."


def test_the_readme_in_the_wheel_has_no_relative_link(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(archive.read(name))
    text = told.get_payload()
    assert isinstance(text, str) and text.lstrip().startswith("# vmm")
    assert [m[1] for m in re.finditer(r"\]\(([^)]+)\)", text) if "://" not in m[1]] == []
    urls = dict(url.split(", ", 1) for url in told.get_all("Project-URL", []))
    assert urls["Homepage"].startswith("https://")


@pytest.mark.parametrize(
    ("versions", "tag"),
    [(b"GLIBC_2.2.5\0GLIBC_2.14\0", "2_17"), (b"GLIBC_2.2.5\0GLIBC_2.34\0", "2_34"), (b"", "")],
)
def test_the_tag_is_the_newest_symbol(versions: bytes, tag: str) -> None:
    found = hatch_build.platform_tag(b"\x7fELF...\0" + versions)
    assert found == (f"manylinux_{tag}_x86_64" if tag else "linux_x86_64")
