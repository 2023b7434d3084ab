"""`vmm completion SHELL`: a script that completes the command's words, made from the tables.

What an option's value may be is its metavar's: a file, a directory, one of VALUES, or anything.
"""

from __future__ import annotations

from vmm.cli.arguments import HELP, Option, Parser
from vmm.cli.say import answer
from vmm.errors import EXIT_OK, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PARSER = Parser(
    "vmm completion",
    "Print a script for SHELL (bash, zsh or fish) with which it completes vmm's commands, options "
    "and values.",
    (),
    operand="SHELL",
    epilog="""\
bash: eval "$(vmm completion bash)" in ~/.bashrc
zsh:  eval "$(vmm completion zsh)" in ~/.zshrc, after compinit
fish: vmm completion fish | source in ~/.config/fish/config.fish
exit status: 0, or 2 for wrong usage.
""",
)

FILE, DIRECTORY = "file", "directory"
FILES = ("FILE", "PATH", "SOCKET", "DISK", "KERNEL", "KERNEL|FILE", "DIR|IMAGE", "IMAGE")
DIRECTORIES = ("DIR", "DIR,tag=TAG")
"""Metavars (of options and operands) that are files and directories."""
MORE_FILES = {"config": FILE, "completion": ""}
"""Operands that their name does not tell."""


def main(argv: Sequence[str]) -> int:
    """Print the script; the exit status."""
    args = PARSER.parse(argv)
    if args.given(HELP):
        answer(PARSER.help_text())
        return EXIT_OK
    shell = args.operands[0]
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shell!r}; there is one for {', '.join(SHELLS)}")
    answer(script(shell))
    return EXIT_OK


def script(shell: str) -> str:
    """The script for `shell`, one of SHELLS."""
    from vmm.cli.tables import parsers

    return "\n".join(SHELLS[shell](parsers())) + "\n"


def values(command: str, option: str) -> tuple[str, ...]:
    """What `option` of `command` may be, where that is one of a few words; else nothing."""
    from vmm.config import BOOT_MODES, ON_PANIC, TRANSPORTS
    from vmm.cpu.policy import POLICIES

    return {
        "--boot": BOOT_MODES,
        "--transport": TRANSPORTS,
        "--on-panic": ON_PANIC,
        "--cpu": POLICIES,
        "--console": ("auto", "none", "file:", "pty", "hvc"),
        "--net": ("user", "tap", "tap=", "bridge=", "socket=", "none"),
        "--disks": ("copy", "keep") if command == "snapshot" else ("overlay", "write"),
        "--pages": ("map", "uffd"),
        "--clock": ("step", "keep"),
    }.get(option, ())


def kind(metavar: str) -> str:
    """FILE, DIRECTORY, or empty: what a value of this name is."""
    return FILE if metavar in FILES else DIRECTORY if metavar in DIRECTORIES else ""


def operand(name: str, parser: Parser) -> tuple[str, tuple[str, ...]]:
    """What the operand of the command `name` is: its kind, and its words if it has few."""
    if name == "completion":
        return "", tuple(SHELLS)
    return kind(parser.operand), ()


def _bash(parsers: dict[str, Parser]) -> Iterator[str]:
    yield from BASH_BEGIN.format(commands=" ".join((*parsers, "--help", "--version"))).split("\n")
    for name, parser in parsers.items():
        yield f"    {name})"
        yield "        case $option in"
        for option in parser.options:
            if option.metavar and not option.optional:
                does = _bash_reply(kind(option.metavar), values(name, option.name))
                yield f"        {'|'.join(option.names)}) {does}; return ;;"
        yield "        esac"
        words = " ".join(each for option in parser.options for each in option.names)
        yield f'        if [[ $cur == -* ]]; then _vmm_words "{words}"'
        yield f"        else {_bash_reply(*operand(name, parser))}; fi ;;"
    yield from ("    esac", "}", "complete -F _vmm vmm")


BASH_BEGIN = """\
# bash completion for vmm; made by `vmm completion bash`
_vmm_words() {{ mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur"); }}
_vmm_files() {{ compopt -o filenames; mapfile -t COMPREPLY < <(compgen "$1" -- "$cur"); }}
_vmm() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} option=${{COMP_WORDS[COMP_CWORD-1]}} i
    COMPREPLY=()
    # bash takes --name=value apart at the equals sign
    if [[ $cur == = ]]; then cur=
    elif [[ $option == = ]]; then option=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if (( COMP_CWORD == 1 )); then _vmm_words "{commands}"; return; fi
    for (( i = 2; i < COMP_CWORD; i++ )); do
        # after it is what the guest runs
        if [[ ${{COMP_WORDS[i]}} == -- ]]; then _vmm_files -f; return; fi
    done
    case ${{COMP_WORDS[1]}} in"""


def _bash_reply(what: str, words: tuple[str, ...]) -> str:
    if words:
        return f'_vmm_words "{" ".join(words)}"'
    return {FILE: "_vmm_files -f", DIRECTORY: "_vmm_files -d"}.get(what, ":")


def _zsh(parsers: dict[str, Parser]) -> Iterator[str]:
    yield from ("#compdef vmm", "# zsh completion for vmm; made by `vmm completion zsh`")
    yield from ("_vmm() {", "  local -a commands=(")
    for name, parser in parsers.items():
        yield f"    {_quoted(f'{name}:{_sentence(parser.summary)}')}"
    yield from ("  )", "  if (( CURRENT == 2 )); then _describe command commands; return; fi")
    yield from ("  local name=$words[2]", "  shift words; (( CURRENT-- ))", "  case $name in")
    for name, parser in parsers.items():
        yield f"  {name}) _arguments \\"
        for option in parser.options:
            for each in option.names:
                yield f"      {_quoted(_zsh_option(name, option, each))} \\"
        action = _zsh_action(*operand(name, parser))
        yield f"      {_quoted(f'1:{parser.operand or None}:{action}')} '*:file:_files' ;;"
    yield from ("  esac", "}")
    # Sourced, it names itself; as a file in fpath it is the function's body.
    yield 'if [[ $funcstack[1] == _vmm ]]; then _vmm "$@"; else compdef _vmm vmm; fi'


def _zsh_option(command: str, option: Option, name: str) -> str:
    others = " ".join(each for each in option.names if not option.repeat)
    head = "*" if option.repeat else f"({others})"
    text = option.help
    for special in "[]:":
        text = text.replace(special, "\\" + special)
    if not option.metavar:
        return f"{head}{name}[{text}]"
    long = name.startswith("--")
    joint = ("=-" if option.optional else "=") if long else "+"
    colons = "::" if option.optional else ":"
    action = _zsh_action(kind(option.metavar), values(command, option.name))
    label = option.metavar.replace(":", "\\:")
    return f"{head}{name}{joint}[{text}]{colons}{label}:{action}"


def _zsh_action(what: str, words: tuple[str, ...]) -> str:
    if words:
        return f"({' '.join(words)})".replace(":", "\\:")
    return {FILE: "_files", DIRECTORY: "_files -/"}.get(what, " ")


def _fish(parsers: dict[str, Parser]) -> Iterator[str]:
    yield "# fish completion for vmm; made by `vmm completion fish`"
    yield "complete -c vmm -f"
    for name, parser in parsers.items():
        about = _quoted(_sentence(parser.summary))
        yield f"complete -c vmm -n __fish_use_subcommand -a {name} -d {about}"
    for name, parser in parsers.items():
        when = f"complete -c vmm -n '__fish_seen_subcommand_from {name}'"
        what, words = operand(name, parser)
        if words or what:
            yield f"{when} {_fish_values(what, words)}"
        for option in parser.options:
            names = " ".join(
                f"-l {each[2:]}" if each.startswith("--") else f"-s {each[1:]}"
                for each in option.names
            )
            takes = ""
            if option.metavar and not option.optional:
                choice = values(name, option.name)
                takes = " -r " + (_fish_values(kind(option.metavar), choice) or "-f")
            yield f"{when} {names}{takes} -d {_quoted(option.help)}"


def _fish_values(what: str, words: tuple[str, ...]) -> str:
    if words:
        return f"-f -a {_quoted(' '.join(words))}"
    return {FILE: "-F", DIRECTORY: "-f -a '(__fish_complete_directories)'"}.get(what, "")


def _sentence(text: str) -> str:
    """The first sentence of a summary, without its end."""
    return text.split(". ")[0].rstrip(".").replace("`", "")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


SHELLS: dict[str, Callable[[dict[str, Parser]], Iterator[str]]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
