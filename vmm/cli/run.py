"""`vmm run`: boot a kernel, connect its console, end with a status that says how it went."""

from __future__ import annotations

import os
import sys

from vmm.cli.arguments import HELP, Option, Parser, Spelled
from vmm.cli.say import answer, end_guests_line, say, write_error
from vmm.config import BOOT_MODES, ON_PANIC, TRANSPORTS, MachineConfig
from vmm.errors import EXIT_OK, UsageError
from vmm.units import format_size, parse_seconds, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.cli.arguments import Arguments
    from vmm.cli.sandbox import Sandbox
    from vmm.cli.status import StatusLine
    from vmm.cli.supervise import Signals
    from vmm.machine import Machine, MachineExit

EPILOG = """\
exit status:
  0    the guest powered off or rebooted
  N    the byte the guest wrote to I/O port 0xf4
  2    wrong usage                      120  guest panic (pvpanic)
  69   the host cannot run it           121  triple fault
  70   the monitor failed               122  emulation failure, failed entry
  124  --timeout passed                 130  ended by Ctrl-A x or SIGINT
  129  ended by SIGHUP                  143  ended by SIGTERM
  141  the reader of standard output has gone (vmm run ... | head -1)

on a terminal: Ctrl-A x ends the machine, Ctrl-A h helps, Ctrl-A c sends a break.
SIGTERM presses the ACPI power button. The machine ends after --grace, at a second SIGTERM (one
that comes within a second counts as the first), and at once where the guest has no power button.
"""

PARSER = Parser(
    "vmm run",
    "Boot KERNEL (bzImage or ELF vmlinux) in a virtual machine, or the machine that a file "
    "(MACHINE.toml, MACHINE.json) describes; options beside a file override it or add to it.",
    (
        Option(
            "--initrd",
            metavar="FILE",
            repeat=True,
            help="initial RAM disk; repeat to concatenate several",
        ),
        Option(
            "--append",
            metavar="CMDLINE",
            repeat=True,
            help="added to the kernel command line after the default (shown with -v)",
        ),
        Option("--memory", metavar="SIZE", default="256M", help="guest RAM (default 256M)"),
        Option("--cpus", metavar="N", default="1", help="vCPUs (default 1)"),
        Option(
            "--cpu",
            metavar="POLICY",
            default="host",
            help="host, max, x86-64-v2, -v3 or -v4, then ,+feature,-feature (default host)",
        ),
        Option(
            "--console",
            metavar="WHERE",
            default="auto",
            help="auto (this terminal), none, file:PATH or pty; hvc or hvc,WHERE: a virtio console",
        ),
        Option(
            "--port",
            metavar="PORT",
            repeat=True,
            help="name=N,socket=PATH or name=N,file=PATH: a virtio console port",
        ),
        Option(
            "--boot", metavar="HOW", default="auto", help=", ".join(BOOT_MODES) + " (default auto)"
        ),
        Option(
            "--drive",
            metavar="DISK",
            repeat=True,
            help="image or block device, then ,readonly ,snapshot (changes go with the machine) "
            ",format=F ,serial=S ,cache=none|unsafe ,queues=N ,werror=stop (pause when it is full) "
            ",bps=BYTES ,burst=BYTES ,iops=N ,iops-burst=N (limits, a second)",
        ),
        Option(
            "--net",
            metavar="NET",
            repeat=True,
            help="user, tap[=NAME], bridge=BR, socket=PATH or none, then ,mac=M ,pcap=FILE ,mtu=N; "
            "user: ,forward=tcp:HOST:GUEST ,host-loopback=on; tap: ,address=A/BITS ,queues=N "
            ",vhost=on (vhost-net) or auto; limits, a second: "
            ",rx-bps=BYTES ,rx-burst=BYTES ,rx-pps=N ,rx-pps-burst=N, the same with tx-",
        ),
        Option(
            "--rng",
            metavar="rate=BYTES",
            optional=True,
            help="a virtio entropy device, giving BYTES a second at most",
        ),
        Option(
            "--vhost-user-blk",
            metavar="SOCKET",
            repeat=True,
            help="a disk that a vhost-user back end serves on SOCKET, then ,queues=N ,readonly",
        ),
        Option(
            "--fs",
            metavar="DIR,tag=TAG",
            repeat=True,
            help="a host directory by virtio-fs (virtiofsd), then ,readonly ,suid (set-ID bits "
            "may be set) ,dev (device nodes made): mount -t virtiofs TAG /mnt",
        ),
        Option(
            "--balloon",
            metavar="SIZE",
            optional=True,
            help="a memory balloon, with SIZE in it; free memory goes back to the host",
        ),
        Option(
            "--vsock",
            metavar="VSOCK",
            help="cid=N,path=PREFIX: sockets to the guest (connect to PREFIX, write CONNECT port) "
            "and from it (it reaches PREFIX_PORT); or cid=N,vhost: by AF_VSOCK (vhost-vsock)",
        ),
        Option(
            "--transport",
            metavar="BUS",
            default="mmio",
            help="what virtio devices are on: " + " or ".join(TRANSPORTS) + " (default mmio)",
        ),
        Option(
            "--no-acpi",
            help="no ACPI tables: processors are found by the MP table, virtio devices by "
            "virtio_mmio.device= on the command line",
        ),
        Option(
            "--cmdline-devices",
            help="name virtio devices on the command line, with ACPI too: for a kernel without it",
        ),
        Option("--control", metavar="PATH", help="a socket by which `vmm snapshot` reaches it"),
        Option("--timeout", metavar="S", help="end the machine after S seconds, status 124"),
        Option(
            "--grace",
            metavar="S",
            default="30",
            help="end it S seconds after SIGTERM, if it goes on (default 30)",
        ),
        Option(
            "--on-panic",
            metavar="ACTION",
            default="exit",
            help=" or ".join(ON_PANIC) + " when the guest panics (default exit)",
        ),
        Option(
            "--sandbox",
            metavar="LEVEL",
            default="on",
            help="on: when the machine is built, this process gives up the files, system calls and "
            "privileges that it does not need (-v says what this host does not give); strict: all "
            "of it, or refuse to run; off (default on)",
        ),
        Option("-v", "--verbose", help="say what is loaded and what it does"),
    ),
    operand="KERNEL",
    epilog=EPILOG,
)


LISTS = (
    ("--initrd", "initrds"),
    ("--drive", "drives"),
    ("--net", "nets"),
    ("--port", "ports"),
    ("--fs", "shares"),
    ("--vhost-user-blk", "vhost_user_blks"),
)
TEXTS = (
    ("--cpu", "cpu"),
    ("--console", "console"),
    ("--boot", "boot"),
    ("--on-panic", "on_panic"),
    ("--rng", "rng"),
    ("--vsock", "vsock"),
    ("--transport", "transport"),
)
"""Options and the keywords of MachineConfig that take their values as they are."""


def configure(
    args: Arguments, console: str = "auto", more: dict[str, object] | None = None
) -> MachineConfig:
    """A configuration from parsed options; UsageError names the one that cannot be.

    `console` is what it is by default, `more` are keywords of other options.
    """
    kernel, values = args.operands[0], {**keywords(args), **(more or {})}
    if kernel.endswith((".toml", ".json")):
        from vmm.config_file import configure as from_file

        config = from_file(kernel, values, console=console)
        if config.kernel is None:
            raise UsageError(f"{kernel}: kernel is missing; it is the path of a bzImage or vmlinux")
    else:
        values.setdefault("console", console)
        config = MachineConfig(kernel, **values)  # type: ignore[arg-type]
    if config.console_where == "auto" and sys.stdout is None:
        raise UsageError("--console auto: standard output is closed; try --console none")
    for net in config.nets:
        if net.kind == "lan":
            raise UsageError(
                f"{net.what}: joins machines of one program, and this command has "
                "one machine; machines of several commands meet on a bridge: --net bridge=NAME"
            )
    if config.vsock is not None and not config.vsock.path and not config.vsock.vhost:
        raise UsageError("--vsock: no path; say for example --vsock cid=3,path=/tmp/vm.vsock")
    return config


def keywords(args: Arguments) -> dict[str, object]:
    """The keywords of MachineConfig for what was given."""
    values: dict[str, object] = {key: args.value(name) for name, key in TEXTS if args.given(name)}
    values.update((key, args.values(name)) for name, key in LISTS if args.given(name))
    if args.given("--append"):
        values["append"] = " ".join(args.values("--append"))
    if args.given("--memory"):
        values["memory"] = parse_size(args.value("--memory"), "--memory")
    if args.given("--balloon"):
        values["balloon"] = parse_size(args.value("--balloon") or "0", "--balloon")
    if args.given("--no-acpi"):
        values["acpi"] = False
    if args.given("--cmdline-devices"):
        values["cmdline_devices"] = True
    if args.given("--verbose"):
        values["trace"] = True
    if args.given("--cpus"):
        cpus = args.value("--cpus")
        if not (cpus.isascii() and cpus.removeprefix("-").isdecimal() and len(cpus) < 10):
            raise UsageError(f"--cpus {cpus!r} is not a number; say for example 2")
        values["cpus"] = int(cpus)
    if args.given("--timeout"):
        try:
            values["timeout"] = parse_seconds(args.value("--timeout"))
        except ValueError:
            raise UsageError(
                f"--timeout {args.value('--timeout')!r} is not a number of seconds; say for "
                "example 30 or 0.5"
            ) from None
    return values


def main(argv: Sequence[str]) -> int:
    """Run; the exit status (see EPILOG)."""
    args = PARSER.parse(argv)
    if args.given(HELP):
        answer(PARSER.help_text())
        return EXIT_OK
    with Spelled(args):
        config = configure(args)
        describe_terminal(config)
        from vmm.machine import Machine

        return see_through(lambda: Machine(config), args, config)


def describe_terminal(config: MachineConfig) -> None:
    """Name this terminal's type and size on the kernel command line, where the console is on it.

    Linux gives TERM= to init as a variable. A serial line has no size: systemd sets that of the
    console from the parameters systemd.tty.*; a virtio console is told it by its device, too.
    """
    if config.console_where != "auto" or not config.default_append or not os.isatty(0):
        return
    term = os.environ.get("TERM", "")
    plain = term.isascii() and term.replace("-", "").replace("+", "").replace(".", "").isalnum()
    try:
        columns, rows = os.get_terminal_size(0)
    except OSError:
        return
    tty = "hvc0" if config.hvc else "ttyS0"
    words = [f"TERM={term}", f"systemd.tty.term.{tty}={term}"] if plain else []
    if columns and rows:
        words += [f"systemd.tty.rows.{tty}={rows}", f"systemd.tty.columns.{tty}={columns}"]
    given = {word.partition("=")[0] for word in config.append.split()}
    words = [word for word in words if word.partition("=")[0] not in given]
    config.append = " ".join([*words, config.append]).strip()


def see_through(
    make: Callable[[], Machine], args: Arguments, config: MachineConfig | None = None
) -> int:
    """Run the machine that `make` makes to its end and close it; the exit status.

    `config` is the machine's, where it is known already.
    """
    from vmm.cli.sandbox import Sandbox
    from vmm.cli.status import StatusLine
    from vmm.cli.supervise import Signals, parse_grace

    if args.given("--control"):
        from vmm.virtio import unix

        unix.check_path(f"--control {args.value('--control')}", args.value("--control"))
    grace = parse_grace(args.value("--grace"))
    with (
        Sandbox.of(args, config) as sandbox,
        Signals() as signals,
        StatusLine(f"loading {args.operands[0]}") as status,
        make() as machine,
    ):
        return _run(machine, signals, status, args.value("--control"), grace, sandbox)


def _run(
    machine: Machine,
    signals: Signals,
    status: StatusLine,
    control: str,
    grace: float,
    sandbox: Sandbox,
) -> int:
    """Run `machine` to its end and close it; the exit status.

    `control`: where its control socket is to be, if anywhere.
    """
    from vmm.cli.supervise import READER_GONE, supervise

    config = machine.config
    verbose = config.trace
    if config.console_where == "auto" and sys.stdout is None:
        raise UsageError("--console auto: standard output is closed; try --console none")
    machine.on_error = say
    if verbose:
        describe(machine)
    backend = machine.platform.console.backend
    if config.console_where == "pty":
        say(f"console on {backend.name.removeprefix('pty ')}")
    warn_of_host(machine)
    how = "Ctrl-A x ends it" if backend.interactive else "Ctrl-C ends it"
    status.say("started", lambda: f", and nothing on the console yet ({how})")
    machine.platform.console.before_output = status.end
    try:
        if control:
            from vmm.cli.control import Control

            with Control(control, machine, at_once=False) as requests:

                def begin() -> None:
                    sandbox.confine(machine, status, requests)
                    from vmm.cli.control_requests import Requests

                    requests.begin(Requests(machine))

                ended = supervise(machine, signals, lambda: requests.busy, grace, begin)
        else:
            ended = supervise(
                machine, signals, grace=grace, begin=lambda: sandbox.confine(machine, status)
            )
        status.end()
        known = what_is_known(machine, ended)
    finally:
        status.end()
        # Before signals take the process again: it gives the terminal back.
        machine.close()
    if ended.report or verbose or not ended.ok:
        end_guests_line(machine)
    if backend.error and ended.message != READER_GONE:
        say(backend.error)
    if ended.report:
        write_error(ended.report.rstrip("\n") + "\n")
    for line in known:
        say(line)
    if not ended.ok or verbose:
        say(f"{ended.message} (status {ended.status})")
    return ended.status


def what_is_known(machine: Machine, ended: MachineExit) -> list[str]:
    """What is said of a guest that did not end by itself.

    All there is to know where a time limit has passed. Where a person has ended it, only what
    explains an empty console: most ends of this kind have nothing to explain.
    """
    if ended.kind not in ("timeout", "stopped") or not ended.status:
        return []
    from vmm.machine import failure

    if ended.kind == "timeout":
        return failure.what_is_known(machine)
    lines = failure.console_known(machine)
    return lines + failure.vcpus_known(machine) if lines else []


def describe(machine: Machine) -> None:
    """What -v says of a machine that is about to start."""
    config = machine.config
    say(f"{config.cpus} vCPU ({config.cpu}), {format_size(config.memory)} of memory")
    if machine.boot is not None:
        for line in machine.boot.description:
            say(line)
    say(f"command line: {machine.platform.cmdline}")
    virtio = machine.platform.virtio
    for number, transport in enumerate(virtio.transports if virtio is not None else ()):
        assert virtio is not None
        say(f"virtio device {transport.name} {virtio.place_of(number)}")
    from vmm.virtio import kernel

    if kernel.library() is None:
        say("this vmm was built without a C compiler: virtqueues are served in Python, slower")
    machine.platform.pio.trace = machine.platform.mmio.trace = say


def warn_of_host(machine: Machine) -> None:
    """Say where this host cannot run the guest's kernel, before a person waits for it."""
    if machine.boot is None or not machine.boot.is_linux:
        return
    from vmm.machine.failure import backend

    if backend() == "kvm_pvm":
        say(
            "this host's KVM is kvm_pvm, which interprets guest kernel code: a stock Linux is "
            "silent for half a minute or more and cannot reach user space, see `vmm doctor`"
        )
