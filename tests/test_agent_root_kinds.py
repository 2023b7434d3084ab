"""vmm/agent/root_kinds.py: files that are no root file system, and hints that work."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vmm.agent.root import HEAD, Root
from vmm.errors import UsageError


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        Root(str(path))
    line = str(caught.value)
    assert line.startswith(f"--root {path} ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("offset", "mark", "said"),
    [
        (0, b"LUKS\xba\xbe", "is encrypted"),
        (512, b"LABELONE", "is an LVM volume"),
        (4086, b"SWAPSPACE2", "is swap space; give a directory"),
        (3, b"NTFS    ", "has an NTFS file system"),
        (3, b"EXFAT   ", "has an exFAT file system"),
        (54, b"FAT16   ", "has a FAT file system"),
        (82, b"FAT32   ", "has a FAT file system"),
        (0, b"\x7fELF", "is a program or a kernel"),
        (512, b"EFI PART", "is a disk with partitions"),
        (4096, b"EFI PART", "is a disk with partitions"),
        (600, b"nothing", "is no image of a file system known here: ext4"),
    ],
)
@pytest.mark.parametrize("signature", [False, True])
def test_kinds(tmp_path: Path, offset: int, mark: bytes, said: str, signature: bool) -> None:
    """Also with the boot signature that partition tables have, and not they alone."""
    data = bytearray(HEAD)
    data[offset : offset + len(mark)] = mark
    if signature:
        data[510:512] = b"\x55\xaa"
        said = said if mark != b"nothing" else "is a disk with partitions"
    (tmp_path / "file").write_bytes(data)
    assert said in refused(tmp_path / "file")


@pytest.mark.parametrize("name", ["a.tar", "a b.tar", "a.tar.gz", "a.tgz", "a.tar.xz", "a.tbz"])
def test_an_archive_is_unpacked_as_it_says(tmp_path: Path, name: str) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("text")
    how = {"gz": "z", "xz": "J", "bz": "j"}.get(name.rpartition("t")[2][-2:], "")
    subprocess.run(["tar", f"-c{how}f", name, "-C", "tree", "."], cwd=tmp_path, check=True)
    command = re.search(r"mkdir root && tar -xf .* -C root", refused(tmp_path / name))
    assert command is not None
    subprocess.run(["sh", "-c", command[0]], cwd=tmp_path, check=True)
    assert (tmp_path / "root" / "file").read_text() == "text"
    assert Root(str(tmp_path / "root")).share is not None


@pytest.mark.parametrize("program", ["gzip", "xz", "bzip2"])
def test_a_packed_image_is_unpacked_as_it_says(tmp_path: Path, program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    image = tmp_path / "root.img"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    subprocess.run([program, str(image)], check=True)
    (packed,) = tmp_path.iterdir()
    command = refused(packed).partition("unpack it first: ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    assert Root(str(image)).drive is not None


def test_a_cpio_archive(tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(b"070701" + bytes(506))
    assert f"--initrd {tmp_path}/initrd" in refused(tmp_path / "initrd")
