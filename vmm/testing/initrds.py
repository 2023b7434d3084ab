"""Small initrds: busybox, kernel modules, and a script as init."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping

from vmm.errors import HostError, UsageError
from vmm.initramfs import Initramfs, exit_program
from vmm.initramfs.modules import ModuleTree
from vmm.testing.kernels import Kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

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


DRIVERS = {
    "nets": "virtio_net",
    "drives": "virtio_blk",
    "rng": "virtio_rng",
    "balloon": "virtio_balloon",
    "shares": "virtiofs",
    "vsock": "vmw_vsock_virtio_transport",
}
"""The module of each of `MachineConfig`'s devices, by its keyword."""


def waiting(kernel: Kernel, keywords: Mapping[str, Any] | None = None) -> Initramfs:
    """An archive whose /init prints `ready` and waits until its machine is ended.

    `keywords` are `MachineConfig`'s: the drivers of the devices they ask for are inserted, where
    the kernel has them as modules.
    """
    values = keywords or {}
    wanted = [name for word, name in DRIVERS.items() if values.get(word) not in (None, False, ())]
    if wanted:
        wanted.insert(0, "virtio_pci" if values.get("transport") == "pci" else "virtio_mmio")
    script = "echo ready\nwhile :; do sleep 1000000; done\n"
    return build(script, kernel=kernel, modules=_loadable(kernel, wanted))


def _loadable(kernel: Kernel, names: Iterable[str]) -> list[str]:
    """Those of `names` that `kernel` has as modules."""
    if not kernel.modules.is_dir():
        return []
    tree, found = ModuleTree(kernel.modules), []
    for name in names:
        with contextlib.suppress(UsageError):
            if tree.find(name) is not None:
                found.append(name)
    return found


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
            # The agent, where a machine has one, came first and may have inserted it.
            there = f"/sys/module/{name.replace('-', '_')}"
            lines.append(
                f"[ -d {there} ] || insmod {path} {given} || echo 'init: cannot insert {name}'\n"
            )
    for path, content in (files or {}).items():
        if isinstance(content, os.PathLike):
            ram.file(path, source=content)
        else:
            ram.file(path, data=content, mode=0o755)
    ram.file("init", data="".join([*lines, script.rstrip(), "\npoweroff -f\n"]), mode=0o755)
    return ram
