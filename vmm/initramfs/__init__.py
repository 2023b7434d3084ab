"""Initial RAM disks: `newc` cpio archives with files, directories, nodes, symlinks and modules.

from vmm.initramfs import Initramfs

ram = Initramfs()
ram.file("init", data=b"#!/bin/sh\\n...", mode=0o755)
ram.file("bin/busybox", source="/bin/busybox")
order = ram.modules("/path/to/lib/modules/6.1.0-56-cloud-amd64", ["virtio_mmio"])
ram.file("bin/vmm-exit", data=exit_program(), mode=0o755)
ram.write("initrd.img")
"""

from __future__ import annotations

from vmm.initramfs.archive import Initramfs
from vmm.initramfs.exitport import exit_program
from vmm.initramfs.modules import ModuleTree

__all__ = ["Initramfs", "ModuleTree", "exit_program"]
