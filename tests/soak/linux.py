"""`make soak ARGS="--linux --minutes 60"`: Linux guests under a mixed load that is verified.

The first of two guests (tests/soak/linux_guests.py) verifies two disks, one raw, one throttled,
with fio; the host moves its balloon, has it go back to checkpoints, keeps it in snapshots and has
copies of it go on from those. The second guest has what cannot go back: a qcow2 image that
qemu-storage-daemon serves, a tree that is copied from a shared directory and back, and a socket to
the host. Data goes both ways between the two over a network of the host's, and to both through the
agent.

What is read must be what was written. `--spoil PATH` puts a wrong byte into one of the paths, which
must make the soak fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lanes.nested import NestedLane
from tests.soak import PATHS
from tests.soak.linux_guests import MIB, PATIENCE, PORT, STREAM, Guests
from tests.support import host, programs
from vmm import Machine
from vmm.errors import HostError, VmmError
from vmm.testing.kernels import debian_kernel

PROGRAMS = ("fio", "gcc", "mke2fs", "qemu-img", "qemu-storage-daemon")
WORK = 10.0
"""Seconds between two things that are done to a guest."""
STALL = 900.0
"""Seconds without a line after which the nested lane is taken for dead."""
LOOK = """
grep -Hs . /figures/*
for each in /fio-*; do
    grep '^3;fio' $each | tail -n 1 | sed "s,^,fio ${each#/fio-};,"
    grep -m 1 -E 'verify failed|error=' $each | sed "s,^,wrong ${each#/fio-}: ,"
done
[ ! -e /wrong ] || sed 's/^/wrong /' /wrong
"""
"""What has a guest tell all that it has found."""
FIO_READ = 6
"""Which field of fio's line, after the path's name, has the KiB that were read, and so verified."""
CLUSTER = 64 << 10
METADATA = 5 * CLUSTER
"""Where the data of a new qcow2 image begins: after its header and tables."""
SHELL = ("/bin/busybox", "sh", "-c")


class LinuxSoak:
    """The two guests, from `with` to its end, and what is done to them.

    Attributes:
        verified: bytes that were read and found right, by path.
        counts: what was done, and how often.
        failures: what was not as it must be, by path.
    """

    def __init__(self, seed: int, scratch: Path, say: Callable[[str], object]) -> None:
        self.scratch = scratch
        self.rng = random.Random(seed)
        self.verified = dict.fromkeys(PATHS, 0)
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self._say = say
        self._stack = contextlib.ExitStack()
        self._known: dict[tuple[str, str], list[int]] = {}

    def __enter__(self) -> Self:
        with self._stack:
            guests = self.guests = Guests(debian_kernel(download=False), self.scratch, self.rng)
            self._listen()
            self.first = self._stack.enter_context(guests.first())
            self.second = self._stack.enter_context(guests.second())
            for machine in (self.first, self.second):
                machine.start()
            for machine in (self.first, self.second):
                machine.run(["/bin/busybox", "true"], timeout=PATIENCE)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _listen(self) -> None:
        """The host's end of the second guest's socket."""
        figures, path = self.scratch / "host-vsock", f"{self.guests.vsock}_{PORT}"
        words = [str(self.guests.stream), str(figures), str(STREAM), str(PATIENCE)]
        self._peer = subprocess.Popen([*words, "listen", "unix", path])
        self._stack.callback(self._peer.wait)
        self._stack.callback(self._peer.kill)

    # --- what is done -----------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Wait until data has gone by every path of the guests; TimeoutError after PATIENCE."""
        limit = time.monotonic() + PATIENCE
        while waiting := [path for path in PATHS if path != "agent" and not self.verified[path]]:
            if self.failures:
                return
            if time.monotonic() > limit:
                raise TimeoutError(f"nothing was verified of {', '.join(waiting)} in {PATIENCE} s")
            time.sleep(2)
            self.look()

    def round(self, work: float = WORK) -> None:
        """Everything once, with `work` seconds of load in each part."""
        self._echo(self.first)
        self._balloon()
        self.first.checkpoint()
        self.counts["checkpoints"] += 1
        self._echo(self.second)
        time.sleep(work)
        self.look()
        self._say(self.figures())
        self.first.rollback()
        self.counts["rollbacks"] += 1
        self._forget()
        self._echo(self.first)
        time.sleep(work)
        self.look()
        self._say(self.figures())
        self._snapshot(work)

    def look(self) -> None:
        """Add up what was verified, and note what is wrong."""
        self._add("host", {"vsock": _numbers((self.scratch / "host-vsock").read_text())})
        for name, machine in (("first", self.first), ("second", self.second)):
            self._add(name, self._figures(machine))

    def verdict(self) -> bool:
        """Whether nothing was wrong, once the machines have ended; told with all figures."""
        image = ["qemu-img", "check", "-q", str(self.guests.image)]
        done = subprocess.run(image, capture_output=True, text=True, check=False)
        if done.returncode:
            self._fail("qcow2", f"qemu-img check: {done.stdout}{done.stderr}")
        for path, size in self.verified.items():
            if not size and "machines" not in self.failures:
                self._fail(path, "nothing was verified")
        for path, what in self.failures.items():
            self._say(f"{path}: {what}")
        self._say(f"{'FAILED' if self.failures else 'verified'}: {self.figures()}")
        return not self.failures

    def figures(self) -> str:
        """All counts in a line."""
        sizes = ", ".join(f"{path} {size / MIB:.1f}" for path, size in self.verified.items())
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"MiB: {sizes}; {counts}; {len(self.failures)} errors"

    def spoil(self, path: str) -> None:
        """Have one wrong byte (of qcow2, one in each cluster) come by `path`."""
        if path in ("raw", "throttled"):
            self.first.faults.disk(PATHS.index(path)).corrupt(on="read", times=1)
        elif path == "qcow2":
            with self.guests.image.open("r+b") as file:
                for at in range(METADATA, self.guests.image.stat().st_size, CLUSTER):
                    file.seek(at)
                    byte = file.read(1)
                    file.seek(at)
                    file.write(bytes(each ^ 1 for each in byte))
        elif path == "network":
            self.first.run([*SHELL, "killall -USR1 soak-stream"], timeout=PATIENCE, check=True)
        elif path == "vsock":
            self._peer.send_signal(signal.SIGUSR1)
        elif path == "tree":
            file_ = self.guests.shared / "tree" / next(iter(self.guests.tree.files))
            data = file_.read_bytes()
            file_.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        else:
            self._echo(self.second, spoil=1)

    def _echo(self, machine: Machine, spoil: int = 0) -> None:
        """Data through the agent, and its checksum back."""
        data = self.rng.randbytes(self.rng.randrange(1, MIB))
        sent = bytes([data[0] ^ spoil]) + data[1:]
        done = machine.run(["/bin/busybox", "md5sum"], input=sent, timeout=PATIENCE, check=True)
        want = hashlib.md5(data).hexdigest().encode()
        if done.stdout.split()[:1] == [want]:
            self.verified["agent"] += len(data)
        else:
            self._fail("agent", f"md5sum said {done.stdout!r} of data of which it is {want!r}")

    def _balloon(self) -> None:
        self.first.balloon.target(self.rng.choice([0, 16, 32, 48]) * MIB)
        self.counts["balloon targets"] += 1

    def _snapshot(self, work: float) -> None:
        """Keep the first guest; a machine made from that works in its place for a while."""
        path = self.scratch / "snapshot"
        self.first.snapshot(path)
        self.counts["snapshots"] += 1
        self.first.pause()
        with Machine.restore(path, verify=True) as copy:
            copy.start()
            self._echo(copy)
            time.sleep(work / 3)
            self._figures(copy)
        self.counts["restores"] += 1
        shutil.rmtree(path)
        self.first.resume()

    # --- what the guests say ----------------------------------------------------------------------

    def _figures(self, machine: Machine) -> dict[str, list[int]]:
        """A guest's numbers by path; what it says is wrong is a failure."""
        said = machine.run([*SHELL, LOOK], timeout=PATIENCE, check=True, text=True).stdout
        return self._understand(said)

    def _understand(self, said: str) -> dict[str, list[int]]:
        """The same, of what LOOK has printed."""
        found = {}
        for line in said.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "wrong":
                path, _, what = rest.partition(": ")
                self._fail(path if path in PATHS else "guest", what or line)
            elif kind == "fio":
                fields = rest.split(";")
                if len(fields) > FIO_READ:  # not a line of which half is written
                    found[fields[0]] = [int(fields[FIO_READ]) * 1024]
            else:
                path, _, rest = line.removeprefix("/figures/").partition(":")
                found[path] = _numbers(rest)
        return found

    def _add(self, name: str, figures: dict[str, list[int]]) -> None:
        for path, numbers in figures.items():
            before = self._known.get((name, path)) or [0] * len(numbers)
            self._known[name, path] = numbers
            more = [now - then for now, then in zip(numbers, before, strict=True)]
            self.verified[path] += more[0]
            if len(more) > 1:  # of tests/support/soak_stream.c
                _, connections, cut, bad = more
                self.counts[f"{path} connections"] += connections
                if cut and path == "vsock":
                    self._fail(path, f"{cut} connections ended early at the {name} end")
                self.counts["network connections cut"] += cut
                if bad:
                    self._fail(path, f"a wrong byte came to the {name} end")

    def _forget(self) -> None:
        """What the first guest had counted went back with it: count from there."""
        for path, numbers in self._figures(self.first).items():
            self._known["first", path] = numbers

    def _fail(self, path: str, what: str) -> None:
        self.failures.setdefault(path, what)


def _numbers(line: str) -> list[int]:
    return [int(word) for word in line.split()]


def missing() -> str | None:
    """What has to be installed first, if anything."""
    away = [name for name in PROGRAMS if shutil.which(name, path=programs.PATH) is None]
    return f"no {', '.join(away)} here: `make setup` installs what is wanted" if away else None


def run(minutes: float, seed: int, spoil: str | None) -> int:
    """The soak, here or in the nested lane. The exit status: 0 where all was as written."""
    if host.runs_linux():
        return _run_here(minutes, seed, spoil)
    words = [
        sys.executable,
        "-m",
        "tests.soak",
        "--linux",
        f"--minutes={minutes}",
        f"--seed={seed}",
    ]
    if spoil is not None:
        words.append(f"--spoil={spoil}")
    debian_kernel()  # the lane has no network

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, end)
    try:
        with NestedLane() as lane:
            return lane.run(words, output=_to_stdout, stall=STALL)
    except HostError as error:
        _say(f"FAILED: {error}")
        return 1


def _run_here(minutes: float, seed: int, spoil: str | None) -> int:
    with tempfile.TemporaryDirectory(prefix="vmm-soak-") as scratch:
        begin = time.monotonic()
        soak = LinuxSoak(seed, Path(scratch), _say)
        try:
            with soak:
                _say(f"both guests are up after {time.monotonic() - begin:.0f} s; seed {seed}")
                soak.warm_up()
                begin = time.monotonic()
                _say(f"  0.0 min: {soak.figures()}")
                while True:
                    if spoil is not None:
                        soak.spoil(spoil)
                    soak.round()
                    passed = time.monotonic() - begin
                    _say(f"{passed / 60:5.1f} min: {soak.figures()}")
                    if soak.failures or passed >= minutes * 60:
                        break
        except (VmmError, OSError, subprocess.SubprocessError) as error:
            soak.failures["machines"] = f"{type(error).__name__}: {error}"
        if not hasattr(soak, "guests"):
            _say(f"FAILED: {soak.failures['machines']}")
            return 1
        return 0 if soak.verdict() else 1


def _say(line: str) -> None:
    print(f"soak: {line}", flush=True)


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
