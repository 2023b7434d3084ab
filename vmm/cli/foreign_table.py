"""Options as QEMU, Firecracker, cloud-hypervisor, crosvm, kvmtool, virtme-ng, libvirt's
virt-install and Docker spell them, and what says the same here: the table of vmm.cli.foreign."""

from __future__ import annotations

import os

from vmm.cli import foreign_values as values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Ours = Callable[[str], list[str] | None] | str


class Foreign:
    """One row: options that other programs have.

    Args:
        names: their spellings, separated by spaces.
        ours: our words, `{}` standing for the value; or a function that makes them of the value.
            A word without a dash is the operand. Empty: the option is to be left out.
        takes: an example of the value; empty: the option has none.
        why: with empty `ours`, the reason to leave it out.
        instead: with empty `ours`, what does the same in another way.
    """

    __slots__ = ("instead", "names", "ours", "takes", "why")

    def __init__(
        self, names: str, ours: Ours = "", *, takes: str = "", why: str = "", instead: str = ""
    ) -> None:
        self.names = names.split()
        self.ours = ours
        self.takes = takes
        self.why = why
        self.instead = instead

    def words(self, value: str) -> list[str] | None:
        """Our words for `value`; None where the value is not understood."""
        if isinstance(self.ours, str):
            return [word.replace("{}", value) for word in self.ours.split()]
        return self.ours(value)


def _device(value: str) -> list[str] | None:
    """QEMU's `-device MODEL,...`; [] where another option makes the device's other half."""
    model, *rest = value.split(",")
    keys = dict(word.partition("=")[::2] for word in rest)
    if model.startswith(("virtio-rng", "rng")):
        return ["--rng"]
    if model.startswith("virtio-balloon"):
        return ["--balloon"]
    if model.startswith(("vhost-vsock", "virtio-vsock")):
        cid = keys.get("guest-cid", "3")
        return ["--vsock", f"cid={cid},vhost"]
    if model.startswith(("virtio-net", "e1000", "rtl8139", "vmxnet3")):
        return [] if "netdev" in keys or "vlan" in keys else ["--net", "user"]
    if "drive" in keys or model.startswith(("virtio-serial", "virtio-scsi", "ahci", "pcie-root")):
        return []
    if model.startswith(("isa-debug-exit", "pvpanic", "isa-serial", "virtconsole")):
        return []
    return None


def _old_net(value: str) -> list[str] | None:
    """QEMU's `-net nic` and `-net user`, the two halves of a card."""
    return [] if value.startswith("nic") else values.net(value)


def _block(value: str) -> list[str] | None:
    """crosvm's `-b path=IMAGE`; virtme-ng's `-b` builds a kernel."""
    return values.drive(value) if value else None


def _kernel(value: str) -> list[str]:
    """kvmtool's `-k KERNEL`; QEMU's `-k` is a keyboard's layout."""
    return [value] if not value or "/" in value or os.path.exists(value) else []


def device_or_image(value: str) -> list[str] | None:
    """crosvm's and kvmtool's `-d IMAGE`, Docker's `-d` (detach)."""
    return ["--drive", value] if value and os.path.exists(value) else None


def _p(value: str) -> list[str] | None:
    """Docker's `-p HOST:GUEST`; crosvm's and kvmtool's `-p WORD ...` (kernel parameters)."""
    return values.forward(value) or (["--append", value] if value else None)


def _i(value: str) -> list[str] | None:
    """kvmtool's `-i INITRD`; Docker's `-i` is what `vmm exec` does anyway."""
    return ["--initrd", value] if value and os.path.isfile(value) else []


def _serial(value: str) -> list[str] | None:
    words = values.console(value)
    return [] if words == ["--console", "auto"] else words


def _console(value: str) -> list[str] | None:
    return values.console(value)


def _root_share(value: str) -> list[str] | None:
    """virtme-ng's `--rodir [PATH=]DIR`."""
    there, equals, here = value.partition("=")
    return values.fs(f"{here},tag={there},readonly" if equals else f"{value},readonly")


def _at_a_path(option: str, value: str) -> list[str] | None:
    """virtme-ng's `--rwdir [PATH=]DIR`; ours has a directory at the path that it has here."""
    there, equals, here = value.partition("=")
    if equals and there != here:
        return values.fs(f"{here},tag={there}")
    return [option, here if equals else value]


_LEAVE_ACCEL = "KVM is what there is"
_LEAVE_SCREEN = "there is no screen; the serial console is on this terminal"

_OTHER_CONSOLE = (
    "--console auto, none, pty and file:PATH are the places of a console; "
    "--port name=N,socket=PATH is a socket for a program"
)
SNAPSHOT = "-snapshot"
"""QEMU's option that protects the images of all disks."""

TABLE = (
    Foreign(
        "-m -mem --mem --ram --mem-size --mem_size_mib --memory-mb", values.memory, takes="512M"
    ),
    Foreign("-smp --smp -c --vcpus --vcpu-count --vcpu_count --nr-cpus", values.cpus, takes="2"),
    Foreign(
        "-kernel --kernel --kimg --run -r --kernel-image --kernel_image_path",
        "{}",
        takes="vmlinuz",
    ),
    Foreign("-k", _kernel, takes="vmlinuz", why="there is no keyboard"),
    Foreign("-initrd --initramfs --initrd_path", "--initrd {}", takes="initrd.img"),
    Foreign(
        "-append --cmdline --params --extra-args --boot-args --kernel-cmdline --boot_args -a",
        lambda value: ["--append", value],
        takes="root=/dev/vda",
    ),
    Foreign(
        "-drive --disk --block --rwdisk --root-drive --rwroot -blockdev -hda -hdb -hdc -hdd -sda",
        values.drive,
        takes="disk.img",
    ),
    Foreign(
        "-cdrom --cdrom --rodisk --iso -fda",
        lambda v: ["--drive", f"{v},readonly"],
        takes="image.iso",
    ),
    Foreign(
        "-b --build",
        _block,
        takes="path=disk.img",
        instead="make builds a kernel, and vmm exec in its tree takes it",
    ),
    Foreign(
        "-d",
        device_or_image,
        takes="disk.img",
        instead="a machine stays in the foreground; a shell's & puts it behind",
    ),
    Foreign("-netdev -nic --network --nic --nics --tap -n", values.net, takes="user"),
    Foreign("-net", _old_net, takes="user", why="a card and its other end are one --net user"),
    Foreign("--tap-name --tap_name", "--net tap={}", takes="tap0"),
    Foreign("--publish --port-forward", values.forward, takes="8080:80"),
    Foreign("-p", _p, takes="8080:80"),
    Foreign(
        "-v --volume --mount --filesystem --shared-dir --9p -virtfs -fsdev",
        values.fs,
        takes="DIR,tag=share",
    ),
    Foreign("--rodir", _root_share, takes="DIR"),
    Foreign("--rwdir", lambda v: _at_a_path("--rw", v), takes="DIR"),
    Foreign("--overlay-rwdir", lambda v: _at_a_path("--overlay", v), takes="DIR"),
    Foreign("--cwd --chdir", "--workdir {}", takes="DIR"),
    Foreign("--pwd", why="the command starts in this directory where --root / has it"),
    Foreign("-cpu --cpu-model --cpu-template --cpu_template", values.cpu, takes="host"),
    Foreign(
        "-device",
        _device,
        takes="virtio-rng-pci",
        instead="--drive, --net, --fs, --rng, --balloon, --vsock and --port make devices",
    ),
    Foreign("-i", _i, takes="initrd.img", why="standard input goes to the guest anyway"),
    Foreign("-it -ti --interactive", "--tty"),
    Foreign("-serial --serial", _serial, takes="stdio", why=_LEAVE_SCREEN, instead=_OTHER_CONSOLE),
    Foreign("-console --consoles -chardev", _console, takes="stdio", instead=_OTHER_CONSOLE),
    Foreign(SNAPSHOT, instead="a disk has it: --drive disk.img,snapshot"),
    Foreign("--vsock-cid --guest-cid --cid", "--vsock cid={},path=/tmp/vm.vsock", takes="3"),
    Foreign(
        "-loadvm -incoming --restore --from-snapshot --load",
        takes="DIR",
        instead="vmm restore DIR goes on with a snapshot",
    ),
    Foreign(
        "--api-sock --api-socket --api-socket-path --socket -qmp --qmp -monitor -mon",
        takes="PATH",
        instead="--control PATH makes a socket for vmm snapshot; a program uses the Python API",
    ),
    Foreign("--version -version -V", instead="vmm version says it"),
    Foreign(
        "--dry-run --show-command --print-xml",
        instead="--verbose says the kernel's command line and the devices",
    ),
    Foreign(
        "--qemu-opts --qemu --qemu-bin -o",
        takes="OPTIONS",
        why="there is no QEMU beneath; vmm has options of its own for what it can",
    ),
    Foreign("--config-file --config --spec", "{}", takes="machine.toml"),
    Foreign(
        "-nographic -nodefaults -no-user-config -no-hpet -no-fd-bootchk -nodefconfig",
        why=_LEAVE_SCREEN,
    ),
    Foreign(
        "-vga -display -vnc -spice --graphics --video --vnc --spice",
        takes="none",
        why=_LEAVE_SCREEN,
    ),
    Foreign(
        "-curses -sdl -full-screen --noautoconsole --nographic --no-graphics", why=_LEAVE_SCREEN
    ),
    Foreign("-enable-kvm --enable-kvm -kvm --kvm --hvm --import --force-kvm", why=_LEAVE_ACCEL),
    Foreign(
        "-accel -machine -M --machine --virt-type --hypervisor --accel",
        takes="kvm",
        why=_LEAVE_ACCEL + "; --transport pci puts the devices on PCI",
    ),
    Foreign(
        "--os-variant --osinfo --metadata --arch --wait",
        takes="generic",
        why="nothing depends on the guest's system",
    ),
    Foreign("-no-reboot --no-reboot -no-shutdown", why="a reboot of the guest ends the machine"),
    Foreign(
        "-action", takes="panic=pause", instead="--on-panic exit|pause says what follows a panic"
    ),
    Foreign(
        "--rm --autodelete --transient --no-api --boot-timer --enable-pci --disable-sandbox",
        why="nothing of a machine stays behind",
    ),
    Foreign(
        "-name --name --id -uuid --uuid --machine-id",
        takes="NAME",
        why="machines have no names here",
    ),
    Foreign(
        "-daemonize --daemon --detach --noreboot",
        instead="a machine stays in the foreground; a shell's & puts it behind",
    ),
    Foreign("-pidfile --pid-file", takes="PATH", why="the process of vmm is the machine's"),
    Foreign(
        "-bios -pflash --firmware --loader -L -option-rom -dtb",
        takes="FILE",
        why="there is no firmware: KERNEL is loaded directly",
    ),
    Foreign(
        "-boot --location --install --pxe",
        takes="c",
        why="there is nothing to choose: KERNEL is loaded directly",
    ),
    Foreign(
        "-s -S --debug --nodebug",
        why="no debugger's stub; vmm.Machine has registers, memory and single steps",
    ),
    Foreign(
        "-gdb --gdb",
        takes="tcp::1234",
        why="no debugger's stub; vmm.Machine has registers, memory and single steps",
    ),
    Foreign(
        "-quiet --quiet -q --silent --suppress",
        why="nothing but the guest is heard without --verbose",
    ),
    Foreign(
        "--log-path --log-level --log-file --log -D --level --metrics-path --show-level",
        takes="FILE",
        why="what vmm says goes to standard error; --verbose has it say more",
    ),
    Foreign(
        "--seccomp-level --seccomp --seccomp-filter --no-seccomp --jailer -sandbox -runas "
        "-chroot --chroot-base-dir",
        takes="on",
        why="it is not to be set",
    ),
    Foreign(
        "-rtc -usb -usbdevice -global -watchdog -msg -trace -object -overcommit --memballoon "
        "--channel --controller --input --sound --rng-device --iommu --numa -numa -smbios "
        "--sysinfo --clock --events",
        takes="VALUE",
        why="there is nothing like it here",
    ),
    Foreign(
        "--pmem --vfio -vfio --gpu --tpm --tpmdev --user-device --device --hostdev "
        "--gpus --pvpanic --vdpa --landlock",
        takes="VALUE",
        why="there is no such device here",
    ),
    Foreign(
        "--entrypoint --privileged --cap-add --cap-drop --security-opt --restart --pull "
        "--env-file --label --ipc --pid --platform",
        takes="VALUE",
        why="a machine is no container; the command stands after --",
    ),
    Foreign(
        "--exec --script-sh --script", takes="CMD", instead="vmm exec KERNEL -- CMD runs a command"
    ),
)


def row(name: str) -> Foreign | None:
    """The row that has the spelling `name`."""
    return next((each for each in TABLE if name in each.names), None)
