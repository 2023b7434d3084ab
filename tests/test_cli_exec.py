"""`vmm exec` as far as it gets without a Linux guest: what it is told, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import boot_files
from vmm import Machine, MachineConfig
from vmm.agent import archive
from vmm.agent.root import HEAD, Root, file_system, size_told
from vmm.cli import exec as exec_command
from vmm.errors import EXIT_USAGE, UsageError


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "kernel").write_bytes(boot_files.elf())
    (tmp_path / "initrd").write_bytes(b"070701" + bytes(506))
    (tmp_path / "dir").mkdir()
    (tmp_path / "zeroes").write_bytes(bytes(1 << 17))
    disk = bytearray(1 << 17)
    disk[510:512] = b"\x55\xaa"
    (tmp_path / "disk").write_bytes(disk)
    (tmp_path / "qcow2").write_bytes(b"QFI\xfb" + bytes(1000))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "odd").write_bytes(
        b"hsqs".ljust(40, b"\0") + (900).to_bytes(8, "little") + b"x" * 900
    )
    (tmp_path / "raw").write_bytes(bytes(512))
    return tmp_path


def execute(files: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmm", "exec", *words], cwd=files, capture_output=True, text=True,
        check=False, stdin=subprocess.DEVNULL, timeout=60,
        env={**os.environ, "PYTHONPATH": os.getcwd(), **env},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "no KERNEL given"),
        ("kernel --root dir true", "'true': the command comes after --: vmm exec kernel --root"),
        ("kernel --root dir", "no command; it comes after --: vmm exec KERNEL [option ...] -- CM"),
        ("kernel --root dir --", "no command after --"),
        ("-- true", "no KERNEL given"),
        ("kernel -- true", "no root file system for the command: give --root DIR, --root IMAGE or"),
        ("kernel --root nothing -- true", "--root nothing: No such file or directory; give a dir"),
        ("kernel --root zeroes -- true", "--root zeroes is no image of a file system known here"),
        ("kernel --root disk -- true", "--root disk is a disk with partitions; give an image of"),
        ("kernel --root qcow2 -- true", "--root qcow2 is a qcow2 image; make it raw: qemu-img"),
        ("kernel --root fifo -- true", "--root fifo: it is a FIFO, not a file; give a directory,"),
        ("kernel --root /dev/zero -- true", "--root /dev/zero: it is a character device, not a"),
        (
            "kernel --root odd -- true",
            "--root odd has 948 bytes, which is not whole sectors of 512",
        ),
        ("kernel --root dir --rw= -- true", "--rw: no directory; --rw . is the one you are in"),
        ("kernel --root dir --overlay= -- true", "--overlay: no directory; --overlay . is the one"),
        (
            "kernel --root dir --fs dir,tag=vmm-root -- true",
            "--fs dir: tag=vmm-root is the agent's",
        ),
        (
            "kernel --root dir --fs dir,tag=vmm-dir-0 -- true",
            "--fs dir: tag=vmm-dir-0 is the agent",
        ),
        (
            "kernel --root dir --drive raw,serial=vmm-root -- true",
            "--drive raw: serial=vmm-root is",
        ),
        ("kernel --root dir --tty -- true", "--tty: standard input is no terminal"),
        ("kernel --root dir --console auto -- true", "--console auto: this terminal is the comm"),
        ("kernel --root dir --console hvc -- true", "--console hvc: this terminal is the command"),
        ("kernel --root dir --env =x -- true", "--env '=x' has no name; say NAME=VALUE"),
        ("kernel --root dir --env NO_SUCH -- true", "--env NO_SUCH: it has no value here"),
        ("kernel --root dir --modules dir -- true", "--modules dir has no directory 'kernel'"),
        ("kernel --root dir --append init=here -- true", "--append: init 'here' is not a path"),
        ("kernel --root dir --bogus -- true", "'--bogus' is no option"),
        ("kernel --root dir --control x -- true", "'--control' is no option"),
        ("kernel --initrd initrd --append rdinit=x -- true", "--append: init 'x' is not a path"),
    ],
)
def test_wrong_usage_is_one_line(files: Path, words: str, line: str) -> None:
    done = execute(files, *words.split())
    assert done.stderr.startswith(f"vmm: {line}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")


def test_a_console_full_of_complaints_is_not_passed_on_whole(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Full:
        class console:
            text = staticmethod(lambda: "vmm-agent: \x1b[2J of many\n" * 3000 + "vmm-agent")

    exec_command._pass_on(Full())  # type: ignore[arg-type]
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "vmm: in the guest: \\x1b[2J of many"
    assert said[-1] == "vmm: in the guest: and 2985 more lines of this kind"
    assert len(said) == exec_command.COMPLAINTS + 1


def test_a_command_that_cannot_be(files: Path) -> None:
    done = execute(files, "kernel", "--root", "dir", "--", "true", *["x" * 100_000] * 11)
    assert "Argument list too long" in done.stderr
    assert done.returncode == EXIT_USAGE


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("-- true", "no KERNEL given"),
        ("{0}/kernel --root x -- true", "--root x: No such file or directory"),
        ("kernel --root / -- true", "the directory you are in has been removed; cd to another"),
        ("{0}/kernel --root {0} --drive x -- true", "the directory you are in has been removed"),
        ("{0}/kernel --root {0} --rw . -- true", "the directory you are in has been removed"),
    ],
)
def test_in_a_directory_that_has_been_removed(files: Path, words: str, line: str) -> None:
    gone = files / "gone"
    gone.mkdir()
    script = 'rmdir "$PWD"; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-m", "vmm", "exec",
         *words.format(files).split()],
        cwd=gone, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=60,
    )  # fmt: skip
    assert done.stderr.startswith(f"vmm: {line}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")


def test_a_machine_in_a_directory_that_has_been_removed(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "gone").mkdir()
    monkeypatch.chdir(files / "gone")
    (files / "gone").rmdir()
    with Machine(MachineConfig(str(files / "kernel"), drives=[str(files / "raw")])) as machine:
        assert machine.config.drives[0].path == str(files / "raw")


def test_directories_of_any_name(files: Path) -> None:
    """Their paths are lines for the agent: in any encoding, as many bytes as it takes."""
    name = os.path.join(os.fsencode(files), b"n\xff ,:\\")
    os.mkdir(name)
    config = MachineConfig(str(files / "kernel"), root=str(files), rw=[os.fsdecode(name)])
    assert b"\nmount vmm-dir-0 rw " + name + b"\n" in archive.build(config)
    long = [os.path.join(files, *[letter * 250] * 12) for letter in "abcdefghijklmnopqrst"]
    for path in long:
        os.makedirs(path)
    with pytest.raises(UsageError, match="--rw and --overlay: their paths have more than 49152"):
        Root(str(files), rw=long)


def test_an_image_that_was_cut_short(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    assert Root(str(image)).drive is not None
    with image.open("r+b") as file:
        file.truncate(4 << 20)
    with pytest.raises(UsageError, match="cut short: it has 4194304 bytes, and the ext4 in it 838"):
        Root(str(image))


@pytest.mark.parametrize(
    ("name", "fields", "size"),
    [
        ("ext4", {0x404: b"\0\x10\0\0", 0x418: b"\2\0\0\0"}, 16 << 20),
        ("ext4", {0x418: b"\2\0\0\0", 0x460: b"\x80", 0x550: b"\1"}, 1 << 44),
        ("ext4", {0x404: b"\1", 0x418: b"\xff\xff\xff\xff"}, 1 << 16),
        ("xfs", {4: b"\0\0\x10\0", 14: b"\1\0"}, 1 << 20),
        ("squashfs", {40: b"\0\0\1"}, 1 << 16),
        ("btrfs", {}, 0),
    ],
)
def test_the_size_a_file_system_tells(name: str, fields: dict[int, bytes], size: int) -> None:
    head = bytearray(HEAD)
    for offset, data in fields.items():
        head[offset : offset + len(data)] = data
    assert size_told(name, bytes(head)) == size


def test_help() -> None:
    done = execute(Path.cwd(), "--help")
    assert done.returncode == 0
    assert "-- CMD [ARG ...]" in done.stdout.splitlines()[0]
    for option in ("--root", "--tty", "--env", "--workdir", "--memory", "--drive"):
        assert f"  {option}" in done.stdout or f", {option}" in done.stdout


@pytest.mark.parametrize(
    ("offset", "magic", "name"),
    [
        (0x438, b"\x53\xef", "ext4"),
        (0, b"XFSB", "xfs"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (0, b"hsqs", "squashfs"),
        (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
        (0x8001, b"CD001", "iso9660"),
        (0x400, b"\x10\x20\xf5\xf2", "f2fs"),
    ],
)
def test_file_systems_are_told_apart(tmp_path: Path, offset: int, magic: bytes, name: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(offset) + magic + bytes(1 << 17))
    assert file_system(str(image)) == name


def test_a_real_ext4_image(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    assert file_system(str(image)) == "ext4"
    with pytest.raises(UsageError, match="Is a directory"):
        file_system(str(tmp_path))
