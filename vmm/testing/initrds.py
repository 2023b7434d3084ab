"""Small initrds: busybox, kernel modules, and a script as init."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping

from vmm.errors import HostError
from vmm.initramfs import Initramfs, exit_program
from vmm.testing.kernels import Kernel

PROLOGUE = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
"""


def busybox() -> str:
    """The host's statically linked busybox."""
    for path in ("/bin/busybox", "/usr/bin/busybox", shutil.which("busybox")):
        if path and os.path.exists(path):
            return path
    raise HostError("no busybox here; install it: apt-get install busybox-static")


def build(
    script: str,
    *,
    kernel: Kernel | None = None,
    modules: Iterable[str] = (),
    files: Mapping[str, bytes | str | os.PathLike[str]] | None = None,
    parameters: Mapping[str, str] | None = None,
) -> Initramfs:
    """An archive whose /init mounts /proc, /sys and /dev, inserts modules, and runs `script`.

    `script` is busybox shell, with all of busybox in PATH; when it ends, the machine powers off.
    `vmm-exit N` ends it at once, with status N.
    `modules` are `kernel`'s, inserted with their dependencies; `parameters` has theirs by name.
    `files` maps paths in the guest to their text, bytes, or a host file (a PathLike).
    """
    ram = Initramfs()
    ram.file("bin/busybox", source=busybox(), mode=0o755)
    ram.symlink("bin/sh", "busybox")
    ram.file("bin/vmm-exit", data=exit_program(), mode=0o755)
    for directory in ("proc", "sys", "dev", "tmp", "run", "root", "mnt"):
        ram.dir(directory)
    # The kernel opens this for init's stdin, stdout and stderr before anything is mounted.
    ram.node("dev/console", "c", 5, 1)
    ram.node("dev/null", "c", 1, 3, mode=0o666)
    lines = [PROLOGUE]
    if modules:
        if kernel is None:
            raise ValueError("modules need a kernel")
        for path in ram.modules(kernel.modules, modules):
            name = os.path.basename(path).removesuffix(".ko")
            given = (parameters or {}).get(name, "")
            lines.append(f"insmod {path} {given} || echo 'init: cannot insert {name}'\n")
    for path, content in (files or {}).items():
        if isinstance(content, os.PathLike):
            ram.file(path, source=content)
        else:
            ram.file(path, data=content, mode=0o755)
    ram.file("init", data="".join([*lines, script.rstrip(), "\npoweroff -f\n"]), mode=0o755)
    return ram
