"""The `vmm` command. Each subcommand is a module, imported only when it is the one asked for."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """\
usage: vmm run KERNEL [--initrd FILE ...] [--append CMDLINE] [--memory 256M] [--cpus N] ...
       vmm doctor [--json]
       vmm --version

Boot a Linux kernel in a virtual machine, or tell what this host can run.
`vmm run --help` lists the options.
"""
COMMANDS = ("run", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    command = args[0] if args else ""
    if command in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    if command in ("-V", "--version"):
        from vmm import __version__

        print(f"vmm {__version__}")
        return 0
    if command not in COMMANDS:
        what = f"{command!r} is not a command" if command else "no command given"
        print(f"vmm: {what}; use one of: {', '.join(COMMANDS)} (see vmm --help)", file=sys.stderr)
        return 2
    from vmm.errors import EXIT_INTERRUPTED, VmmError

    try:
        if command == "run":
            from vmm.cli.run import main as run

            return run(args[1:])
        from vmm.cli.doctor import main as doctor

        return doctor(args[1:])
    except VmmError as err:
        print(f"vmm: {err}", file=sys.stderr)
        return err.exit_status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 1
