"""The nested lane: a machine emulated by QEMU (TCG) in which Debian's kernel offers /dev/kvm.

QEMU emulates an AMD processor with SVM and nested paging, so kvm_amd in the emulated kernel is a
genuine KVM that boots stock kernels, on any host. The host's root file system is the machine's
root, so the host's Python and this clone are there; nothing written in the machine reaches the
host but what is put into /run/lane/results.

    with NestedLane() as lane:
        status = lane.run(["pytest", "-q"], output=sys.stdout.buffer.write)

On the command line: `python -m tests.lanes.nested -- COMMAND ...`, with -i for a terminal.
"""

from __future__ import annotations

import os
import secrets
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lanes import emulator
from vmm.errors import EXIT_TIMEOUT, HostError, VmmError
from vmm.testing import initrds
from vmm.testing.kernels import Kernel, cache_directory, debian_kernel

ROOT = Path(__file__).resolve().parents[2]
QEMU = "qemu-system-x86_64"
CPU = "max,-erms,-fsrm"
"""TCG runs `rep stosb` and `rep movsb` a byte at a time, which is how kernels clear and copy
memory where the processor promises that these are quick; without the promise they take words."""
MEMORY = 4096
"""Default size of the emulated machine's memory in MiB; the host gives only what is touched."""
BOOT_TIMEOUT = 180.0
"""Seconds to a ready machine: 6 on an idle host, many times that on a busy one."""
MODULES = (
    "virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console",
    "kvm", "kvm-amd", "tun", "vhost_net", "vhost_vsock",
)  # fmt: skip
RESULTS = "/run/lane/results"
"""Where commands in the lane put files for the host; also in their VMM_LANE_RESULTS."""
HANG = 300
"""Seconds after which a processor that has lost its interrupts is a crash: far more than any load
makes of the milliseconds, or the 10 s between two signs of life, that it is at most."""
_MARK = b"\x1e"
_QUIET = 60.0
"""Seconds after which it is said that the lane still runs."""


class LaneError(HostError):
    """The lane could not be started, ended by itself, or ran out of time; with the log's tail."""

    def __init__(self, message: str, tail: str = "") -> None:
        super().__init__(f"nested lane: {message}" + (f"\n{tail}" if tail else ""))


class LaneTimeout(LaneError):
    """A command did not end within its time."""

    exit_status = EXIT_TIMEOUT


class LaneCrash(LaneError):
    """The emulated machine ended by itself, or hangs."""


class NestedLane:
    """An emulated machine, from `with` to the end of it; run any number of commands in it."""

    def __init__(
        self,
        *,
        memory: int = MEMORY,
        cpus: int = 2,
        log: Callable[[str], None] | None = None,
        boot_timeout: float = BOOT_TIMEOUT,
    ) -> None:
        self.memory = memory
        self.cpus = cpus
        self._log = log or _say
        self._boot_timeout = boot_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._terminal: socket.socket | None = None
        self._port: socket.socket | None = None
        self._directory: Path | None = None
        self._commands = 0
        self._pending = b""

    @property
    def results(self) -> Path:
        """The host's side of RESULTS; gone when the lane is closed."""
        assert self._directory is not None
        return self._directory / "shared" / "results"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the machine at once (results were written through) and remove its directory."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for link in (self._terminal, self._port):
            if link is not None:
                link.close()
        self._terminal = self._port = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def run(
        self,
        command: Sequence[str],
        *,
        output: Callable[[bytes], object],
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        stall: float | None = None,
    ) -> int:
        """Run `command` in the machine; returns its exit status.

        Its standard output and error go to `output` as they come. `env` adds to the variables every
        command has. Raises LaneTimeout after `timeout` seconds, LaneCrash after `stall` seconds
        without output, or when the machine ends or hangs; the lane is closed then.
        """
        token = self._send("run", command, cwd, env)
        return self._until(token, timeout, output, stall=stall)

    def terminal(
        self,
        command: Sequence[str],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Run `command` in the machine with this process's terminal as its own."""
        import termios
        import tty

        if not (os.isatty(0) and os.isatty(1)):
            raise LaneError("-i needs a terminal; standard input or output is none")
        size = os.get_terminal_size()
        # A terminal nobody gave a size (a bare pty) says 0 and 0, which stty refuses.
        geometry = f" {size.lines or 24} {size.columns or 80}"
        before = termios.tcgetattr(0)
        tty.setraw(0)
        try:
            token = self._send("terminal", command, cwd, env, geometry)
            return self._until(token, None, _to_stdout, stdin=0)
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, before)

    def _start(self) -> None:
        qemu = shutil.which(QEMU)
        if qemu is None:
            raise LaneError(f"{QEMU} is not installed: apt-get install qemu-system-x86")
        kernel = debian_kernel("amd64")
        self._directory = Path(tempfile.mkdtemp(prefix="vmm-nested-"))
        # One thread for all processors: with a thread each, one translates code that another
        # patches (static keys), and all spin in exc_int3. It takes no longer, and less CPU.
        thread = "single"
        program = emulator.mended(Path(qemu), self._directory / "qemu")
        if program is None:
            thread = "multi"  # kicks them less often: see there
            self._log(f"{qemu} is not the build tests/lanes/emulator.py knows; used as it is")
        shared = self._directory / "shared"
        (shared / "results").mkdir(parents=True)
        initrd = self._directory / "initrd.img"
        initrds.build(
            (Path(__file__).parent / "agent.sh").read_text(),
            kernel=kernel,
            modules=MODULES,
            # Without nested guests of its own, kvm_amd under TCG has less to emulate.
            parameters={"kvm-amd": "nested=0"},
        ).write(initrd)
        self._terminal, far_terminal = socket.socketpair()
        self._port, far_port = socket.socketpair()
        self._log(
            f"booting Debian {kernel.release} under QEMU: {self.cpus} CPUs, {self.memory} MiB"
        )
        began = time.monotonic()
        with far_terminal, far_port, open(self._directory / "qemu.log", "wb") as log:
            links = (far_terminal.fileno(), far_port.fileno())
            arguments = self._arguments(thread, _quickest(kernel), initrd, *links)
            self._process = subprocess.Popen(
                # The kernel ends QEMU if this process dies, however that happens.
                ["setpriv", "--pdeathsig", "KILL", program or qemu, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=links,
            )
        self._until("ready", self._boot_timeout, lambda data: None)
        self._log(f"ready after {time.monotonic() - began:.1f} s")

    def _arguments(
        self, thread: str, kernel: Path, initrd: Path, terminal: int, port: int
    ) -> list[str]:
        assert self._directory is not None
        keep = [str(path) for path in (ROOT, cache_directory()) if _hidden(path)]
        cmdline = "console=ttyS0 loglevel=5 panic=-1 mitigations=off"
        cmdline += f" rcupdate.rcu_cpu_stall_timeout={HANG} sysctl.kernel.panic_on_rcu_stall=1"
        if keep:
            cmdline += f" lane.keep={','.join(keep)}"
        # The real-time clock gives the machine its date.
        root = "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"
        share = f"local,path={self._directory}/shared,mount_tag=lane,security_model=none"
        return [
            "-no-user-config", "-nodefaults", "-no-reboot", "-display", "none",
            "-M", "pc", "-accel", f"tcg,thread={thread}", "-cpu", CPU,
            "-smp", str(self.cpus), "-m", str(self.memory),
            "-kernel", str(kernel), "-initrd", str(initrd), "-append", cmdline,
            "-serial", f"file:{self._directory}/console.log",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=hvc,fd={terminal}", "-device", "virtconsole,chardev=hvc",
            "-chardev", f"socket,id=port,fd={port}", "-device", "virtserialport,chardev=port",
            "-virtfs", root,
            "-virtfs", share,
        ]  # fmt: skip

    def _send(
        self,
        kind: str,
        command: Sequence[str],
        cwd: str | os.PathLike[str] | None,
        env: Mapping[str, str] | None,
        extra: str = "",
    ) -> str:
        """Write the command's script and ask the agent for it; returns the answer's token."""
        if self._terminal is None or self._directory is None:
            raise LaneError("it is not running")
        self._commands += 1
        name = f"command-{self._commands}.sh"
        variables = {**_environment(), **(env or {})}
        settings = " ".join(shlex.quote(f"{key}={value}") for key, value in variables.items())
        (self._directory / "shared" / name).write_text(
            f"cd {shlex.quote(os.fspath(cwd or ROOT))} || exit 1\n"
            f"exec env -i {settings} {shlex.join(command)}\n"
        )
        token = secrets.token_hex(8)
        self._terminal.sendall(f"{kind} {name} {token}{extra}\n".encode())
        return token

    def _until(
        self,
        token: str,
        timeout: float | None,
        output: Callable[[bytes], object],
        *,
        stdin: int | None = None,
        stall: float | None = None,
    ) -> int:
        """Pass output on until the agent's answer to `token`; returns the status in it.

        With `stdin`, what can be read there goes to the terminal, whose output is passed on.
        """
        link = self._port if stdin is None else self._terminal
        assert link is not None
        began = heard = spoken = beaten = time.monotonic()
        beat = self._beats()
        answer = _MARK + token.encode() + b" "
        while True:
            status, passed = self._take(answer)
            if passed:
                output(passed)
            if status is not None:
                return status
            left = _QUIET if timeout is None else began + timeout - time.monotonic()
            if left <= 0:
                self._fail(LaneTimeout, f"no end within {timeout:g} s")
            wanted: list[socket.socket | int] = [link]
            if stdin is not None:
                wanted.append(stdin)
            ready = select.select(wanted, [], [], min(left, _QUIET, HANG / 8))[0]
            if stdin in ready and stdin is not None:
                link.sendall(os.read(stdin, 4096))
            if link in ready:
                data = link.recv(65536)
                if not data:
                    self._fail(LaneCrash, "the emulated machine ended by itself")
                self._pending += data
                heard = spoken = time.monotonic()
            elif stdin is None and time.monotonic() - heard >= _QUIET:
                self._log(f"running for {time.monotonic() - began:.0f} s")
                heard = time.monotonic()
            if stall is not None and time.monotonic() - spoken > stall:
                self._fail(LaneCrash, f"nothing was printed for {stall:g} s")
            now = self._beats()
            if now.keys() == beat.keys() and any(now[cpu] == beat[cpu] for cpu in now):
                if stdin is None and time.monotonic() - beaten > HANG:
                    self._fail(LaneCrash, f"a processor gave no sign of life for {HANG} s")
            else:
                beat, beaten = now, time.monotonic()

    def _beats(self) -> dict[str, int]:
        """When each processor last gave a sign of life, on a clock of the machine's."""
        assert self._directory is not None
        shared = self._directory / "shared"
        return {path.name: path.stat().st_mtime_ns for path in shared.glob("beat*")}

    def _take(self, answer: bytes) -> tuple[int | None, bytes]:
        """Split what has come into (status, or None before the answer) and output to pass on."""
        at = self._pending.find(answer)
        end = self._pending.find(b"\n", at) if at >= 0 else -1
        if end >= 0:
            passed, status = self._pending[:at], int(self._pending[at + len(answer) : end])
            self._pending = self._pending[end + 1 :]
            return status, passed
        # The answer may have come in part: hold back from a mark near the end on.
        mark = (
            at if at >= 0 else self._pending.find(_MARK, max(0, len(self._pending) - len(answer)))
        )
        keep = mark if mark >= 0 else len(self._pending)
        passed, self._pending = self._pending[:keep], self._pending[keep:]
        return None, passed

    def _fail(self, kind: type[LaneError], message: str) -> None:
        """Raise `kind` with the end of the console's and QEMU's log, and close the lane."""
        assert self._directory is not None
        tail = []
        for name, lines in (("qemu.log", 10), ("console.log", 40)):
            try:
                text = (self._directory / name).read_text(errors="replace")
            except OSError:
                continue
            # QEMU names each CPU feature of "max" that TCG lacks; that is no news.
            kept = [line for line in text.splitlines() if "TCG doesn't support" not in line]
            tail += [f"--- end of {name}", *kept[-lines:]]
        self.close()
        raise kind(message, "\n".join(tail))


def _environment() -> dict[str, str]:
    """What every command in the lane finds in its environment."""
    return {
        "PATH": f"{ROOT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": os.environ.get("HOME", "/root"),
        "TERM": os.environ.get("TERM", "linux"),
        "LANG": "C.UTF-8",
        # Compiled code would go to memory only; the host compiles what is slow here (Makefile).
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "VMM_CACHE": str(cache_directory().absolute()),
        "VMM_LANE": "nested",
        "VMM_LANE_RESULTS": RESULTS,
    }


def _quickest(kernel: Kernel) -> Path:
    """The ELF kernel, by its PVH entry: unpacking itself takes the bzImage 3 s of emulation."""
    try:
        return kernel.vmlinux()
    except VmmError as error:
        # The lane must come up to show what is wrong with the project's own decompressor.
        _say(f"booting the bzImage, for want of its vmlinux: {error}")
        return kernel.vmlinuz


def _hidden(path: Path) -> bool:
    """Whether `path` is below a directory that is another file system in the lane."""
    return path.absolute().is_relative_to("/tmp") or path.absolute().is_relative_to("/run")


def _say(text: str) -> None:
    print(f"nested: {text}", file=sys.stderr, flush=True)


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main(arguments: list[str]) -> int:
    """Run one command in the lane; its exit status is this one's."""
    import argparse
    import signal

    parser = argparse.ArgumentParser(
        prog="python -m tests.lanes.nested",
        description="Run COMMAND in an emulated machine that has a KVM able to boot Linux.",
    )
    parser.add_argument("--memory", type=int, default=MEMORY, metavar="MIB", help="%(default)s")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="%(default)s")
    parser.add_argument("--timeout", type=float, metavar="S", help="fail after S seconds")
    parser.add_argument("--results", metavar="DIR", help=f"copy what is put in {RESULTS} to DIR")
    parser.add_argument("-i", "--interactive", action="store_true", help="give it this terminal")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(arguments)

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, end)
    try:
        with NestedLane(memory=options.memory, cpus=options.cpus) as lane:
            if options.interactive:
                return lane.terminal(options.command, cwd=os.getcwd())
            status = lane.run(
                options.command, output=_to_stdout, cwd=os.getcwd(), timeout=options.timeout
            )
            if options.results:
                shutil.copytree(lane.results, options.results, dirs_exist_ok=True)
            return status
    except HostError as error:
        print(error, file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
