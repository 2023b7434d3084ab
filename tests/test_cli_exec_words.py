"""vmm/cli/exec_words.py: `vmm exec` in a tree where a kernel was built, and without `--`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import build_tree
from vmm.cli.exec import PARSER
from vmm.cli.exec_words import parse
from vmm.errors import UsageError
from vmm.testing.kernels import Kernel


@pytest.fixture(scope="module")
def tree(cloud_kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tree.make(tmp_path_factory.mktemp("build") / "linux", cloud_kernel)


@pytest.mark.parametrize("below", ["", "tools/testing/selftests"])
def test_the_trees_kernel(tree: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    monkeypatch.chdir(tree / below)
    args, found = parse(PARSER, ["--cpus", "2", "-v"], ["true"], True)
    assert args.operands == [str(tree / "arch/x86/boot/bzImage")] and found == str(tree)
    assert args.value("--cpus") == "2"
    args, found = parse(PARSER, ["/boot/vmlinuz"], ["true"], True)
    assert args.operands == ["/boot/vmlinuz"] and found is None


def test_the_tree_as_the_kernel(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    args, found = parse(PARSER, ["-v", "linux", "--root", "x"], ["true"], True)
    assert args.operands == ["linux/arch/x86/boot/bzImage"] and found == "linux"


def test_a_vmlinux_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was configured, and then perhaps built; bzImage goes first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "include/config").mkdir(parents=True)
    (tmp_path / "include/config/auto.conf").touch()
    with pytest.raises(UsageError, match=r"has none built yet: make -j\$\(nproc\) bzImage modules"):
        parse(PARSER, [], ["true"], True)
    (tmp_path / "vmlinux").touch()
    assert parse(PARSER, [], ["true"], True)[0].operands == [str(tmp_path / "vmlinux")]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("k uname -r", "'uname': the command comes after --: vmm exec k -- uname -r"),
        ("k --root / uname -r", "'uname': the command comes after --: vmm exec k --root / -- un"),
        ("-v k --root=/ sh -c 'a b'", "vmm exec -v k --root=/ -- sh -c 'a b'"),
        ("k --root / --rng ls --bogus", "vmm exec k --root / --rng -- ls --bogus"),
        ("k -e A=b -w / true", "vmm exec k -e A=b -w / -- true"),
    ],
)
def test_without_dashes(tmp_path: Path, words: str, line: str) -> None:
    done = execute(tmp_path, *words.replace("'a b'", "a\0b").split(" "))
    assert line in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (done.returncode, done.stdout) == (2, "")


def execute(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmm", "exec", *(word.replace("\0", " ") for word in words)],
        cwd=directory, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        timeout=60, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip


def test_wrong_usage(tree: Path, tmp_path: Path) -> None:
    for directory, words, line in (
        (tree, ["uname"], "'uname': the command comes after --: vmm exec -- uname"),
        (tree, ["--"], "no command after --"),
        (tree, ["--memory", "--", "true"], "--memory needs a value"),
        (tree, ["--rw", "/no/such", "--", "true"], "--rw /no/such: no such directory"),
        (tree, ["--rw", "/", "--", "true"], "--rw / is all of the host"),
        (tree, ["--overlay", "/proc/sys", "--", "true"], "/proc is the guest's own"),
        (tree, ["--rw", ".", "--overlay", str(tree), "--", "true"], "given twice (--rw and --over"),
        (tree, ["--net", "user,dns=1.1.1.1", "--", "true"], "dns=1.1.1.1 needs the guest"),
        (tree, ["--net", "user,ip=10.0.0.1", "--", "true"], "ip=10.0.0.1 is not dhcp, off or A.B"),
        (tree, ["--net", "user,ip=fd00::1/64", "--", "true"], "ip=fd00::1/64 is not dhcp, off or"),
        (tree, ["--tty", "--", "true"], "--tty: standard input is no terminal; leave --tty out"),
        (tmp_path, ["--", "true"], "no KERNEL given, and no kernel was built in this directory"),
        (tmp_path, [".", "--", "true"], "kernel . is a directory in which no kernel was built"),
        (tmp_path, ["k", "--rw", ".", "--", "true"], "--rw .: it is put into a root file system"),
    ):
        done = execute(directory, *words)
        assert done.stderr.startswith("vmm: ") and line in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and done.returncode == 2, done.stderr
    for name in ("Kconfig", "Makefile", "scripts"):
        (tmp_path / name).touch()
    assert "make defconfig kvm_guest.config" in execute(tmp_path, "--", "true").stderr
