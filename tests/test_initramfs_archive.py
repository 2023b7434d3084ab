"""vmm/initramfs/archive.py, checked by cpio(1)."""

from __future__ import annotations

import gzip
import os
import stat
import subprocess
from pathlib import Path

import pytest

from vmm.errors import UsageError
from vmm.initramfs import Initramfs


def example(source: Path) -> Initramfs:
    ram = Initramfs()
    ram.file("/init", data="#!/bin/sh\necho hello\n", mode=0o755)
    ram.file("bin/tool", source=source)
    ram.file("etc/odd", data=b"\x00\x01\x02", mode=0o600)
    ram.file("etc/empty", data=b"")
    ram.dir("tmp", 0o1777)
    ram.symlink("bin/sh", "tool")
    ram.node("dev/console", "c", 5, 1)
    ram.node("dev/vda", "b", 254, 0, mode=0o660)
    return ram


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(3_000_001))
    path.chmod(0o755)
    return path


def cpio(arguments: list[str], archive: bytes, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        ["cpio", *arguments], input=archive, cwd=cwd, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done


def test_cpio_lists_every_member_after_its_parent(source: Path, tmp_path: Path) -> None:
    names = cpio(["-t"], example(source).bytes(), tmp_path).stdout.decode().split()
    assert names == [
        "init", "bin", "bin/tool", "etc", "etc/odd", "etc/empty", "tmp", "bin/sh",
        "dev", "dev/console", "dev/vda",
    ]  # fmt: skip


def test_cpio_lists_types_modes_and_device_numbers(source: Path, tmp_path: Path) -> None:
    text = cpio(["-tv", "--numeric-uid-gid"], example(source).bytes(), tmp_path).stdout.decode()
    lines = {line.split()[-1]: line.split() for line in text.splitlines()}
    assert lines["dev/console"][0] == "crw-------"
    assert "".join(lines["dev/console"][4:6]) == "5,1"
    assert lines["dev/vda"][0] == "brw-rw----"
    assert "".join(lines["dev/vda"][4:6]) == "254,0"
    assert lines["tmp"][0] == "drwxrwxrwt"
    assert lines["init"][2:4] == ["0", "0"]


def test_cpio_unpacks_what_was_put_in(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    wanted = ["init", "bin", "bin/*", "etc", "etc/*", "tmp"]
    cpio(["-i", "--quiet", "--no-preserve-owner", *wanted], example(source).bytes(), out)
    assert (out / "init").read_text() == "#!/bin/sh\necho hello\n"
    assert stat.S_IMODE((out / "init").stat().st_mode) == 0o755
    assert (out / "bin/tool").read_bytes() == source.read_bytes()
    assert stat.S_IMODE((out / "bin/tool").stat().st_mode) == 0o755
    assert (out / "etc/odd").read_bytes() == b"\x00\x01\x02"
    assert stat.S_IMODE((out / "etc/odd").stat().st_mode) == 0o600
    assert (out / "etc/empty").read_bytes() == b""
    assert os.readlink(out / "bin/sh") == "tool"
    assert stat.S_IMODE((out / "tmp").stat().st_mode) == 0o1777


def test_same_calls_same_bytes(source: Path, tmp_path: Path) -> None:
    first, second = example(source), example(source)
    first.write(tmp_path / "a")
    os.utime(source, (1, 1))
    assert (tmp_path / "a").read_bytes() == second.bytes()
    assert first.bytes(compress=True) == second.bytes(compress=True)


def test_compressed_archive_holds_the_plain_one(source: Path, tmp_path: Path) -> None:
    ram = example(source)
    ram.write(tmp_path / "a.gz", compress=True)
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == ram.bytes()


def test_archives_joined_end_to_end_stay_aligned(source: Path, tmp_path: Path) -> None:
    assert len(example(source).bytes()) % 512 == 0
    assert len(Initramfs().bytes()) == 512


def test_a_directory_given_again_takes_the_new_mode(tmp_path: Path) -> None:
    ram = Initramfs().file("root/x", data=b"").dir("root", 0o700)
    text = cpio(["-tv"], ram.bytes(), tmp_path).stdout.decode()
    assert text.splitlines()[0].startswith("drwx------")


@pytest.mark.parametrize("path", ["", "/", "..", "a/../b", "a\0b", "x" * 4096])
def test_a_path_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises(UsageError):
        Initramfs().file(path, data=b"")


def test_the_same_file_twice_is_refused() -> None:
    ram = Initramfs().file("a/b", data=b"1")
    with pytest.raises(UsageError, match="already"):
        ram.file("/a//b", data=b"2")


def test_a_file_is_no_directory() -> None:
    ram = Initramfs().file("a", data=b"1")
    with pytest.raises(UsageError, match="'a' is not a directory"):
        ram.file("a/b", data=b"2")


def test_missing_and_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such-file: No such file"):
        Initramfs().file("x", source=tmp_path / "no-such-file")
    with pytest.raises(UsageError, match="not a regular file"):
        Initramfs().file("x", source=tmp_path)
    with pytest.raises(UsageError, match="either data or a source"):
        Initramfs().file("x")


def test_a_source_that_went_away_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    path.write_bytes(b"x")
    ram = Initramfs().file("x", source=path)
    path.unlink()
    with pytest.raises(UsageError, match="gone: No such file"):
        ram.bytes()


def test_an_unknown_kind_of_node_is_refused() -> None:
    with pytest.raises(UsageError, match="'p'"):
        Initramfs().node("dev/x", "p", 1, 2)
