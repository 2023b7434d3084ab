"""vmm/libc.py: system calls that Python lacks."""

from __future__ import annotations

import errno
import os
import runpy
from pathlib import Path

import pytest

from vmm import libc

SYS_OPENAT, SYS_GETPID, SYS_PIPE2, SYS_GETCWD = 257, 39, 293, 79
AT_FDCWD = -100
ROOT = Path(__file__).parents[1]


def test_a_call_returns_what_the_kernel_does() -> None:
    assert libc.syscall(SYS_GETPID) == os.getpid()


def test_buffers_are_passed_as_addresses_and_written_to() -> None:
    found = bytearray(4096)
    size = libc.syscall(SYS_GETCWD, found, len(found))
    assert os.fsdecode(bytes(found[: size - 1])) == os.getcwd()


def test_a_failure_is_an_oserror_with_the_kernels_number() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        libc.syscall(SYS_OPENAT, AT_FDCWD, b"/nowhere/at/all\0", os.O_RDONLY, 0)
    assert caught.value.errno == errno.ENOENT


def test_the_address_is_the_buffers() -> None:
    data = bytearray(b"12345678")
    ends = bytearray(8)
    libc.syscall(SYS_PIPE2, ends, os.O_CLOEXEC)
    reader, writer = (int.from_bytes(ends[at : at + 4], "little") for at in (0, 4))
    try:
        libc.syscall(1, writer, libc.address_of(data) + 2, 4)
        assert os.read(reader, 8) == b"3456"
    finally:
        os.close(reader)
        os.close(writer)


def test_the_declaration_is_what_the_build_writes(tmp_path: Path) -> None:
    build = runpy.run_path(str(ROOT / "vmm" / "libc_build.py"))
    path = Path(build["build"](str(tmp_path / "_libc.py")))
    assert path.read_text() == (ROOT / "vmm" / "_libc.py").read_text()
