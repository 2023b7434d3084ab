"""vmm/own_directory.py, vmm/agent/cache.py: caches that somebody else could have filled."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm import own_directory
from vmm.agent import binary, cache, modules
from vmm.errors import HostError
from vmm.testing.kernels import debian_kernel
from vmm.testing.tiny import tiny_kernel

SOMEBODY = 54321


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.delenv("VMM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(path))
    return path


def test_what_is_kept_is_there_again(home: Path) -> None:
    before = os.umask(0)
    try:
        cache.write("modules-x", b"found")
    finally:
        os.umask(before)
    directory = home / ".cache" / "vmm" / "agent"
    assert cache.read("modules-x") == b"found"
    assert [each.name for each in directory.iterdir()] == ["modules-x"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "modules-x").stat().st_mode) == 0o600


def theirs(path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root, to give a file to another user")
    os.chown(path, SOMEBODY, SOMEBODY)


@pytest.mark.parametrize("how", ["another user's", "writable by others", "a link"])
def test_a_directory_of_somebody_elses(home: Path, tmp_path: Path, how: str) -> None:
    """As root has it with `sudo` that keeps HOME."""
    directory = home / ".cache" / "vmm" / "agent"
    directory.mkdir(parents=True)
    (directory / "modules-x").write_bytes(b"poison")
    (directory / f"{binary.SHIPPED}-{binary.fingerprint()}").write_bytes(b"\x7fELF")
    if how == "another user's":
        theirs(directory)
    elif how == "a link":
        directory.rename(tmp_path / "elsewhere")
        directory.symlink_to(tmp_path / "elsewhere")
    else:
        directory.chmod(0o777)
    before = sorted(directory.iterdir())
    assert cache.read("modules-x") is None
    cache.write("modules-y", b"found")
    assert sorted(directory.iterdir()) == before


def test_nothing_is_made_in_somebody_elses_home(home: Path) -> None:
    theirs(home)
    cache.write("modules-x", b"found")
    assert list(home.iterdir()) == []
    with pytest.raises(PermissionError, match="belongs to another user"):
        own_directory.find("agent")


@pytest.mark.parametrize(
    "what", ["another user's", "writable by others", "a link", "a FIFO", "long"]
)
def test_an_entry_that_is_none(home: Path, tmp_path: Path, what: str) -> None:
    cache.write("modules-x", b"found")
    entry = home / ".cache" / "vmm" / "agent" / "modules-x"
    if what == "another user's":
        theirs(entry)
    elif what == "writable by others":
        entry.chmod(0o666)
    elif what == "long":
        os.truncate(entry, 1 << 40)
    else:
        entry.unlink()
        if what == "a FIFO":
            os.mkfifo(entry)
        else:
            (tmp_path / "other").write_bytes(b"poison")
            entry.symlink_to(tmp_path / "other")
    assert cache.read("modules-x") is None
    cache.write("modules-x", b"anew")  # replaced, not written through
    assert cache.read("modules-x") == b"anew"
    assert what != "a link" or (tmp_path / "other").read_bytes() == b"poison"


def test_the_agent_is_not_taken_from_somebody_else(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A package without the compiled program.
    monkeypatch.setattr(binary, "fingerprint", lambda: "0123")
    name = f"{binary.SHIPPED}-0123"
    directory = home / ".cache" / "vmm" / "agent"
    directory.mkdir(parents=True)
    (directory / name).write_bytes(b"\x7fELF")
    assert binary.found() == str(directory / name)
    theirs(directory / name)
    assert binary.found() is None
    theirs(directory)
    assert binary.found() is None
    with pytest.raises(HostError, match="have VMM_CACHE name a directory of this user's own"):
        binary.program()


@pytest.mark.usefixtures("home")
def test_kept_modules_are_the_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an entry lists, no other file goes into a guest."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.ko").write_bytes(b"module")
    (tmp_path / "secret").write_bytes(b"secret")
    monkeypatch.chdir(tmp_path)

    def kept(*paths: Path | str) -> list[bytes] | None:
        lines = [f"found {modules._lists(str(tree))}", *(modules._identity(str(p)) for p in paths)]
        cache.write(modules._name(str(tree), ["a"], [], "6.1"), "\n".join(lines).encode())
        return modules._kept(str(tree), ["a"], [], "6.1")

    assert kept(tree / "a.ko") == [b"module"]
    for path in (tmp_path / "secret", tree / ".." / "secret", f"{tree}/a/../../secret", "secret"):
        (tree / "a").mkdir(exist_ok=True)
        assert kept(path) is None, path


def test_umask_002(home: Path) -> None:
    """Ubuntu's, where each user has a group: neither the directory of an older version nor the
    compiled program is somebody else's for that."""
    before = os.umask(0o002)
    try:
        directory = home / ".cache" / "vmm" / "agent"
        directory.mkdir(parents=True)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o775
        cache.write("x", b"mine")
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755
        path = directory / f"{binary.SHIPPED}-{binary.fingerprint()}"
        binary.build(str(path))
    finally:
        os.umask(before)
    assert cache.read("x") == b"mine"
    assert own_directory.is_own(path.stat())


@pytest.mark.parametrize("make", [debian_kernel, tiny_kernel])
def test_nothing_is_unpacked_or_built_in_somebody_elses_cache(
    home: Path, make: Callable[[], object]
) -> None:
    kernels = home / ".cache" / "vmm" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "linux-image-6.1.0-1-cloud-amd64_6.1.1-1_amd64.deb").write_bytes(b"!<arch>\n")
    theirs(kernels)
    before = sorted(kernels.iterdir())
    with pytest.raises(HostError, match="belongs to another user; have VMM_CACHE name a directory"):
        make()
    assert sorted(kernels.iterdir()) == before
