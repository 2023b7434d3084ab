"""Disk images of every format, made by qemu-img."""

from __future__ import annotations

import subprocess
from pathlib import Path

FORMATS = ("qcow2", "vmdk", "vhdx", "vdi", "vpc", "qed", "parallels", "qcow")
"""What qemu-img makes, of those that `--drive` takes."""


def make(path: Path, format: str, size: int, *options: str) -> Path:
    """A new image at `path`; `options` are further arguments of `qemu-img create`.

    For LUKS qemu-img measures the processor, and gives up on a busy one: it is asked again.
    """
    command = ["qemu-img", "create", "-q", "-f", format, *options, str(path), str(size)]
    for _ in range(10):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if not done.returncode:
            return path
    raise AssertionError(f"{' '.join(command)}: {done.stderr}")


def convert(raw: Path, path: Path, format: str, *options: str) -> Path:
    """An image at `path` with the contents of the file `raw`."""
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", format, *options, str(raw), str(path)],
        check=True,
    )
    return path


def contents(path: Path, format: str) -> bytes:
    """What is on the disk in an image."""
    raw = path.with_name(path.name + ".contents")
    subprocess.run(
        ["qemu-img", "convert", "-f", format, "-O", "raw", str(path), str(raw)], check=True
    )
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()
