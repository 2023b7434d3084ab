"""`vmm run`: boot a kernel, connect its console, end with a status that says how it went."""

from __future__ import annotations

import os
import sys

from vmm.cli.arguments import Parser
from vmm.config import BOOT_MODES, ON_PANIC, MachineConfig
from vmm.errors import UsageError
from vmm.units import format_size, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from vmm.machine import Machine

EPILOG = """\
exit status:
  0    the guest powered off or rebooted
  N    the byte the guest wrote to I/O port 0xf4
  2    wrong usage                      120  guest panic (pvpanic)
  69   the host cannot run it           121  triple fault
  70   the monitor failed               122  emulation failure, failed entry
  124  --timeout passed                 130  ended by Ctrl-A x or SIGINT; 129 SIGHUP, 143 SIGTERM

on a terminal: Ctrl-A x ends the machine, Ctrl-A h helps, Ctrl-A c sends a break.
SIGTERM presses the ACPI power button; a second one ends the machine.
"""


def parser() -> Parser:
    """The options of `vmm run`."""
    p = Parser("vmm run", "Boot KERNEL (bzImage or ELF vmlinux) in a virtual machine.", EPILOG)
    add = p.add_argument
    add("kernel", metavar="KERNEL", help="bzImage or ELF vmlinux")
    add(
        "--initrd",
        metavar="FILE",
        action="append",
        default=[],
        help="initial RAM disk; repeat to concatenate several",
    )
    add(
        "--append",
        metavar="CMDLINE",
        action="append",
        default=[],
        help="added to the kernel command line after the default (shown with -v)",
    )
    add("--memory", metavar="SIZE", default="256M", help="guest RAM (default 256M)")
    add("--cpus", metavar="N", default="1", help="vCPUs (default 1)")
    add(
        "--cpu",
        metavar="POLICY",
        default="host",
        help="host, max, x86-64-v2, -v3 or -v4, then ,+feature,-feature (default host)",
    )
    add(
        "--console",
        metavar="WHERE",
        default="auto",
        help="auto (this terminal), none, file:PATH or pty",
    )
    add("--boot", metavar="HOW", default="auto", help=", ".join(BOOT_MODES) + " (default auto)")
    add("--no-acpi", action="store_true", help="an MP table instead of ACPI")
    add("--timeout", metavar="S", help="end the machine after S seconds, status 124")
    add(
        "--on-panic",
        metavar="ACTION",
        default="exit",
        help=" or ".join(ON_PANIC) + " when the guest panics (default exit)",
    )
    add("-v", "--verbose", action="store_true", help="say what is loaded and what it does")
    return p


def configure(args: Namespace) -> MachineConfig:
    """A configuration from parsed options; UsageError names the one that cannot be."""
    try:
        cpus = int(args.cpus)
    except ValueError:
        raise UsageError(f"--cpus {args.cpus!r} is not a number; say for example 2") from None
    timeout = None
    if args.timeout is not None:
        try:
            timeout = float(args.timeout)
        except ValueError:
            raise UsageError(f"--timeout {args.timeout!r} is not a number of seconds") from None
    return MachineConfig(
        args.kernel,
        initrds=args.initrd,
        append=" ".join(args.append),
        memory=parse_size(args.memory, "--memory"),
        cpus=cpus,
        cpu=args.cpu,
        console=args.console,
        boot=args.boot,
        acpi=not args.no_acpi,
        timeout=timeout,
        on_panic=args.on_panic,
        trace=args.verbose,
    )


def main(argv: Sequence[str]) -> int:
    """Run; the exit status (see EPILOG)."""
    args = parser().parse_args(argv)
    config = configure(args)
    from vmm.cli.supervise import supervise
    from vmm.machine import Machine

    with Machine(config) as machine:
        if args.verbose:
            _describe(machine)
        backend = machine.platform.console.backend
        if config.console == "pty":
            _say(f"console on {backend.name.removeprefix('pty ')}")
        ended = supervise(machine)
    if backend.error:
        _say(backend.error)
    if ended.report:
        sys.stderr.write(ended.report.rstrip("\n") + "\n")
    if not ended.ok or args.verbose:
        _say(f"{ended.message} (status {ended.status})")
    return ended.status


def _describe(machine: Machine) -> None:
    config = machine.config
    _say(f"{config.cpus} vCPU ({config.cpu}), {format_size(config.memory)} of memory")
    if machine.boot is not None:
        for line in machine.boot.description:
            _say(line)
    _say(f"command line: {config.cmdline}")


def _say(line: str) -> None:
    os.write(2, f"vmm: {line}\n".encode())
