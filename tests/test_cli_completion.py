"""vmm/cli/completion.py: asked of the shells themselves, where they are installed."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmm.cli import COMMANDS
from vmm.cli.completion import SHELLS, main, script, values
from vmm.cli.tables import parsers, share
from vmm.config import MachineConfig
from vmm.errors import UsageError

QUESTIONS = [
    # What stands on the line up to the cursor, what must be offered, what must not.
    ("vmm ", {*COMMANDS}, {"--boot"}),
    ("vmm re", {"restore"}, {"run"}),
    ("vmm run --bo", {"--boot"}, {"--cpus"}),
    ("vmm run --boot ", {"auto", "bzimage", "elf64", "pvh"}, {"vmlinuz"}),
    ("vmm exec --transport p", {"pci"}, {"mmio"}),
    ("vmm snapshot x --disks ", {"copy", "keep"}, {"overlay"}),
    ("vmm restore x --disks ", {"overlay", "write"}, {"copy"}),
    ("vmm run vml", {"vmlinuz", "vmlinuz.old"}, {"dir"}),
    ("vmm run --initrd vml", {"vmlinuz"}, {"--boot"}),
    ("vmm run k --fs d", {"dir/"}, {"data"}),
    ("vmm restore d", {"dir/"}, {"data"}),
    ("vmm completion ", {"bash", "zsh", "fish"}, {"dir"}),
    ("vmm config d", {"data", "dir/"}, {"doctor"}),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("vmlinuz", "vmlinuz.old", "data"):
        (tmp_path / name).write_text("")
    (tmp_path / "dir").mkdir()
    return tmp_path


def needs(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    return path


def bash_offers(line: str, place: Path) -> set[str]:
    """What bash's own completion function answers for `line`."""
    words = line.split(" ")
    harness = """
        source "$1"; shift
        compopt() { :; }    # it is for the line editor, which does not run here
        COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _vmm
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    (place / ".script").write_text(script("bash"))
    done = subprocess.run(
        [needs("bash"), "--norc", "-c", harness, "bash", ".script", *words],
        cwd=place, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    found = set(done.stdout.split())
    return {f"{each}/" if (place / each).is_dir() else each for each in found}


def fish_offers(line: str, place: Path) -> set[str]:
    (place / ".script").write_text(script("fish"))
    done = subprocess.run(
        [needs("fish"), "--no-config", "-c", f"source .script; complete -C '{line}'"],
        cwd=place, env={**os.environ, "HOME": str(place)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return {each.partition("\t")[0] for each in done.stdout.splitlines()}


@pytest.mark.parametrize(("line", "offered", "not_offered"), QUESTIONS)
def test_bash(line: str, offered: set[str], not_offered: set[str], place: Path) -> None:
    found = bash_offers(line, place)
    assert offered <= found and not found & not_offered, found


@pytest.mark.parametrize(("line", "offered", "not_offered"), QUESTIONS)
def test_fish(line: str, offered: set[str], not_offered: set[str], place: Path) -> None:
    found = fish_offers(line, place)
    assert offered <= found and not found & not_offered, found


class Zsh:
    """An interactive zsh on a terminal, with the completion loaded; `tab` types and looks."""

    def __init__(self, place: Path) -> None:
        zsh = needs("zsh")
        (place / ".script").write_text(script("zsh"))
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(place)
            env = {"HOME": str(place), "TERM": "dumb", "PATH": os.environ["PATH"], "PS1": "> "}
            os.execve(zsh, [zsh, "-f", "-i"], env)
        self.type(
            "autoload -U compinit; compinit -u -D; setopt NO_BEEP; unsetopt ALWAYS_LAST_PROMPT"
        )
        self.type(
            "zstyle ':completion:*' list-rows-first yes; LISTMAX=0; source .script; print re''ady"
        )
        self.read_until("ready")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode() + b"\n")

    def read_until(self, mark: str, seconds: float = 60) -> str:
        """What is shown up to `mark`; fails after `seconds`."""
        seen, end = "", time.monotonic() + seconds
        while mark not in seen:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], seen
            seen += os.read(self.fd, 65536).decode(errors="replace")
        return seen

    def tab(self, line: str) -> str:
        """What is shown for `line` and two Tabs."""
        os.write(self.fd, line.encode() + b"\t\t")
        time.sleep(0.5)  # the list is drawn before the line is given up, not after
        os.write(self.fd, b"\x15print do''ne\n")
        return self.read_until("done")

    def close(self) -> None:
        os.close(self.fd)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


def test_zsh(place: Path) -> None:
    zsh = Zsh(place)
    try:
        for line, offered, _ in QUESTIONS:
            shown = zsh.tab(line)
            missing = [each for each in offered if each not in shown and each not in line]
            assert not missing, (line, missing, shown)
    finally:
        zsh.close()


@pytest.mark.parametrize(("shell", "check"), [("bash", "-n"), ("zsh", "-n"), ("fish", "-n")])
def test_the_shell_takes_the_script(shell: str, check: str, tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(script(shell))
    done = subprocess.run([needs(shell), check, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_option_of_every_command_is_in_every_script() -> None:
    for shell in SHELLS:
        text = script(shell)
        for name, parser in parsers().items():
            for option in parser.options:
                for each in option.names:
                    spelt = each if shell != "fish" else f"{'-l' if each[1] == '-' else '-s'} "
                    assert spelt in text and each.lstrip("-") in text, (shell, name, each)


def test_words_that_are_offered_are_taken() -> None:
    for option, keyword in (("--boot", "boot"), ("--transport", "transport"), ("--cpu", "cpu")):
        for word in values("run", option):
            MachineConfig("vmlinuz", **{keyword: word})  # type: ignore[arg-type]
    for word in values("run", "--on-panic"):
        MachineConfig("vmlinuz", on_panic=word)
    for word in values("run", "--console"):
        MachineConfig("vmlinuz", console=word + "log" if word[-1] == ":" else word)
    for word in values("run", "--net"):
        MachineConfig("vmlinuz", nets=[word + "x" if word[-1] == "=" else word])
    for name, parser in parsers().items():
        for option in parser.options:
            for word in values(name, option.name):
                assert word in option.help or option.name in ("--boot", "--cpu", "--transport",
                    "--on-panic", "--console", "--net"), (name, option.name, word)  # fmt: skip


def test_a_shell_there_is_none_for() -> None:
    with pytest.raises(UsageError, match="'ksh'; there is one for bash, zsh, fish"):
        main(["ksh"])


def test_the_command_prints_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "completion", "bash"], capture_output=True, check=True
    )
    assert done.stdout.decode() == script("bash") and done.stderr == b""


def test_what_the_wheel_installs_is_the_same() -> None:
    made = share()
    assert made["bash-completion/completions/vmm"] == script("bash")
    assert len(made) == 1 + len(SHELLS)
