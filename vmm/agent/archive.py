"""The agent's initrd: its program, modules it needs, and what it is to do (vmm/agent/init.c)."""

from __future__ import annotations

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config import MachineConfig

RDINIT = "/.vmm/init"
DEFAULT_INIT = "/init"
ROOT_TYPES = ("ext4", "xfs", "btrfs")
"""What `root=` without an initrd is tried as, where the kernel has them as modules."""
BY_ANOTHER_NAME = "crc32c_generic"
"""File systems ask the kernel for crc32c, which no module is called."""


def build(config: MachineConfig) -> bytes:
    """The archive for a machine so configured.

    Raises:
        UsageError: its kernel lacks what the agent needs.
        HostError: the agent cannot be compiled.
    """
    from vmm.agent import binary
    from vmm.agent.modules import collect, find_tree
    from vmm.initramfs import Initramfs

    ram = Initramfs()
    ram.dir(".vmm", 0o700)
    ram.file(RDINIT, source=binary.program(), mode=0o755)
    ram.node(".vmm/null", "c", 1, 3, mode=0o666)
    lines = []
    root = config.root_parts
    tree = config.modules or (find_tree(config.kernel) if config.kernel else None)
    if tree is not None:
        bus = "virtio_pci" if config.transport == "pci" else "virtio_mmio"
        wanted = [bus, "vmw_vsock_virtio_transport"]
        optional = []
        if root is not None:
            wanted += root.wanted
            optional.append(BY_ANOTHER_NAME)
        elif not config.initrds and parameter(config.append, "root") is not None:
            types = parameter(config.append, "rootfstype")
            optional += [BY_ANOTHER_NAME, "virtio_blk", "virtiofs"]
            optional += types.split(",") if types else ROOT_TYPES
        for number, module in enumerate(collect(tree, wanted, optional)):
            path = f"/.vmm/modules/{number:02}.ko"
            ram.file(path, data=module)
            lines.append(f"module {path}")
    if root is not None:
        lines += root.lines
    init = guest_init(config)
    if init is not None:
        lines.append(f"init {init}")
    ram.file(".vmm/config", data="".join(f"{line}\n" for line in lines))
    return ram.bytes()


def check(config: MachineConfig) -> None:
    """UsageError where what a configuration says of the agent cannot be."""
    if not config.acpi and config.transport == "mmio":
        raise UsageError(
            "--no-acpi: the agent's device over MMIO is found by ACPI; leave it out, or use "
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
