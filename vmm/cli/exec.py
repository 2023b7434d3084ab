"""`vmm exec`: boot a kernel, run one command in the guest, end with its status."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os

from vmm.cli import run
from vmm.cli.arguments import HELP, Option, Parser, Spelled
from vmm.cli.sandbox import Sandbox
from vmm.cli.say import answer, say, write_error
from vmm.errors import EXIT_AGENT, EXIT_OK, AgentError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.cli.arguments import Arguments
    from vmm.config import MachineConfig
    from vmm.machine import Machine

EXIT_CANNOT_EXECUTE, EXIT_NOT_FOUND = 126, 127
COMPLAINT = "vmm-agent: "
COMPLAINTS = 15
"""Of the lines with it, how many are shown."""
CONSOLE_LINES = 15
"""Lines of the console shown where the machine ended and not the command."""
SIGNALS = (
    *(_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT),
    *(_signal.SIGUSR1, _signal.SIGUSR2, _signal.SIGWINCH, _signal.SIGCONT),
)

NOT_HERE = (HELP, "--control")

EPILOG = """\
exit status:
  N        the command's, 128 and the number of the signal that ended it
  2        wrong usage                 125  the agent does not answer
  69, 70   as of vmm run               126  the command cannot be executed
  120-122  the machine failed          127  there is no such command
  124      --timeout passed            130  Ctrl-C before the command began

Ctrl-C, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 go to the command's process
group; a third Ctrl-C or SIGTERM ends the machine (SIGTERMs within a second count once), as
does a command that goes on for --grace seconds after SIGTERM.
"""

PARSER = Parser(
    "vmm exec",
    "Boot KERNEL, run CMD in it, and end with its status. Its standard input, output and error "
    "are this command's. In a tree where a kernel was built KERNEL may be left out (or be the "
    "tree): it is that kernel then, with its modules, and --root is /.",
    (
        Option(
            "--root",
            metavar="DIR|IMAGE",
            help="the root file system: a directory, or an image of a file system; neither is "
            "changed, what is written goes with the machine",
        ),
        Option(
            "-e",
            "--env",
            metavar="NAME=VALUE",
            repeat=True,
            help="a variable of the command's environment; NAME alone: with the value it has here",
        ),
        Option(
            "--rw",
            metavar="DIR",
            repeat=True,
            help="a directory here that the guest has at the same path and may write",
        ),
        Option(
            "--overlay",
            metavar="DIR",
            repeat=True,
            help="a directory here that the guest has at the same path; what it writes there goes "
            "with the machine",
        ),
        Option(
            "-u",
            "--user",
            metavar="USER",
            help="whom the command runs as: USER or USER:GROUP, names or numbers of the guest "
            "(default root)",
        ),
        Option(
            "-w",
            "--workdir",
            metavar="DIR",
            help="the command's directory (default /; with --root /, or inside of --rw and "
            "--overlay, the one you are in)",
        ),
        Option("-t", "--tty", help="give the command a terminal, this one"),
        Option(
            "--modules",
            metavar="DIR",
            help="the kernel's lib/modules/VERSION, or the tree it was built in, if it is not "
            "beside the kernel",
        ),
        *(option for option in run.PARSER.options if option.name not in NOT_HERE),
    ),
    operand="KERNEL",
    after="-- CMD [ARG ...]",
    epilog=EPILOG,
)


def main(argv: Sequence[str]) -> int:
    """Boot, run the command; the exit status (see EPILOG)."""
    before, dashes, command = _split(list(argv))
    from vmm.cli.exec_words import parse

    args, tree = parse(PARSER, before, command, dashes)
    if args.given(HELP):
        answer(PARSER.help_text().replace(" KERNEL ", " [KERNEL] ", 1))
        return EXIT_OK
    if not command:
        after = " after --" if dashes else "; it comes after --"
        raise UsageError(f"no command{after}: vmm exec KERNEL [option ...] -- CMD [ARG ...]")
    environment = _environment(args)
    from vmm.cli.supervise import parse_grace

    tty = args.given("--tty")
    if tty and not os.isatty(0):
        raise UsageError("--tty: standard input is no terminal; leave --tty out")
    with Spelled(args):
        parse_grace(args.value("--grace"))
        config = configure(args, tree)
    directory, note = _directory(args, config)
    if args.given("--workdir") and not args.value("--workdir"):
        raise UsageError("--workdir is an empty name; give a directory, or leave it out")
    user = args.value("--user")
    if args.given("--user") and not user.partition(":")[0]:
        raise UsageError(f"--user {user!r} has no name; say USER or USER:GROUP, as in 1000:1000")
    from vmm.agent.wire import EXECUTE, TERMINAL, request
    from vmm.agent.wire import environment as merged

    size = _terminal_size() if tty else (24, 80)
    try:
        first = request(
            EXECUTE, command, directory=directory, flags=TERMINAL if tty else 0, size=size,
            environment=merged(environment, user=user, tty=tty), user=user,
        )  # fmt: skip
    except (OSError, ValueError) as err:
        raise UsageError(f"the command cannot be: {err}") from None
    with Spelled(args), Sandbox.of(args, config) as sandbox:
        grace = args.value("--grace")
        return _run(config, command, directory, first, tty, user, grace, note, sandbox)


def _directory(args: Arguments, config: MachineConfig) -> tuple[str, str]:
    """The command's directory, empty for the guest's /; and what is to be said about it."""
    if args.given("--workdir"):
        return args.value("--workdir"), ""
    from vmm.agent.root import keeps

    try:
        here = os.getcwd()
    except OSError:  # it has been removed
        return "", ""
    if config.root is not None and keeps(config.root, config.rw + config.overlay, here):
        if not os.access(here, os.X_OK):
            return "", f"this user may not enter {here}: the command begins in /"
        return here, ""
    if config.root is not None and os.path.realpath(config.root) == "/":
        top = here.split("/", 2)[1]
        return "", (
            f"{here} is not in the guest, which has a /{top} of its own: the command begins in /; "
            f"--overlay {here} (or --rw) brings it there"
        )
    return "", ""


def configure(args: Arguments, tree: str | None = None) -> MachineConfig:
    """The machine's configuration; `tree` is where its kernel was built, where that was given for
    it."""
    more: dict[str, object] = {"agent": True}
    if args.given("--root"):
        more["root"] = args.value("--root")
    elif tree is not None and not args.given("--initrd"):
        from vmm.agent.archive import parameter

        if parameter(" ".join(args.values("--append")), "root") is None:
            more["root"] = "/"
    for option in ("--rw", "--overlay"):
        if args.given(option):
            more[option[2:]] = args.values(option)
    if args.given("--modules"):
        more["modules"] = args.value("--modules")
    config = run.configure(args, "none", more)
    if config.console_where == "auto":
        raise UsageError(
            f"--console {config.console}: this terminal is the command's; "
            "file:PATH, pty and none work"
        )
    if config.root is None and not config.initrds:
        from vmm.agent.archive import parameter

        if parameter(config.append, "root") is None:
            raise UsageError(
                "no root file system for the command: give --root DIR, --root IMAGE or "
                "--initrd FILE"
            )
    return config


def _run(
    config: MachineConfig,
    command: list[str],
    directory: str,
    first: bytes,
    tty: bool,
    user: str,
    grace_text: str,
    note: str,
    sandbox: Sandbox,
) -> int:
    from vmm.cli.relay import Relay
    from vmm.cli.status import StatusLine
    from vmm.cli.supervise import Signals, parse_grace
    from vmm.console.terminal import Terminal
    from vmm.machine import Machine

    grace = parse_grace(grace_text)
    with (
        Signals(SIGNALS) as signals,
        StatusLine(f"loading {config.kernel}") as status,
        Machine(config) as machine,
    ):
        machine.on_error = say
        if config.trace:
            run.describe(machine)
            say(_kernels_modules(config))
        if note:
            say(note)
        run.warn_of_host(machine)
        status.say("starting the guest", lambda: _last_line(machine))
        with Relay(machine, signals, tty, grace) as relay:
            try:
                signals.armed()
                sandbox.confine(machine, status)
                machine.start()
                relay.wait_for_agent()
                status.end()
                if machine.exit is None:
                    _pass_on(machine)
                    with Terminal(0 if tty else -1, post=False):
                        relay.serve(first)
            except AgentError as err:
                status.end()
                if machine.exit is None:
                    _show_console(machine)
                    say(str(err))
                    return EXIT_AGENT
            failure = relay.session.failure(command, directory, user)
            if failure is not None:
                return _cannot(failure, directory)
            if relay.session.returncode is not None:
                code = relay.session.returncode
                return code if code >= 0 else 128 - code
            status.end()
            ended = machine.exit
            known = run.what_is_known(machine, ended) if ended is not None else []
            machine.close()
    return _machine_ended(machine, known)


def _kernels_modules(config: MachineConfig) -> str:
    """What was taken for the kernel, and where its modules are from."""
    from vmm.agent.modules import find_tree
    from vmm.boot.kconfig import KernelFile
    from vmm.initramfs.modules import is_build_tree

    assert config.kernel is not None
    tree = config.modules or find_tree(config.kernel)
    where = f"modules from {tree}" if tree else "no modules: what it needs is built in"
    if tree and is_build_tree(tree):
        where = f"modules from {tree}, where it was built"
    return f"kernel {KernelFile(config.kernel).release or 'of unknown release'}, {where}"


def _pass_on(machine: Machine) -> None:
    """What the agent could not do, and went on without: on the console nobody would see it."""
    lines = machine.console.text().replace("\r", "").split("\n")
    said = [line for line in lines if line.startswith(COMPLAINT)]
    for line in said[:COMPLAINTS]:
        say(f"in the guest: {line.removeprefix(COMPLAINT)}")
    if len(said) > COMPLAINTS:
        say(f"in the guest: and {len(said) - COMPLAINTS} more lines of this kind")


def _cannot(failure: Exception, directory: str) -> int:
    """The command could not be started."""
    if isinstance(failure, LookupError):
        say(f"--user: {failure.args[0]}; names and numbers are the guest's")
        return EXIT_CANNOT_EXECUTE
    if not isinstance(failure, OSError):
        say(str(failure))
        return EXIT_AGENT
    if directory and failure.filename == directory:
        say(f"--workdir {directory}: {failure.strerror} (in the guest)")
        return EXIT_CANNOT_EXECUTE
    say(f"{failure.filename}: {failure.strerror} (in the guest)")
    return EXIT_NOT_FOUND if isinstance(failure, FileNotFoundError) else EXIT_CANNOT_EXECUTE


def _last_line(machine: Machine) -> str:
    """The console's last line that has something on it, for the status line."""
    machine.platform.flush()
    lines = machine.console.text()[-400:].split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last}" if last else ""


def _machine_ended(machine: Machine, known: list[str]) -> int:
    """The machine ended, and not the command."""
    ended = machine.exit
    assert ended is not None
    if ended.kind not in ("stopped", "timeout"):
        _show_console(machine)
    if ended.report:
        write_error(ended.report.rstrip("\n") + "\n")
    status = ended.status or EXIT_AGENT
    for line in known:
        say(line)
    say(f"{ended.message}, before the command had ended (status {status})")
    return status


def _show_console(machine: Machine) -> None:
    lines = machine.console.text().replace("\r", "").rstrip("\n").split("\n")
    for line in lines[-CONSOLE_LINES:]:
        if line:
            say(f"console: {line}")


def _split(argv: list[str]) -> tuple[list[str], bool, list[str]]:
    """What is before the first `--`, whether there is one, and what is after it."""
    if "--" not in argv:
        return argv, False, []
    at = argv.index("--")
    return argv[:at], True, argv[at + 1 :]


def _environment(args: Arguments) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    if args.given("--tty"):
        found["TERM"] = os.environ.get("TERM", "dumb")
    for word in args.values("--env"):
        name, equals, value = word.partition("=")
        if not name:
            raise UsageError(f"--env {word!r} has no name; say NAME=VALUE")
        if not equals and name not in os.environ:
            raise UsageError(f"--env {name}: it has no value here; say {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def _terminal_size() -> tuple[int, int]:
    try:
        size = os.get_terminal_size(0)
    except OSError:
        return 24, 80
    return size.lines, size.columns
