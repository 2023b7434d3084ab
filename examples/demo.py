"""`make demo` and `make shell`: boot Debian's cloud kernel, tell what it saw and how long it took.

    python -m examples.demo [--shell] [--cpus N] [--memory SIZE]

Asks `vmm doctor` whether this host's KVM runs stock Linux; where it does not, the same `vmm run`
runs in the nested lane (tests/lanes), a machine emulated by QEMU that has a KVM which does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vmm.errors import HostError, UsageError
from vmm.testing import initrds
from vmm.testing.kernels import debian_kernel

ROOT = Path(__file__).resolve().parents[1]
VMM = str(ROOT / ".venv" / "bin" / "vmm")
XSAVE_WARNING = "XSAVE consistency problem"
"""What Linux prints where CPUID leaf 0xd does not follow XCR0."""
TIMEOUT = 300
"""Seconds a demo may take before it is ended; it takes one on hardware, ten in the nested lane."""

GREETING = "Hello from user space"
INIT = f"""
echo
echo '{GREETING}'
echo "demo: kernel = $(uname -r)"
echo "demo: CPU model = $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)"
echo "demo: CPUs = $(nproc)"
echo "demo: memory = $(sed -n 's/^MemTotal: *//p' /proc/meminfo)"
echo "demo: clocksource = $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo
"""
SHELL_INIT = """
echo
echo 'A guest of vmm. exit (or Ctrl-A x) ends it.'
setsid cttyhack sh -l
"""


class Watch:
    """Passes the console on to standard output, and keeps the guest's words and when they came."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.greeted: float | None = None
        self._text = bytearray()

    def __call__(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        self._text += data
        if self.greeted is None and GREETING.encode() in self._text:
            self.greeted = time.monotonic() - self.began

    def saw(self, text: str) -> bool:
        """Whether `text` was printed."""
        return text.encode() in self._text

    def facts(self) -> list[tuple[str, str]]:
        """What the guest said about itself, as (name, value)."""
        text = self._text.decode(errors="replace")
        return re.findall(r"^demo: (.*?) = (.*?)\r*$", text, re.MULTILINE)


def doctor() -> tuple[bool, str]:
    """Whether this host's KVM runs stock Linux, and the doctor's verdict in a sentence."""
    done = subprocess.run([VMM, "doctor", "--json"], capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
        return bool(answer["runs_linux"]), str(answer["verdict"])
    except (ValueError, KeyError, TypeError):
        wrong = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise HostError(f"vmm doctor --json (status {done.returncode}): {wrong}") from None


def prepare(script: str) -> tuple[str, str]:
    """Paths of Debian's cloud kernel and of an initrd that runs `script`."""
    kernel = debian_kernel("cloud-amd64")
    initrd = ROOT / "build" / "demo" / f"initrd-{os.getpid()}.img"
    initrd.parent.mkdir(parents=True, exist_ok=True)
    initrds.build(script).write(initrd)
    return str(kernel.vmlinuz), str(initrd)


def demo(command: Sequence[str], here: bool) -> int:
    """Run `command` and show its console, then what ran."""
    print(f"demo: {' '.join(command)}\n", flush=True)
    if here:
        watch = Watch()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            while data := os.read(process.stdout.fileno(), 65536):
                watch(data)
        status = process.returncode
    else:
        from tests.lanes.nested import NestedLane

        with NestedLane() as lane:
            watch = Watch()
            status = lane.run(command, output=watch, timeout=TIMEOUT + 60)
    took = time.monotonic() - watch.began
    if status or watch.greeted is None:
        reached = "not reached" if watch.greeted is None else "reached"
        print(
            f"\ndemo: FAILED: vmm run ended with status {status}, init {reached}", file=sys.stderr
        )
        return status or 1
    print("\n--- what ran")
    rows = [
        *watch.facts(),
        ("ran on", "this host's KVM" if here else "the nested lane (QEMU TCG, kvm_amd)"),
        ("command to init", f"{watch.greeted:.2f} s"),
        ("command to power-off", f"{took:.2f} s"),
    ]
    for name, value in rows:
        print(f"{name:21} {value}")
    if not here and watch.saw(XSAVE_WARNING):
        print(
            f'The WARNING above ("{XSAVE_WARNING}") is of the emulated processor, whose XSETBV '
            "does not reach its KVM: QEMU's guests print it there too, and none on a real one."
        )
    return 0


def shell(command: Sequence[str], here: bool) -> int:
    """Run `command` on this terminal."""
    if here:
        return subprocess.run(command, check=False).returncode
    from tests.lanes.nested import NestedLane

    with NestedLane() as lane:
        return lane.terminal(command)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--shell", action="store_true", help="a shell in the guest")
    parser.add_argument("--cpus", default="2", metavar="N", help="vCPUs (%(default)s)")
    parser.add_argument("--memory", default="256M", metavar="SIZE", help="RAM (%(default)s)")
    options = parser.parse_args(arguments)

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):  # the nested lane must not stay behind
        signal.signal(number, end)
    try:
        here, verdict = doctor()
        print(f"demo: {verdict}")
        if not here:
            print("demo: this host's KVM does not run stock Linux: using the nested lane (slower)")
        kernel, initrd = prepare(SHELL_INIT if options.shell else INIT)
        command = [VMM, "run", kernel, "--initrd", initrd]
        command += ["--cpus", options.cpus, "--memory", options.memory]
        try:
            if options.shell:
                return shell(command, here)
            return demo([*command, "--timeout", str(TIMEOUT)], here)
        finally:
            os.unlink(initrd)
    except (HostError, UsageError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
