"""What a machine's kernel needs for what was asked of it: the drivers, their modules and symbols.

    need = Need("--net", "virtio_net", "CONFIG_VIRTIO_NET")

`check` says at once, in one line, what a kernel lacks; found out in the guest it is a panic.
"""

from __future__ import annotations

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple

    from vmm.boot.kconfig import KernelFile
    from vmm.config import MachineConfig

    class Need(NamedTuple):
        """A driver: what asks for it, its module, its symbol, and a name that is in the image of a
        kernel that has it built in."""

        what: str
        module: str
        symbol: str
        text: str
else:
    from collections import namedtuple

    Need = namedtuple("Need", "what module symbol text")

MMIO = ("virtio_mmio", "CONFIG_VIRTIO_MMIO", "virtio-mmio")
PCI = ("virtio_pci", "CONFIG_VIRTIO_PCI", "virtio-pci")
VSOCK = ("vmw_vsock_virtio_transport", "CONFIG_VIRTIO_VSOCKETS", "vmw_vsock_virtio_transport")
NET = ("virtio_net", "CONFIG_VIRTIO_NET", "virtio_net")
BLK = ("virtio_blk", "CONFIG_VIRTIO_BLK", "virtio_blk")
RNG = ("virtio_rng", "CONFIG_HW_RANDOM_VIRTIO", "virtio_rng")
FS = ("virtiofs", "CONFIG_VIRTIO_FS", "virtiofs")
OVERLAY = ("overlay", "CONFIG_OVERLAY_FS", "overlay.redirect_dir")
BALLOON = ("virtio_balloon", "CONFIG_VIRTIO_BALLOON", "virtio_balloon")
CONSOLE = ("virtio_console", "CONFIG_VIRTIO_CONSOLE", "virtio_console")
FILE_SYSTEMS = {
    "ext4": "CONFIG_EXT4_FS",
    "xfs": "CONFIG_XFS_FS",
    "btrfs": "CONFIG_BTRFS_FS",
    "squashfs": "CONFIG_SQUASHFS",
    "erofs": "CONFIG_EROFS_FS",
    "isofs": "CONFIG_ISO9660_FS",
    "f2fs": "CONFIG_F2FS_FS",
}
NAMED = {row[0]: row for row in (VSOCK, NET, BLK, RNG, FS, OVERLAY, BALLOON, CONSOLE, MMIO, PCI)}
BUILT_IN = (
    ("CONFIG_BLK_DEV_INITRD", "vmm exec: the agent comes in an initrd"),
    ("CONFIG_BINFMT_ELF", "programs"),
    ("CONFIG_DEVTMPFS", "vmm exec --root: /dev"),
    ("CONFIG_TMPFS", "vmm exec --root: /run, /tmp and what is written"),
    ("CONFIG_PROC_FS", "vmm exec: /proc"),
    ("CONFIG_SYSFS", "vmm exec --root: /sys"),
    ("CONFIG_UNIX98_PTYS", "vmm exec --tty"),
    ("CONFIG_SERIAL_8250_CONSOLE", "the console ttyS0"),
    ("CONFIG_PACKET", "vmm exec --net: addresses by DHCP"),
)
"""Symbols that are no modules, and what they are for."""


def of_module(what: str, module: str) -> Need:
    """The row of a module, which may be a file system."""
    row = NAMED.get(module) or (module, FILE_SYSTEMS.get(module, f"(for {module})"), module)
    return Need(what, *row)


def bus(config: MachineConfig) -> Need:
    """What virtio devices are found by."""
    if config.transport == "pci":
        return Need("--transport pci", *PCI)
    return Need("virtio over MMIO", *MMIO)


def of_devices(config: MachineConfig) -> list[Need]:
    """The drivers of the devices a person asked for."""
    needs = []
    for asked, what, row in (
        (any(net.kind != "none" for net in config.nets), "--net", NET),
        (config.drives, "--drive", BLK),
        (config.vhost_user_blks, "--vhost-user-blk", BLK),
        (config.rng, "--rng", RNG),
        (config.shares, "--fs", FS),
        (config.balloon is not None, "--balloon", BALLOON),
        (config.ports, "--port", CONSOLE),
        (config.hvc, "--console hvc", CONSOLE),
    ):
        if asked:
            needs.append(Need(what, *row))
    return needs


def state(kernel: KernelFile, symbols: dict[str, str], need: Need) -> str:
    """`y`, `m` or `n`: whether a kernel has a driver; `?` where that cannot be told.

    `symbols` are its configuration's, where that is known.
    """
    if symbols:
        return symbols.get(need.symbol, "n")
    named = kernel.names(need.text)
    return "?" if named is None else "y" if named else "?m"


def check(kernel: KernelFile, needs: list[Need], where: str = "") -> None:
    """UsageError where a kernel has one of `needs` not built in, and its modules are not at hand
    (`where`: a tree that has not got them)."""
    symbols, source = kernel.config()
    lacks, apart = [], []
    for need in needs:
        found = state(kernel, symbols, need)
        if found == "n":
            lacks.append(need)
        elif found in ("m", "?m"):
            apart.append(need)
    hint = _other_bus(kernel, symbols, lacks + apart)
    if lacks:
        raise UsageError(
            f"kernel {kernel.path} lacks {named(lacks)}, says {source}; build it with that{hint}"
        )
    if not apart:
        return
    release = kernel.release
    tree = f"lib/modules/{release or 'VERSION'}"
    if where:
        raise UsageError(
            f"kernel {kernel.path} has {named(apart)} neither built in nor among its modules "
            f"({where}); give the whole {tree} with --modules{hint}"
        )
    raise UsageError(
        f"kernel {kernel.path} does not have {named(apart)} built in, and its modules are not "
        f"beside it; give its {tree} with --modules (an unpacked package has it; or the tree it "
        f"was built in), or build it with these =y{hint}"
    )


def _other_bus(kernel: KernelFile, symbols: dict[str, str], missing: list[Need]) -> str:
    """What would help a kernel that has virtio on PCI alone, and cannot load its modules."""
    if any(need.symbol == MMIO[1] for need in missing):
        found = state(kernel, symbols, Need("", *PCI))
        if found == "y":
            return "; it has CONFIG_VIRTIO_PCI: --transport pci"
    return ""


def named(needs: list[Need]) -> str:
    """Their symbols, each with what asks for it."""
    texts = dict.fromkeys(f"{need.symbol} (for {need.what})" for need in needs)
    return ", ".join(texts)
