"""The agent's initrd: its program, modules it needs, and what it is to do (vmm/agent/init.c)."""

from __future__ import annotations

import os
from contextlib import suppress

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.agent.root import Root
    from vmm.config import MachineConfig

RDINIT = "/.vmm/init"
DEFAULT_INIT = "/init"
ROOT_TYPES = ("ext4", "xfs", "btrfs")
"""What `root=` without an initrd is tried as, where the kernel has them as modules."""
BY_ANOTHER_NAME = "crc32c_generic"
"""File systems ask the kernel for crc32c, which no module is called."""
PACKETS = "af_packet"
"""The sockets that DHCP takes; where the kernel has none, UDP has to do."""
HOSTNAME = "vmm"
"""Of a guest with a `root`, where no hostname= is on its command line."""


def build(config: MachineConfig) -> bytes:
    """The archive for a machine so configured.

    Raises:
        UsageError: its kernel lacks what the agent needs.
        HostError: the agent cannot be compiled.
    """
    from vmm.agent import binary
    from vmm.initramfs import Initramfs

    ram = Initramfs()
    ram.dir(".vmm", 0o700)
    ram.file(RDINIT, source=binary.program(), mode=0o755)
    ram.node(".vmm/null", "c", 1, 3, mode=0o666)
    ram.node(".vmm/random", "c", 1, 8, mode=0o600)
    lines = []
    root = config.root_parts
    for number, module in enumerate(drivers(config, root)):
        path = f"/.vmm/modules/{number:02}.ko"
        ram.file(path, data=module)
        lines.append(f"module {path}")
    if root is not None:
        lines += root.lines
        lines.append(f"hostname {parameter(config.append, 'hostname') or HOSTNAME}")
    init = guest_init(config)
    lines += networks(config, init)
    if init is not None:
        lines.append(f"init {init}")
    ram.file(".vmm/config", data=b"".join(os.fsencode(f"{line}\n") for line in lines))
    return ram.bytes()


def drivers(config: MachineConfig, root: Root | None) -> list[bytes]:
    """The modules for what a machine is asked for, in the order to insert them.

    An initrd may bring its own: without one, the drivers of devices are needed as much as the
    agent's. Raises UsageError where the kernel lacks some, or they are not found.
    """
    from vmm.agent import needs
    from vmm.agent.modules import Missing, collect, find_tree
    from vmm.boot.kconfig import KernelFile

    if config.kernel is None:
        return []
    wanted = [needs.bus(config), needs.Need("vmm exec", *needs.VSOCK)]
    optional: list[str] = []
    devices = needs.of_devices(config)
    if config.initrds:
        optional += [need.module for need in devices]
    else:
        wanted += devices
    if root is not None:
        wanted += [needs.of_module(f"--root {config.root}", name) for name in root.wanted]
    elif not config.initrds and parameter(config.append, "root") is not None:
        types = parameter(config.append, "rootfstype")
        optional += ["virtio_blk", "virtiofs"]
        optional += types.split(",") if types else ROOT_TYPES
    optional += of_disks(config)
    if config.nets:
        optional.append(PACKETS)
    if root is not None or optional:
        optional.insert(0, BY_ANOTHER_NAME)
    kernel = KernelFile(config.kernel)
    tree = config.modules or find_tree(config.kernel)
    if tree is None:
        needs.check(kernel, wanted)
        return []
    names = list(dict.fromkeys(need.module for need in wanted))
    try:
        return collect(tree, names, list(dict.fromkeys(optional)), kernel.release)
    except Missing as missing:
        # modules.builtin may be missing in a tree, or be of another build.
        needs.check(kernel, [need for need in wanted if need.module in missing.names], tree)
        names = [name for name in names if name not in missing.names]
        return collect(tree, names, list(dict.fromkeys(optional)), kernel.release)


def of_disks(config: MachineConfig) -> list[str]:
    """The modules of the file systems that are on disks beside the root: a root of its own kind,
    a container's, cannot load them."""
    from vmm.agent.root import modules_of, read_head, told_from

    found = []
    for drive in config.drives:
        with suppress(OSError):
            kind = told_from(read_head(drive.path))
            if kind is not None:
                found.append(modules_of(kind))
    return found


def networks(config: MachineConfig, init: str | None) -> list[str]:
    """What init.c does with the cards: as the person says; else, where the guest has no init of its
    own, what suits the kind."""
    lines = []
    cards = [net for net in config.nets if net.kind != "none"]
    for number, net in enumerate(cards):
        ip, gateway = net.ip, net.gateway
        if not ip and init is None and config.root is not None:
            ip, gateway = net.usual_ip
        if ip == "dhcp":
            lines.append(f"net eth{number} dhcp")
        elif ip and ip != "off":
            address, _, bits = ip.partition("/")
            words = ["net", f"eth{number}", "static", address, bits, gateway or "-", *net.dns]
            lines.append(" ".join(words))
    return lines


def check(config: MachineConfig) -> None:
    """UsageError where what a configuration says of the agent cannot be."""
    if not config.acpi and config.transport == "mmio":
        raise UsageError(
            "--no-acpi: the agent's device over MMIO is found by ACPI; leave it out (for a kernel "
            "without ACPI, --cmdline-devices besides), or use "
            "--transport pci"
        )
    init = guest_init(config)
    if init is not None and not init.startswith("/"):
        raise UsageError(f"--append: init {init!r} is not a path that begins with /")


def guest_init(config: MachineConfig) -> str | None:
    """What is executed after the agent: an initrd's init, or with a root what the person says."""
    if config.root is not None:
        return parameter(config.append, "init")
    return parameter(config.append, "rdinit") or DEFAULT_INIT


def command_line(line: str) -> str:
    """A kernel command line with the agent as the first program."""
    words, dashes, arguments = f" {line} ".partition(" -- ")
    line = f"{words.strip()} rdinit={RDINIT}".lstrip()
    return f"{line} -- {arguments.strip()}" if dashes else line


def parameter(cmdline: str, name: str) -> str | None:
    """The last NAME=VALUE on a kernel command line, before the `--` of init's own arguments."""
    found = None
    for word in cmdline.split():
        if word == "--":
            break
        key, equals, value = word.partition("=")
        if key == name and equals:
            found = value
    return found
