"""tests/lanes/nested.py, on the real thing: QEMU booted from here."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lanes.nested import ROOT, LaneCrash, LaneError, LaneTimeout, NestedLane

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64"
)

COMMAND = [sys.executable, "-m", "tests.lanes.nested", "--memory", "1024"]


@pytest.fixture(scope="module")
def lane() -> Iterator[NestedLane]:
    with NestedLane(memory=1024) as lane:
        yield lane


def run(lane: NestedLane, script: str, **options: float) -> tuple[int, bytes]:
    heard = bytearray()
    status = lane.run(["sh", "-c", script], output=heard.extend, **options)  # type: ignore[arg-type]
    return status, bytes(heard)


def emulators() -> set[int]:
    """The QEMU processes there are on this host."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            stat = (entry / "stat").read_text()
        except (OSError, ValueError):
            continue
        name, rest = stat[stat.index("(") + 1 :].rsplit(")", 1)
        if name.startswith("qemu-system") and rest.split()[0] != "Z":
            found.add(int(entry.name))
    return found


def descends_from(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rsplit(")", 1)[1].split()[1])
    return False


def test_status_and_output_come_back(lane: NestedLane) -> None:
    assert run(lane, "echo out; echo err >&2; exit 7") == (7, b"out\nerr\n")
    assert run(lane, "printf 'no newline'") == (0, b"no newline")


def test_output_is_passed_on_byte_for_byte(lane: NestedLane) -> None:
    every = bytes(range(256)) * 300
    shared = lane.results / "every"
    shared.write_bytes(every)
    assert run(lane, 'cat "$VMM_LANE_RESULTS/every"') == (0, every)


def test_input_is_empty_and_the_directory_is_this_one(lane: NestedLane) -> None:
    assert run(lane, "wc -c; pwd") == (0, f"0\n{ROOT}\n".encode())
    assert run(lane, "test -t 1 || test -t 2 || echo no terminal") == (0, b"no terminal\n")


def test_results_reach_the_host_and_nothing_else_does(lane: NestedLane) -> None:
    status, _ = run(lane, f"touch {ROOT}/left-behind && echo 1 >$VMM_LANE_RESULTS/one")
    assert status == 0
    assert (lane.results / "one").read_text() == "1\n"
    assert not (ROOT / "left-behind").exists()


def test_processes_do_not_outlive_their_command(lane: NestedLane) -> None:
    run(lane, "sleep 1234 & echo started")
    assert run(lane, "pgrep -f 'sleep 123[4]' || echo none") == (0, b"none\n")


def test_kernel_messages_do_not_mix_with_output(lane: NestedLane) -> None:
    assert run(lane, "echo '<0>an emergency' >/dev/kmsg; echo quiet") == (0, b"quiet\n")


def test_a_command_out_of_time_is_reported_with_the_log_and_leaves_no_qemu() -> None:
    before = emulators()
    with NestedLane(memory=1024) as lane:
        mine = {pid for pid in emulators() - before if descends_from(pid, os.getpid())}
        run(lane, "echo '<0>a last word' >/dev/kmsg")
        with pytest.raises(LaneTimeout, match=r"no end within 1 s(?s:.*)a last word"):
            run(lane, "sleep 1000", timeout=1)
        assert mine
        assert not mine & emulators()
        with pytest.raises(LaneError, match="not running"):
            run(lane, "true")


def test_a_machine_that_ends_is_reported(tmp_path: Path) -> None:
    with NestedLane(memory=1024) as lane, pytest.raises(LaneError, match="ended by itself"):
        run(lane, "echo o >/proc/sysrq-trigger; sleep 100", timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_qemu_outlives_the_command(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--", "sleep", "1000"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "booting" in process.stderr.readline()
    deadline = time.monotonic() + 60
    mine: set[int] = set()
    while not mine and time.monotonic() < deadline:
        mine = {pid for pid in emulators() if descends_from(pid, process.pid)}
        time.sleep(0.05)
    assert mine
    process.send_signal(number)
    process.wait(60)
    process.stderr.close()
    while mine & emulators() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not mine & emulators()


@pytest.mark.parametrize(("rows", "columns", "shown"), [(31, 99, b"31 99"), (0, 0, b"24 80")])
def test_interactive_gives_the_command_a_terminal(rows: int, columns: int, shown: bytes) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [*COMMAND, "-i", "--", "sh"])
    if rows:
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    seen = b""

    def expect(text: bytes, seconds: float = 60) -> None:
        nonlocal seen
        deadline = time.monotonic() + seconds
        while text not in seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} not in {seen!r}"
            if select.select([fd], [], [], left)[0]:
                seen += os.read(fd, 4096)

    try:
        expect(b"# ")
        os.write(fd, b"tty; stty size; echo $((6 * 7))\r")
        expect(b"/dev/pts/0")
        expect(shown)
        expect(b"42\r\n# ")
        os.write(fd, b"sh -c 'echo at-$((2 + 3)); exec cat'\r")
        expect(b"at-5\r\n")
        # It interrupts cat, not the lane. The next line must wait: the key empties the input.
        os.write(fd, b"\x03")
        expect(b"^C\r\n# ")
        os.write(fd, b"echo still $((1 + 1))\r")
        expect(b"still 2")
        os.write(fd, b"exit 9\r")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 9
    finally:
        os.close(fd)


@pytest.mark.parametrize("lost", ["kill -STOP -1", "pkill -STOP -f beat[1]"], ids=["all", "one"])
def test_a_processor_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    monkeypatch.setattr("tests.lanes.nested.HANG", 30)
    noticed = pytest.raises(LaneCrash, match="a processor gave no sign of life for 30 s")
    with NestedLane(memory=512) as lane, noticed:
        run(lane, f"sleep 1; {lost}; sleep 1000", timeout=300)


def test_a_command_that_says_nothing_any_more_is_a_crash() -> None:
    with NestedLane(memory=512) as lane, pytest.raises(LaneCrash, match="printed for 3 s"):
        run(lane, "for i in 1 2 3 4; do echo $i; sleep 1; done; sleep 1000", stall=3)
