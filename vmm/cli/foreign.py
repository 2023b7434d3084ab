"""Options as QEMU, Firecracker, cloud-hypervisor, crosvm, kvmtool, virtme-ng, libvirt's
virt-install and Docker spell them, and what says the same here.

The module is imported only when a command line was wrong. `complaint` answers an unknown option,
`surplus` an operand too many, `spelling` a value that an option refuses.
"""

from __future__ import annotations

import os

from vmm.cli import foreign_values as values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.cli.arguments import Arguments, Option

    Ours = Callable[[str], list[str] | None] | str

NEAR = 0.7
"""How alike two options' names must be, from 0 to 1, for one to be offered for the other."""


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


def _device_or_image(value: str) -> list[str] | None:
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
        _device_or_image,
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
    Foreign(
        "-serial --serial", _serial, takes="stdio", why=_LEAVE_SCREEN, instead=_OTHER_CONSOLE
    ),
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

COMMANDS = {
    "run": "boot start launch create up qemu vm new define install virt-install",
    "exec": "shell sh ssh enter attach bash run-command execute",
    "snapshot": "save savevm checkpoint suspend dump pause",
    "restore": "load loadvm resume restore-snapshot thaw",
    "doctor": "check info kvm-ok capabilities status host-validate virt-host-validate",
    "config": "validate convert show dumpxml lint inspect",
}
"""Subcommands of other programs, by what does their work here."""
NO_COMMANDS = {
    "stop kill destroy shutdown reboot reset poweroff": (
        "a machine is a process: kill PID presses its power button, Ctrl-A x on its console ends it"
    ),
    "ps ls list top stats domstate": "a machine is a process: pgrep -af 'vmm run' lists them",
    "rm delete undefine remove prune": "nothing of a machine stays behind",
    "pull push images build import rmi": (
        "there are no images of its own: --root takes a directory, or an image of a file system"
    ),
    "console logs monitor": "a machine's console is the terminal it was started on, or --console",
    "cp copy": "a program's Machine.put and Machine.get do that, or --fs",
    "migrate send": "vmm snapshot here, and vmm restore there, with the directory copied, do that",
}
"""Subcommands of other programs that nothing here is called like, and what there is instead."""


def row(name: str) -> Foreign | None:
    """The row that has the spelling `name`."""
    return next((each for each in TABLE if name in each.names), None)


_MADE_ANYWAY = "the machine has it, or another option makes it"


def complaint(
    command: str,
    argv: Sequence[str],
    name: str,
    known: dict[str, Option],
    after: Sequence[str] = (),
) -> str:
    """What to say of `name`, an option in `argv` that `command` does not have; empty: nothing.

    `after` is the command of `vmm exec`, which follows `--`.
    """
    whole = _whole(command, argv, known, after)
    if whole:
        return f"{name!r} is no option; say {whole}"
    value = _value_of(argv, name)
    found = row(name)
    if name == "-v" and ":" not in value:  # it is --verbose, which this command does not have
        found = None
    if found is not None:
        example = "" if found.ours is _device_or_image else found.takes
        words = found.words(value or example) if found.ours else None
        if words and all(word in known for word in _options(words)):
            if not words[0].startswith("-"):
                if not value:
                    return f"{name!r} is no option; the file follows without one: {command} FILE"
                words = [*command.split(), *words, *(["--", *after] if after else [])]
            return f"{name!r} is no option; say {_shown(words)}"
        if found.why and (words == [] or not found.ours):
            return f"{name!r} is no option; leave it out: {found.why}"
        if words == []:
            return f"{name!r} is no option; leave out {_given(name, value)}: {_MADE_ANYWAY}"
        if found.instead:
            return f"{name!r} is no option; {found.instead}"
        owner = next((other for other in _options(words or []) for other in _owners(other)), "")
        if words and owner:
            return f"{name!r} is no option; {owner} has one: {_shown(words)}"
        shown = found.words(found.takes) if found.ours and words is None else None
        if shown and _options(shown) and all(word in known for word in _options(shown)):
            return f"{name!r} is no option; {shown[0]} is, as in {_shown(shown)}"
    double = f"-{name}"
    if len(name) > 2 and name[:2] != "--" and double in known:
        return f"{name!r} is no option; say {_shown([double, value or known[double].metavar])}"
    owners = _owners(name)
    if owners:
        return f"{name!r} is no option of {command}; it is one of {', '.join(owners)}"
    if len(name) > 2 and name[1] != "-" and name[:2] in known:
        return ""
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1, NEAR)
    return f"{name!r} is no option; {near[0]} is one" if near else ""


def _given(name: str, value: str) -> str:
    return f"{name} {value}" if value else name


def surplus(
    command: str, operand: str, operands: Sequence[tuple[str, str]], known: dict[str, Option]
) -> str:
    """What to say of operands too many, each with the word before it; empty: nothing.

    One may be the value of an option whose value follows a `=`, or Docker's `-v DIR:PATH`.
    """
    for word, before in operands:
        option = known.get(before)
        if option is not None and option.optional:
            words = values.VALUES[before](word)
            if words is None:
                continue
            why = "its value follows a '='; " if "=" in words[0] else ""
            return f"{before} {word}: {why}say {_shown(words)}"
        if before == "-v" and ":" in word:
            words = values.fs(word)
            if words and "--fs" in known:
                return f"-v {word}: -v is --verbose; say {_shown(words)}"
    if command == "vmm resize":
        return f"only one DISK can be given; its size is told by --size {operands[1][0]}"
    if operand == "KERNEL" and command == "vmm run":
        first, second = operands[0][0], operands[1][0]
        return (
            f"only one KERNEL can be given, not {first!r} and {second!r}; a command is run by "
            f"vmm exec KERNEL -- CMD, words for the kernel's command line follow --append"
        )
    return ""


def spelling(args: Arguments) -> str:
    """What to say of values in `args` that other programs spell so; empty: there is none."""
    for option, value in (*(("", word) for word in args.operands), *args.everything()):
        what = f"{option} {value}".lstrip()
        expanded = _expanded(value)
        if expanded != value:
            return (
                f"{what}: the shell expands ~ only where a word begins with it; say "
                f"{_shown([option, expanded])}"
            )
        if option not in TEXTS and _is_url(value):
            if value.startswith("http"):
                return f"{what}: vmm opens files; fetch it first: {_shown(['curl', '-LO', value])}"
            return f"{what}: vmm opens files and block devices, no URLs; copy it into a file first"
    path = args.operands[0] if args.operands else ""
    words = values.firecracker(path) if path.endswith(".json") else None
    if words:
        return f"{path} is Firecracker's; in place of it, say {_shown(words)}"
    for option, ours in values.VALUES.items():
        for value in args.values(option):
            words = ours(value) if value else None
            if words and words not in ([option, value], [f"{option}={value}"]):
                return f"{option} {value}: say {_shown(words)}"
    return ""


TEXTS = ("--append", "--env")
"""Options whose values are the guest's words."""


def _expanded(text: str) -> str:
    """`text` with `~/` at its beginning, or after a `=`, expanded."""
    home = os.path.expanduser("~")
    if text.startswith("~/"):
        text = home + text[1:]
    return text.replace("=~/", f"={home}/")


def _is_url(text: str) -> bool:
    """Whether `text` is a URL, or has one after a `=`."""
    scheme, colon, _ = text.rpartition("=")[2].partition("://")
    return bool(colon) and scheme.isalnum() and not os.path.exists(text)


def subcommand(name: str, arguments: Sequence[str]) -> str:
    """What to say of a subcommand `name` that there is not; empty: nothing."""
    for ours, theirs in COMMANDS.items():
        if name in theirs.split():
            return f"vmm {ours} does that"
    for verbs, instead in NO_COMMANDS.items():
        if name in verbs.split():
            return instead
    if os.path.isfile(name):
        return f"to boot it, say {_shown(['vmm', 'run', name, *arguments])}"
    found = row(name)
    if found is None:
        from difflib import get_close_matches

        from vmm.cli import COMMANDS as NAMES

        near = get_close_matches(name.lower(), NAMES, 1, NEAR)
        return f"{near[0]} is one" if near else ""
    from vmm.cli.run import PARSER

    known = {name: option for option in PARSER.options for name in option.names}
    whole = _whole(PARSER.command, [name, *arguments], known, ())
    if whole:
        return f"say {whole}"
    if not found.ours and not found.takes and found.instead:
        return found.instead
    return "options follow a command, as in vmm run KERNEL"


def _whole(
    command: str, argv: Sequence[str], known: dict[str, Option], after: Sequence[str]
) -> str:
    """The command line in our words, if each of its words is understood and KERNEL is among them;
    empty: it is not. `after` is what stood after its `--`."""
    ours: list[str] = []
    operands: list[str] = []
    rest = list(argv)
    changed = 0
    protected = foreign_kernel = False
    while rest:
        word = rest.pop(0)
        if word == "--":
            break
        name, equals, value = word.partition("=")
        option = known.get(name)
        if option is not None and not (name == "-v" and rest and ":" in rest[0]):
            if option.metavar and not option.optional and not equals and rest:
                value = rest.pop(0)
            ours += _respelled(option.name, word, value)
            continue
        if len(word) < 2 or word[0] != "-":
            operands.append(word)
            continue
        found = row(name)
        if found is None:
            return ""
        changed += 1
        if name == SNAPSHOT:
            protected = True
            continue
        if found.instead and not found.ours:
            return ""  # leaving it out would make another machine of it
        if found.takes and not equals and rest and rest[0][:1] != "-":
            value = rest.pop(0)
        words = found.words(value or found.takes) if found.ours else []
        if words is None or (found.ours and found.takes and not value and words):
            return ""
        if words and words[0][:1] != "-":
            operands.append(words[0])
            foreign_kernel = True
        elif all(each in known for each in _options(words)):
            ours += words
        else:
            return ""
    if len(operands) != 1 or (changed < 2 and not foreign_kernel):
        return ""
    if protected:
        disks = [number + 1 for number, word in enumerate(ours[:-1]) if word == "--drive"]
        for number in disks:
            if not {"snapshot", "readonly"} & set(ours[number].split(",")):
                ours[number] += ",snapshot"
    end = ["--", *after] if after else []
    return _shown([*command.split(), operands[0], *ours, *end])


def _respelled(option: str, word: str, value: str) -> list[str]:
    """Our `option` as it was given, `word`, with its value in our words."""
    words = values.VALUES[option](value) if value and option in values.VALUES else None
    if words is None:
        words = [word, value] if value and "=" not in word else [word]
    return words


def _options(words: list[str]) -> list[str]:
    """The options' names among `words`; the word after one may be its value."""
    return [words[0].partition("=")[0]] if words and words[0][:1] == "-" else []


def _owners(name: str) -> list[str]:
    """The commands that have an option `name`."""
    from vmm.cli import config, doctor, exec, resize, restore, run, snapshot, version

    commands = (run, exec, restore, snapshot, resize, config, doctor, version)
    parsers = [each.PARSER for each in commands]
    return [p.command for p in parsers if any(name in option.names for option in p.options)]


def _value_of(argv: Sequence[str], name: str) -> str:
    """The value given with `name`: after a `=`, or the next word."""
    for number, word in enumerate(argv):
        before, equals, value = word.partition("=")
        if before == name:
            if equals:
                return value
            after = argv[number + 1] if number + 1 < len(argv) else ""
            return after if after[:1] != "-" else ""
    return ""


def _shown(words: Sequence[str]) -> str:
    from shlex import join

    return join([word for word in words if word])
