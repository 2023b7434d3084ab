"""vmm.boot.file: files people name, and what is wrong with them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vmm.boot.file import InputFile
from vmm.errors import BootError


def test_reads_at_offsets(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with InputFile(str(path), "kernel") as file:
        assert (file.size, file.name) == (100, f"kernel {path}")
        assert file.read(10, 3) == b"\x0a\x0b\x0c"
        assert file.read(98, 10) == b"\x62\x63"
        assert file.read(200, 10) == b""
        target = bytearray(5)
        file.read_into(20, memoryview(target))
        assert target == bytes(range(20, 25))


def test_a_file_that_shrinks_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10000))
    with InputFile(str(path), "--initrd") as file:
        os.truncate(path, 100)
        with pytest.raises(BootError, match=r"--initrd .*became shorter"):
            file.read_into(0, memoryview(bytearray(10000)))


def test_nothing_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    before = os.listdir("/proc/self/fd")
    with InputFile(str(path), "kernel") as file:
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    file.close()
    for wrong in (tmp_path, Path("/dev/null")):
        with pytest.raises(BootError):
            InputFile(str(wrong), "kernel")
    assert os.listdir("/proc/self/fd") == before


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "is a directory"),
        (Path.touch, "is empty"),
        (make_fifo, "is not a regular file"),
        (make_socket, "No such device or address"),
        (make_loop, "too many symbolic links"),
        (lambda path: None, "no such file"),
    ],
)
def test_wrong_files(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "k"
    make(path)  # type: ignore[operator]
    with pytest.raises(BootError, match=message) as caught:
        InputFile(str(path), "kernel")
    assert str(caught.value).startswith(f"kernel {path}")


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 300, "/etc/passwd/vmlinuz"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(BootError, match=r"^kernel ") as caught:
        InputFile(name, "kernel")
    assert "\n" not in str(caught.value)


def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.geteuid():
        with pytest.raises(BootError, match="no permission to read it"):
            InputFile(str(path), "kernel")
        return
    # root may read it: ask as somebody else, in a child.
    tmp_path.chmod(0o755)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.seteuid(65534)
            os.chdir("/")
            InputFile(str(path), "kernel")
        except BootError as error:
            status = 0 if "no permission" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
