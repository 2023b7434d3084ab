"""What a machine is made of, as plain values, checked before anything is opened.

Not a `dataclass`: importing that module costs more than the rest of a start (see
docs/architecture.md, "Start-up").
"""

from __future__ import annotations

from vmm import config_types as types
from vmm.errors import UsageError
from vmm.layout import MIB, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from os import PathLike

    from vmm.agent.root import Root
    from vmm.block.drive import Drive
    from vmm.block.vhost_user import VhostUserBlk
    from vmm.net.config import Net
    from vmm.virtio.console_config import PortConfig
    from vmm.virtio.device import VirtioDevice
    from vmm.virtio.fs import Share
    from vmm.virtio.vsock_config import VsockConfig

BOOT_MODES = ("auto", "bzimage", "elf64", "pvh")
TRANSPORTS = ("mmio", "pci")
ON_PANIC = ("exit", "pause")
CONSOLES = ("auto", "none", "file:PATH", "pty")
HVC = "hvc"
"""Before one of them and a comma: a virtio console. Alone: on `auto`."""
BACKINGS = ("anonymous", "memfd", "hugetlbfs")
MAX_CPUS = 254
"""xAPIC ids are 8 bits with 255 for broadcast, and the IOAPIC takes one."""
OVERCOMMIT = 4
"""A guest may be given this many times the host's RAM and swap; more is taken for a slip."""
KINDS = {
    "kernel": types.maybe(types.PATH),
    "append": types.TEXT,
    "memory": types.SIZE,
    "cpus": types.WHOLE,
    "cpu": types.TEXT,
    "console": types.TEXT,
    "boot": types.TEXT,
    "acpi": types.FLAG,
    "cmdline_devices": types.FLAG,
    "timeout": types.maybe(types.NUMBER),
    "on_panic": types.TEXT,
    "backing": types.TEXT,
    "default_append": types.FLAG,
    "device": types.PATH,
    "rng": types.FLAG_OR_TEXT,
    "balloon": types.maybe(types.SIZE),
    "transport": types.TEXT,
    "agent": types.FLAG,
    "root": types.maybe(types.PATH),
    "modules": types.maybe(types.PATH),
    "fault_seed": types.WHOLE,
    "trace": types.FLAG,
}
"""What each keyword takes, but for lists, whose items are checked where they are made."""


class MachineConfig:
    """A machine's configuration; the keywords are `vmm run`'s options.

    Args:
        kernel: path of a bzImage or ELF vmlinux; None for a machine whose memory and registers
            the program fills in itself.
        initrds: paths, concatenated in order.
        append: added after the default command line (see `default_cmdline`).
        memory: guest RAM in bytes, a positive multiple of 4096; or text, `512M`.
        cpus: how many vCPUs, 1 to 254.
        cpu: policy, see `vmm.cpu`: `host`, `max`, a baseline, then `,+feature,-feature`.
        console: `none` (kept in `Machine.console` only), `file:PATH`, `pty`, or `auto`: this
            process's standard input and output. `hvc` or `hvc,WHERE`: by a virtio console.
        boot: `auto`, `bzimage`, `elf64` or `pvh`.
        acpi: False for no ACPI tables, the MP table alone; the kernel command line then names the
            virtio devices over MMIO (`virtio_mmio.device=`).
        cmdline_devices: True names them there with ACPI too, for a kernel that was built without
            ACPI; one with both finds each device twice, and complains of the second.
        timeout: seconds from start to a forced end (`timeout`), or None.
        on_panic: `exit`, or `pause` to leave the machine for inspection.
        backing: what RAM is made of, see `vmm.memory.map_backing`; empty: `anonymous`, or `memfd`
            where another process must see it (shares).
        default_append: False leaves the default command line out.
        device: the KVM device.
        drives: disks, each as text (see `vmm.block.drive`), a path, or a `Drive`.
        nets: network cards, each as text (`user`, see `vmm.net.config`) or a `Net`.
        rng: whether the guest gets a virtio entropy device; `rate=BYTES` limits it.
        ports: named ports of the virtio console, each as text (`name=N,socket=PATH`) or a
            `vmm.virtio.console_config.PortConfig`.
        balloon: bytes a memory balloon starts with (0: empty; or text), or None for no balloon.
        vsock: a socket device, as text (`cid=3,path=PREFIX`) or a `VsockConfig`; or None.
        shares: host directories, each as text (`DIR,tag=TAG`) or a `vmm.virtio.fs.Share`.
        vhost_user_blks: disks other processes serve, each as text (`SOCKET`) or a
            `vmm.block.vhost_user.VhostUserBlk`.
        transport: how virtio devices are reached: `mmio`, or `pci` on a host bridge.
        agent: whether the guest gets the agent that `Machine.run` needs (docs/exec.md).
        root: a directory or an image with a file system, which the agent mounts at / of the guest
            and which stays as it is; implies `agent`.
        rw: directories of the host that the guest has at the same path and may write; with `root`.
        overlay: the same, but what the guest writes is in its memory and goes with it.
        modules: the kernel's lib/modules/VERSION, where the agent's are taken from, or the tree it
            was built in; None: where packages put it, beside the kernel.
        devices: virtio devices of one's own: functions (or classes) that make one.
        fault_seed: what faults leave to chance follows from it, see `Machine.faults`.
        trace: told of unclaimed ports and addresses, one line each.

    Raises:
        UsageError: a value that cannot work.
    """

    __slots__ = (
        "acpi",
        "agent",
        "append",
        "backing",
        "balloon",
        "boot",
        "cmdline_devices",
        "console",
        "cpu",
        "cpus",
        "default_append",
        "device",
        "devices",
        "drives",
        "fault_seed",
        "initrds",
        "kernel",
        "memory",
        "modules",
        "nets",
        "on_panic",
        "overlay",
        "ports",
        "rng",
        "root",
        "rw",
        "shares",
        "timeout",
        "trace",
        "transport",
        "vhost_user_blks",
        "vsock",
    )

    @types.known_keywords
    def __init__(
        self,
        kernel: str | PathLike[str] | None = None,
        *,
        initrds: Sequence[str | PathLike[str]] = (),
        append: str = "",
        memory: int | str = 256 * MIB,
        cpus: int = 1,
        cpu: str = "host",
        console: str = "none",
        boot: str = "auto",
        acpi: bool = True,
        cmdline_devices: bool = False,
        timeout: float | None = None,
        on_panic: str = "exit",
        backing: str = "",
        default_append: bool = True,
        device: str = "/dev/kvm",
        drives: Sequence[str | PathLike[str] | Drive] = (),
        nets: Sequence[str | Net] = (),
        rng: bool | str = False,
        ports: Sequence[str | PortConfig] = (),
        balloon: int | str | None = None,
        vsock: str | VsockConfig | None = None,
        shares: Sequence[str | Share] = (),
        vhost_user_blks: Sequence[str | VhostUserBlk] = (),
        transport: str = "mmio",
        agent: bool = False,
        root: str | PathLike[str] | None = None,
        rw: Sequence[str | PathLike[str]] = (),
        overlay: Sequence[str | PathLike[str]] = (),
        modules: str | PathLike[str] | None = None,
        devices: Sequence[Callable[[], VirtioDevice]] = (),
        fault_seed: int = 0,
        trace: bool = False,
    ) -> None:
        types.check(locals(), KINDS)
        self.kernel = None if kernel is None else str(kernel)
        self.initrds = tuple(map(str, types.listed("initrds", initrds, types.PATH)))
        self.append = append
        self.memory = self._size(memory, "--memory")
        self.cpus = cpus
        self.cpu = cpu
        self.console = console
        self.boot = boot
        self.acpi = acpi
        self.cmdline_devices = cmdline_devices
        self.timeout = timeout
        self.on_panic = on_panic
        self.default_append = default_append
        self.device = str(device)
        self.drives = self._drives(drives)
        self.shares = self._shares(shares)
        self.vhost_user_blks = self._vhost_user_blks(vhost_user_blks)
        self.root = None if root is None else str(root)
        self.rw = tuple(map(str, types.listed("rw", rw, types.PATH)))
        self.overlay = tuple(map(str, types.listed("overlay", overlay, types.PATH)))
        self.agent = agent or root is not None
        self.modules = None if modules is None else str(modules)
        # What root= is only the host knows, when the machine is made.
        self.backing = backing or ("" if root is not None else self.default_backing)
        self.nets = self._nets(nets)
        self.rng = self._rng(rng)
        self.ports = self._ports(ports)
        self.balloon = None if balloon is None else self._size(balloon, "--balloon")
        self.vsock = self._vsock(vsock)
        self.transport = transport
        self.devices = types.listed("devices", devices, types.CALLABLE)
        self.fault_seed = fault_seed
        self.trace = trace
        self._check()

    @staticmethod
    def _size(size: int | str, option: str) -> int:
        if isinstance(size, str):
            from vmm.units import parse_size

            return parse_size(size, option)
        return size

    @staticmethod
    def _drives(drives: Sequence[str | PathLike[str] | Drive]) -> tuple[Drive, ...]:
        if drives == ():
            return ()
        listed = types.listed("drives", drives, "Drive")
        from vmm.block.drive import Drive, check_once

        made = tuple(
            Drive.parse(drive) if isinstance(drive, str)
            else drive if types.is_a(drive, "Drive") else Drive(drive)
            for drive in listed
        )  # fmt: skip
        if len(made) > 1:
            check_once(made, look=False)
        return made

    @staticmethod
    def _shares(shares: Sequence[str | Share]) -> tuple[Share, ...]:
        if shares == ():
            return ()
        listed = types.listed("shares", shares, "Share")
        from vmm.virtio.fs import Share

        made = tuple(Share.parse(share) if isinstance(share, str) else share for share in listed)
        tags = [share.tag for share in made]
        for share in made:
            if tags.count(share.tag) > 1:
                raise UsageError(
                    f"--fs {share.path}: tag={share.tag} is given twice; the guest mounts a "
                    "directory by its tag, so each needs its own"
                )
        return made

    @staticmethod
    def _vhost_user_blks(disks: Sequence[str | VhostUserBlk]) -> tuple[VhostUserBlk, ...]:
        if disks == ():
            return ()
        listed = types.listed("vhost_user_blks", disks, "VhostUserBlk")
        from vmm.block.vhost_user import VhostUserBlk

        return tuple(VhostUserBlk.parse(disk) if isinstance(disk, str) else disk for disk in listed)

    @staticmethod
    def _nets(nets: Sequence[str | Net]) -> tuple[Net, ...]:
        if nets == ():
            return ()
        listed = types.listed("nets", nets, "Net")
        from vmm.net.config import Net

        return tuple(Net.parse(net) if isinstance(net, str) else net for net in listed)

    @staticmethod
    def _rng(rng: bool | str) -> bool | str:
        if isinstance(rng, str):
            from vmm.virtio.rng import parse

            parse(rng)
            return rng or True
        return rng

    @staticmethod
    def _ports(ports: Sequence[str | PortConfig]) -> tuple[PortConfig, ...]:
        if ports == ():
            return ()
        listed = types.listed("ports", ports, "PortConfig")
        from vmm.virtio.console_config import PortConfig, check

        made = [PortConfig.parse(port) if isinstance(port, str) else port for port in listed]
        return check(made)

    @staticmethod
    def _vsock(vsock: str | VsockConfig | None) -> VsockConfig | None:
        if not isinstance(vsock, str):
            if vsock is not None and not types.is_a(vsock, "VsockConfig"):
                raise UsageError(
                    f"vsock={types.shown(vsock)} is not text as 'cid=3', a VsockConfig, or None"
                )
            return vsock
        from vmm.virtio.vsock_config import VsockConfig

        return VsockConfig.parse(vsock)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"MachineConfig({values})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MachineConfig):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def _check(self) -> None:
        if self.memory < MIB:
            raise UsageError(f"--memory {self.memory} bytes is too little; at least 1M, say 256M")
        if self.memory % PAGE_SIZE:
            near = (self.memory // PAGE_SIZE + 1) * PAGE_SIZE
            raise UsageError(
                f"--memory {self.memory} bytes is not a multiple of {PAGE_SIZE}; "
                f"--memory {near >> 10}K is"
            )
        if self.agent and self.vsock is not None and self.vsock.vhost:
            raise UsageError(
                f"--vsock cid={self.vsock.cid},vhost: the agent is spoken to by a socket device of "
                "ours; leave vhost out"
            )
        if self.balloon is not None and not 0 <= self.balloon < self.memory:
            raise UsageError(
                f"--balloon={self.balloon} bytes is not from 0 to less than --memory "
                f"{self.memory // MIB}M"
            )
        if not 1 <= self.cpus <= MAX_CPUS:
            raise UsageError(f"--cpus {self.cpus} is not a number from 1 to {MAX_CPUS}")
        if self.backing not in ("", *BACKINGS):
            raise UsageError(f"backing={self.backing!r} is not one of {', '.join(BACKINGS)}")
        if self.boot not in BOOT_MODES:
            raise UsageError(f"--boot {self.boot!r} is not one of {', '.join(BOOT_MODES)}")
        if self.transport not in TRANSPORTS:
            raise UsageError(
                f"--transport {self.transport!r} is not one of {', '.join(TRANSPORTS)}"
            )
        if self.on_panic not in ON_PANIC:
            raise UsageError(f"--on-panic {self.on_panic!r} is not one of {', '.join(ON_PANIC)}")
        if self.timeout is not None and not 0 < self.timeout < 1e9:
            seconds = self.timeout
            text = f"{seconds:g}" if isinstance(seconds, float) else types.shown(seconds)
            raise UsageError(f"--timeout {text} is not a number of seconds above 0 and below 1e9")
        if self.kernel == "":
            raise UsageError("KERNEL is an empty name; give the path of a bzImage or vmlinux")
        if "" in self.initrds:
            raise UsageError("--initrd is an empty name; give a file, or leave it out")
        for key in ("root", "modules"):
            if getattr(self, key) == "":
                raise UsageError(f"--{key} is an empty name; give a path, or leave it out")
        if self.initrds and self.kernel is None:
            raise UsageError("--initrd needs a kernel")
        if self.agent and self.kernel is None:
            raise UsageError("agent: it goes in with a kernel, and there is none")
        if self.agent:
            from vmm.agent import archive

            archive.check(self)
        else:
            for net in self.nets:
                if net.ip:
                    raise UsageError(
                        f"{net.what}: ip={net.ip} is set by the agent in the guest: vmm exec, or "
                        "agent=True"
                    )
        if (self.rw or self.overlay) and self.root is None:
            option = f"--rw {self.rw[0]}" if self.rw else f"--overlay {self.overlay[0]}"
            raise UsageError(
                f"{option}: it is put into a root file system of the host's; give --root too"
            )
        for characters, name in (("\0", "NUL character"), ("\r\n", "line break")):
            if any(character in self.append for character in characters):
                raise UsageError(
                    f"--append {self.append!r} has a {name} in it; words are parted by spaces"
                )
        where = self.console_where
        file = where.removeprefix("file:")
        if where not in CONSOLES[:2] + CONSOLES[3:] and (file == where or not file):
            raise UsageError(f"--console {self.console!r} is not one of {', '.join(CONSOLES)}")

    def check_host(self) -> None:
        """UsageError where this host has not what the configuration asks for: RAM, the directories
        of shares. A machine that is made checks it; a configuration may be for another host."""
        limit = OVERCOMMIT * host_memory()
        if self.memory > limit:
            raise UsageError(
                f"--memory {self.memory // MIB}M is more than this host can back: it has "
                f"{limit // OVERCOMMIT // MIB}M of RAM and swap, up to {limit // MIB}M is accepted"
            )
        for share in self.shares:
            share.check_host()
        if self.root is not None:
            _ = self.root_parts
            from vmm.agent.root import check_names

            check_names(self.shares, self.drives)
        if self.modules is not None and self.agent:
            from vmm.agent.modules import check_tree

            check_tree(self.modules)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> MachineConfig:
        """From a TOML or JSON file (the name's end says which). The keys are this class's keywords
        (`vmm config --schema`); relative paths in it are taken from the file's directory.

        Raises:
            UsageError: in a line that names the file, and the line or the key.
        """
        from vmm.config_file import load

        return load(str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, object], base: str = "") -> MachineConfig:
        """From plain data, as `load` after parsing; relative paths are taken from `base`, if given.

        Raises:
            UsageError: in a line that begins with the key.
        """
        from vmm.config_file import from_dict

        if not hasattr(data, "keys"):
            raise UsageError(f"from_dict: {types.shown(data)} is not a table of keywords")
        return from_dict(data, base)

    def to_dict(self, *, defaults: bool = False) -> dict[str, object]:
        """Plain data that `from_dict` makes the same of; what is at its default is left out, unless
        `defaults`. UsageError with `devices`, which are functions."""
        from vmm.config_file import to_dict

        return to_dict(self, defaults=defaults)

    @property
    def default_backing(self) -> str:
        """`backing` where none is given."""
        external = any(drive.external for drive in self.drives)
        root = self.root_parts
        external = external or bool(self.vhost_user_blks)
        shares = self.shares or (root is not None and root.shares)
        return "memfd" if shares or external else "anonymous"

    @property
    def root_parts(self) -> Root | None:
        """What `root` takes: a share or a drive, modules. UsageError where it cannot be."""
        if self.root is None:
            return None
        from vmm.agent.root import Root

        return Root(self.root, self.rw, self.overlay)

    @property
    def hvc(self) -> bool:
        """Whether the console is a virtio console, with the UART for what comes before it."""
        return self.console == HVC or self.console.startswith(HVC + ",")

    @property
    def console_where(self) -> str:
        """`console` without the device: auto, none, file:PATH or pty."""
        return self.console[len(HVC) + 1 :] or "auto" if self.hvc else self.console

    @property
    def default_cmdline(self) -> str:
        """Put before `append`: the console, what ends it at a panic or reboot, no PCI if there is
        none."""
        # Linux opens /dev/console on the last one that is there; hvc0 may come with a module.
        consoles = "console=ttyS0 console=hvc0" if self.hvc else "console=ttyS0"
        words = f"{consoles} reboot=k panic=-1"
        # Linux takes the configuration ports as given, and looks for nothing behind them: as quick
        # as pci=off, with which it complains that it found no such ports.
        return words if self.transport == "pci" else words + " pci=conf1,noearly"

    @property
    def cmdline(self) -> str:
        """The whole kernel command line, but for what names devices over MMIO."""
        return self.command_line()

    def command_line(self, devices: Iterable[str] = ()) -> str:
        """The whole kernel command line, with the parameters `devices` before `append`."""
        words = [self.default_cmdline] if self.default_append else []
        words += devices
        if self.append:
            words.append(self.append)
        line = " ".join(words)
        if self.agent:
            from vmm.agent.archive import command_line

            return command_line(line)
        return line


def host_memory() -> int:
    """Bytes of RAM and swap this host has (/proc/meminfo)."""
    total = 0
    with open("/proc/meminfo", "rb") as meminfo:
        for line in meminfo:
            if line.startswith((b"MemTotal:", b"SwapTotal:")):
                total += int(line.split()[1]) * 1024
    return total
