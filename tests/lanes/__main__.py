"""`make test`: every test in the lanes this host needs, and one summary.

    python -m tests.lanes [--serial] [PYTEST ARGUMENT ...]

On a host whose KVM runs stock Linux, pytest runs once, on it. On any other, the native lane runs
what the host can, and the nested lane, at the same time, the tests that need a KVM. The last line
is "N passed, N failed, N skipped", a test counting once in each lane it ran in; the exit status
is 0 only if nothing failed and every lane ran. VMM_SKIP_LANES=nested (or native) leaves a lane out.

QEMU 7.2's TCG does AMD-V with faults of its own. The one that hung guests, or ended them with a
triple fault, is taken out of the copy that the lane runs (tests/lanes/emulator.py), whose
processors one thread serves. With a thread each, as where that cannot be, rarely, on a busy host,
the emulated host's kernel dies (of page faults in its page fault handler, with a GS that is not its
own, as if left from a guest), or a processor gets no more interrupts (QEMU clears flags of pending
ones at VMRUN and #VMEXIT while other threads set them). A test that fails with a triple fault or a
stall in the nested lane is therefore run once more, and told of as RERUN; after a crash or hang of
the emulated host, another one runs the tests that had not passed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from tests.lanes.nested import RESULTS, ROOT, LaneCrash, NestedLane
from tests.support import host, stranger
from vmm.errors import HostError, UsageError
from vmm.testing.kernels import debian_kernel
from vmm.testing.tiny import tiny_kernel

NATIVE_TEST_TIMEOUT = 300
NESTED_TEST_TIMEOUT = 600
"""Seconds for one test: not a measure of anything, only the end of a hang."""
NESTED_TIMEOUT = float(os.environ.get("VMM_NESTED_TIMEOUT", "4200"))
"""Seconds for the whole nested lane, all its machines together."""
STALL = 900
"""Seconds without a word from pytest, which says each test's name and outcome: the emulated host
has lost what would have ended the test. No test takes a third of that."""
MESSAGE = 160
"""Characters of a failure's message in the summary."""
MACHINES = 4
"""How many emulated hosts the nested lane may use up."""
EMULATOR_FAULTS = r"triple fault|detected stalls|rcu_preempt"
"""What a failure says that may be the emulator's own."""
NOTHING_COLLECTED = 5
"""pytest's exit status when no test was for this lane."""


@dataclass
class Outcome:
    """What one lane did. `problem` is set if the lane itself failed."""

    lane: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    rerun: int = 0
    problem: str = ""
    failures: list[str] = field(default_factory=list)

    def read(self, report: Path, status: int) -> None:
        """Count the tests in pytest's JUnit report."""
        if report.exists():
            ends: dict[str, dict[str, str]] = {}
            for case in ElementTree.parse(report).getroot().iter("testcase"):
                name = f"{case.get('classname')}::{case.get('name')}"
                self.rerun += name in ends  # a testcase for each run, the last with the outcome
                found = ends.setdefault(name, {})
                found.update({child.tag: child.get("message", "") for child in case})
            for name, kinds in ends.items():
                if kinds.keys() & {"failure", "error"}:
                    self.failed += 1
                    message = " ".join((kinds.get("failure") or kinds.get("error", "")).split())
                    self.failures.append(f"{name}: {message[:MESSAGE]}")
                elif "skipped" in kinds:
                    self.skipped += 1
                else:
                    self.passed += 1
        elif status != NOTHING_COLLECTED:
            self.problem = f"pytest left no report (exit status {status})"
        if status not in (0, NOTHING_COLLECTED) and not self.failed and not self.problem:
            self.problem = f"pytest ended with exit status {status}"


class Output:
    """Standard output, shared: the lane in front writes at once, the other when it gets there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[bytes] | None = []

    def write(self, data: bytes) -> None:
        with self._lock:
            if self._held is None:
                _write(data)
            else:
                self._held.append(data)

    def release(self) -> None:
        """Write what was held back, and everything from now on at once."""
        with self._lock:
            for data in self._held or ():
                _write(data)
            self._held = None


def pytest_command(report: str, timeout: int, arguments: list[str]) -> list[str]:
    color = ["--color=yes"] if sys.stdout.isatty() else []
    return [
        sys.executable, "-m", "pytest", "-ra", f"--junitxml={report}", f"--timeout={timeout}",
        "--durations=5", *color, *arguments,
    ]  # fmt: skip


class NativeLane:
    """pytest on this host."""

    def __init__(self, directory: Path, arguments: list[str]) -> None:
        self.outcome = Outcome("native")
        report = directory / "native.xml"
        say(f"== native lane: this host, KVM back end {host.backend() or 'none'}")
        command = pytest_command(str(report), NATIVE_TEST_TIMEOUT, ["-q", *arguments])
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "VMM_LANE": "native"},
            stdin=subprocess.DEVNULL,
        )
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        self.outcome.read(report, status)


class Done:
    """The tests that have passed or were skipped, from what pytest -v prints as it goes."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.skipped: set[str] = set()
        self._line = b""

    def hear(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", line.decode(errors="replace"))
            found = re.match(r"(\S+::.+?) (PASSED|SKIPPED)\b", plain)
            if found:
                (self.passed if found[2] == "PASSED" else self.skipped).add(found[1])


class NestedThread:
    """pytest in the nested lane, in a thread; `native` is the back end of the lane beside it."""

    def __init__(self, directory: Path, arguments: list[str], native: str | None) -> None:
        self.outcome = Outcome("nested")
        self._native = native
        self.output = Output()
        self._directory = directory
        self._arguments = arguments
        self._prepared: Path | None = None
        self._lane = self._make_lane()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> Outcome:
        """Show the lane's output to its end."""
        say("== nested lane: KVM of a machine emulated by QEMU")
        self.output.release()
        self._thread.join()
        return self.outcome

    def close(self) -> None:
        """End the lane if it has not ended."""
        self._lane.close()
        self._thread.join(10)
        if self._prepared is not None:
            shutil.rmtree(self._prepared, ignore_errors=True)
            self._prepared = None

    def _make_lane(self) -> NestedLane:
        return NestedLane(log=self._log)

    def _log(self, text: str) -> None:
        self.output.write(f"nested: {text}\n".encode())

    def _run(self) -> None:
        done = Done()
        deadline = time.monotonic() + NESTED_TIMEOUT
        try:
            ignored = self._ignored()
            for left in reversed(range(MACHINES)):
                self.outcome.passed, self.outcome.skipped = len(done.passed), len(done.skipped)
                passed = [f"--deselect={name}" for name in sorted(done.passed | done.skipped)]
                try:
                    self._run_once(done, [*ignored, *passed], deadline)
                    break
                except LaneCrash as error:
                    if not left:
                        raise
                    self._log(f"{error}\nnested: {len(done.passed)} tests passed; now the rest")
                    self.outcome.rerun += 1
                    self._lane = self._make_lane()
        except (HostError, UsageError, OSError, AssertionError) as error:
            self.outcome.passed, self.outcome.skipped = len(done.passed), len(done.skipped)
            self.outcome.problem = str(error)

    def _environment(self) -> list[str]:
        known = [f"VMM_NATIVE_KVM={self._native}"] if self._native else []
        if self._prepared is not None:
            known.append(f"{stranger.VENV}={self._prepared / 'venv'}")
        return known

    def _ignored(self) -> list[str]:
        """Options that leave out the files without a test for this lane: to import all of them
        takes the emulated processor minutes, and this host seconds to find out."""
        python = ["env", "VMM_LANE=nested", *self._environment(), sys.executable, "-m", "pytest"]
        found = subprocess.run(
            [*python, "--collect-only", "-q", "-p", "no:cacheprovider", *self._arguments],
            cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        wanted = set(re.findall(r"^(\S+?\.py)::", found.stdout, re.MULTILINE))
        if found.returncode or not wanted:
            return []  # the lane is to show what is wrong, or that there are none
        self._prepare(wanted)
        files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py")}
        return [f"--ignore={file}" for file in sorted(files - wanted)]

    def _prepare(self, wanted: set[str]) -> None:
        """Make here what the tests of the files `wanted` cannot: the lane has no network."""
        if "tests/test_stranger.py" in wanted:
            self._log("making a wheel, and a venv with it")
            try:
                self._prepared = stranger.make_venv()
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", b"") or b""
                self._log(f"no venv with the wheel: {error} {said!r}")

    def _run_once(self, done: Done, more: list[str], deadline: float) -> None:
        report = "nested.xml"
        # Names as they run (-v): tests are slow here, and a person should see what it is at.
        command = pytest_command(f"{RESULTS}/{report}", NESTED_TEST_TIMEOUT, self._arguments)
        command += ["-v", "-p", "no:cacheprovider", *more]
        if importlib.util.find_spec("pytest_rerunfailures") is not None:
            command += ["-rR", "--reruns=1", f"--only-rerun={EMULATOR_FAULTS}"]
        command = ["env", *self._environment(), *command]

        def hear(data: bytes) -> None:
            self.output.write(data)
            done.hear(data)

        with self._lane as lane:
            left = max(deadline - time.monotonic(), 1.0)
            status = lane.run(command, output=hear, timeout=left, stall=STALL)
            if (lane.results / report).exists():
                shutil.copy(lane.results / report, self._directory)
        self.outcome.read(self._directory / report, status)


def run(arguments: list[str], serial: bool) -> int:
    skipped = set(os.environ.get("VMM_SKIP_LANES", "").replace(",", " ").split())
    unknown = skipped - {"native", "nested"}
    if unknown:
        raise UsageError(f"VMM_SKIP_LANES: {' '.join(unknown)}: the lanes are native and nested")
    wanted = ["native"] if host.runs_linux() else ["native", "nested"]
    lanes = [lane for lane in wanted if lane not in skipped]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="vmm-test-") as name:
        directory = Path(name)
        nested = None
        native = host.backend() if "native" in lanes else None
        try:
            if "nested" in lanes or not arguments:
                _build_tiny_kernel()
            if "nested" in lanes:
                # The nested lane has no network and a read-only cache: all is fetched here.
                debian_kernel("cloud-amd64").vmlinux()
                debian_kernel("amd64")
                if not serial:
                    nested = NestedThread(directory, arguments, native)
            if "native" in lanes:
                outcomes.append(NativeLane(directory, arguments).outcome)
            if "nested" in lanes:
                nested = nested or NestedThread(directory, arguments, native)
                outcomes.append(nested.finish())
        finally:
            if nested is not None:
                nested.close()
    return summarize(outcomes, [lane for lane in wanted if lane in skipped])


def _build_tiny_kernel() -> None:
    """Build the tests' own kernel before they begin, in plain view: it takes minutes, once."""
    try:
        tiny_kernel(build=False)
    except HostError:
        say("== a kernel for tests is built first: it takes minutes, once, and is kept")
        tiny_kernel(tell=True)


def summarize(outcomes: list[Outcome], left_out: list[str]) -> int:
    """Print what each lane did and the sum; returns the exit status."""
    say("== summary")
    for outcome in outcomes:
        say(
            f"{outcome.lane} lane: {outcome.passed} passed, {outcome.failed} failed,"
            f" {outcome.skipped} skipped"
        )
        if outcome.rerun:
            say(f"{outcome.lane} lane: {outcome.rerun} RERUN for faults of the emulated processor")
        for failure in outcome.failures:
            say(f"{outcome.lane} lane FAILED: {failure}")
        if outcome.problem:
            say(f"{outcome.lane} lane FAILED: {outcome.problem}")
    for lane in left_out:
        say(f"{lane} lane LEFT OUT, because VMM_SKIP_LANES says so: its tests did not run")
    passed = sum(outcome.passed for outcome in outcomes)
    # A lane that broke counts as a failure: the last line must not look like success.
    failed = sum(outcome.failed + bool(outcome.problem) for outcome in outcomes)
    skipped = sum(outcome.skipped for outcome in outcomes)
    say(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


def say(text: str) -> None:
    print(text, flush=True)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main(arguments: list[str]) -> int:
    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, end)
    serial = "--serial" in arguments
    try:
        return run([argument for argument in arguments if argument != "--serial"], serial)
    except (HostError, UsageError) as error:
        print(f"lanes: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
