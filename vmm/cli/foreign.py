"""What is said of the words of other programs (vmm.cli.foreign_table): ours for them.

The module is imported only when a command line was wrong. `complaint` answers an unknown option,
`surplus` an operand too many, `spelling` a value that an option refuses.
"""

from __future__ import annotations

import os

from vmm.cli import foreign_values as values
from vmm.cli.foreign_table import SNAPSHOT, device_or_image, row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.cli.arguments import Arguments, Option

NEAR = 0.7
"""How alike two options' names must be, from 0 to 1, for one to be offered for the other."""


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
        example = "" if found.ours is device_or_image else found.takes
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
        words = _surplus_words([word for word, _ in operands[1:]])
        if words:
            return f"{operands[1][0]!r} is one KERNEL too many; say {_shown(words)}"
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
    foreign = path.lower().endswith(DESCRIPTIONS) and not path.endswith((".toml", ".json"))
    if foreign and os.path.isfile(path):
        return f"{path}: the name of a file that describes a machine ends in .toml or .json"
    for option, ours in values.VALUES.items():
        for value in args.values(option):
            words = ours(value) if value else None
            if words and words not in ([option, value], [f"{option}={value}"]):
                return f"{option} {value}: say {_shown(words)}"
    return ""


def _surplus_words(words: list[str]) -> list[str] | None:
    """The option that words after KERNEL belong to, where their look tells it."""
    first = words[0]
    if all("=" in word or word in PARAMETERS for word in words) and not os.path.exists(first):
        return ["--append", " ".join(words)]
    if len(words) > 1:
        return None
    name = os.path.basename(first).lower()
    if os.path.isdir(first):
        return values.fs(first)
    if name.startswith("initr") or name.endswith((".cpio", ".cpio.gz")):
        return ["--initrd", first]
    if name.endswith((".img", ".raw", ".qcow2", ".ext4", ".vmdk", ".vdi", ".vhdx")):
        return ["--drive", first]
    return values.memory(first) if first[-1:] in ("K", "M", "G", "k", "m", "g") else None


PARAMETERS = ("ro", "rw", "quiet", "debug", "single", "nokaslr", "nosmp", "noapic", "splash")
"""Words of a kernel's command line that have no `=`."""
DESCRIPTIONS = (".toml", ".json", ".yaml", ".yml", ".xml", ".ini", ".conf", ".cfg")
"""Endings of files that describe a machine, here and elsewhere."""
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
