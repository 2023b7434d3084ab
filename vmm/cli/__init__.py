"""The `vmm` command. Each subcommand is a module, imported only when it is the one asked for."""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

USAGE = """\
usage: vmm run KERNEL [--initrd FILE ...] [--memory 256M] [--cpus N] ...
       vmm run MACHINE.toml [option ...]
       vmm exec KERNEL [--root DIR|IMAGE] [option ...] -- CMD [ARG ...]
       vmm snapshot DIR --control PATH [--base DIR] ... | --check
       vmm restore DIR [option ...]
       vmm resize DISK --control PATH [--size SIZE]
       vmm config FILE | --schema
       vmm doctor [--json]
       vmm version [--json]
       vmm completion bash|zsh|fish

Boot a Linux kernel in a virtual machine, run one command in such a machine,
keep a machine in a directory and go on from there, check a file that describes
one, or tell what this host can run.
`vmm COMMAND --help` lists a command's options.
"""
COMMANDS = (
    "run", "exec", "snapshot", "restore", "resize", "config", "doctor", "version", "completion",
)  # fmt: skip
"""Each is a module here, with a PARSER and a `main`."""
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
"""What the host says when it runs out of something; no fault of ours."""


def command() -> NoReturn:
    """The process `vmm`: `main`, and out without taking the interpreter down, which takes 5 ms.

    Machines are closed by now, and nothing is in a buffer (vmm.cli.say).
    """
    import atexit

    status = main()
    atexit._run_exitfuncs()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit status."""
    try:
        _hold_standard_descriptors()
        from vmm.errors import EXIT_HOST, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USAGE, VmmError

        try:
            return _command(list(sys.argv[1:] if argv is None else argv))
        except VmmError as err:
            _say(str(err))
            return err.exit_status
        except OSError as err:
            if err.errno == errno.ENOENT and _is_nowhere():
                _say("the directory you are in has been removed; cd to another")
                return EXIT_USAGE
            if err.errno not in EXHAUSTED:
                raise
            _say(f"the host has run out of something: {err}; see `ulimit -a`")
            return EXIT_HOST
    except KeyboardInterrupt as err:
        signum = getattr(err, "signum", 0)  # of vmm.cli.supervise.Terminated
        if not signum:
            return EXIT_INTERRUPTED
        _say(f"{err} (status {128 + signum})")
        return 128 + signum
    except BrokenPipeError:
        return 1
    except Exception as err:
        import traceback

        from vmm.cli.say import write_error

        write_error(traceback.format_exc())
        _say(f"internal error, {type(err).__name__}: a bug of vmm's own, please report the above")
        if isinstance(err, PermissionError):
            _say("where the sandbox is in the way of something, --sandbox off goes on without it")
        return EXIT_INTERNAL


def _command(args: list[str]) -> int:
    from vmm.errors import UsageError

    command = args[0] if args else ""
    if command == "run":
        from vmm.cli.run import main as run

        return run(args[1:])
    if command == "snapshot":
        from vmm.cli.snapshot import main as snapshot

        return snapshot(args[1:])
    if command == "restore":
        from vmm.cli.restore import main as restore

        return restore(args[1:])
    if command == "resize":
        from vmm.cli.resize import main as resize

        return resize(args[1:])
    if command == "exec":
        from vmm.cli.exec import main as execute

        return execute(args[1:])
    if command == "config":
        from vmm.cli.config import main as config

        return config(args[1:])
    if command == "doctor":
        from vmm.cli.doctor import main as doctor

        return doctor(args[1:])
    if command == "version":
        from vmm.cli.version import main as version

        return version(args[1:])
    if command == "completion":
        from vmm.cli.completion import main as completion

        return completion(args[1:])
    from vmm.cli.say import answer

    if command == "help" and args[1:]:
        if args[1] not in COMMANDS:
            raise UsageError(f"{args[1]!r} is not a command; use one of: {', '.join(COMMANDS)}")
        return _command([args[1], "--help"])
    if command in ("-h", "--help", "help"):
        from vmm.cli.width import columns, fit

        answer(fit(USAGE, columns()))
        return 0
    if command in ("-V", "--version"):
        from vmm import __version__

        answer(f"vmm {__version__}\n")
        return 0
    what = f"{command!r} is not a command" if args else "no command given"
    if args:
        from vmm.cli.foreign import subcommand

        hint = subcommand(command, args[1:])
        if hint:
            raise UsageError(f"{what}; {hint} (see vmm --help)")
    raise UsageError(f"{what}; use one of: {', '.join(COMMANDS)} (see vmm --help)")


def _is_nowhere() -> bool:
    """Whether this process's directory has been removed: relative paths lead nowhere."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _say(message: str) -> None:
    from vmm.cli.say import say

    say(message)


def _hold_standard_descriptors() -> None:
    """Put /dev/null where 0, 1 or 2 is closed: else /dev/kvm or a kernel would take its number,
    and be read as input or written to as output. Output cannot be written, as before."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDONLY)  # the lowest number that is free: this one
