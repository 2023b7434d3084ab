"""The soak under Linux in parts: its options, its streams of data, and what it makes of reports.

The whole takes minutes: `make soak ARGS="--linux --minutes 5"`, and the same with `--spoil PATH`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.soak import linux, linux_guests
from tests.support import programs
from vmm.testing import initrds

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--spoil", "raw"], "--spoil raw: only with --linux"),
        (["--linux", "--spoil", "moon"], "invalid choice: 'moon'"),
        (["--linux", "--machines", "3"], "--machines: not with --linux"),
        (["--linux", "--minutes", "-1"], "--minutes -1: not a length of time"),
        (["--linux", "--minutes", "nan"], "--minutes nan: not a length of time"),
    ],
)
def test_wrong_options_are_refused(words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["FIRST", "SECOND"])
def test_the_scripts_are_shell(script: str) -> None:
    words = [initrds.busybox(), "sh", "-n"]
    text = getattr(linux_guests, script)
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- streams --------------------------------------------------------------------------------------

Start = Callable[..., tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts soak-stream: the process and its file of figures."""
    stream = programs.compiled("soak_stream", tmp_path)
    running: list[subprocess.Popen[bytes]] = []

    def start(*words: str, mib: int = 1) -> tuple[subprocess.Popen[bytes], Path]:
        figures = tmp_path / words[0]
        running.append(
            subprocess.Popen([stream, figures, str(mib), "5", *words, "unix", tmp_path / "socket"])
        )
        return running[-1], figures

    yield start
    for process in running:
        process.kill()
        process.wait()


def figures_of(path: Path, done: Callable[[list[int]], object]) -> list[int]:
    limit = time.monotonic() + 60
    while True:
        numbers = [int(word) for word in path.read_text().split()] if path.exists() else []
        if numbers and done(numbers):
            return numbers
        assert time.monotonic() < limit, f"{path.name}: {numbers}"
        time.sleep(0.02)


def test_streams_verify_both_ways(start: Start) -> None:
    ends = [start("listen")[1], start("connect")[1]]
    for end in ends:
        good, connections, cut, bad = figures_of(end, lambda numbers: numbers[1] >= 2)
        assert good >= connections * ((1 << 20) - 8)
        assert (cut, bad) == (0, 0)


@pytest.mark.parametrize("spoiler", [0, 1])
def test_a_wrong_byte_is_seen_at_the_other_end(start: Start, spoiler: int) -> None:
    ends = [start("listen"), start("connect")]
    for _, path in ends:
        figures_of(path, lambda numbers: numbers[1])
    ends[spoiler][0].send_signal(signal.SIGUSR1)
    assert figures_of(ends[1 - spoiler][1], lambda numbers: numbers[3])[3] == 1
    assert figures_of(ends[spoiler][1], lambda numbers: numbers[2] or numbers[1] > 1)[3] == 0


def test_an_end_that_dies_is_a_connection_cut(start: Start) -> None:
    _, listens = start("listen", mib=4096)
    process, _ = start("connect", mib=4096)
    figures_of(listens, lambda numbers: numbers[0])
    process.kill()
    assert figures_of(listens, lambda numbers: numbers[2])[2:] == [1, 0]


# --- what guests report ---------------------------------------------------------------------------


@pytest.fixture
def soak(tmp_path: Path) -> linux.LinuxSoak:
    return linux.LinuxSoak(1, tmp_path, print)


def test_what_goes_back_counts_once(soak: linux.LinuxSoak) -> None:
    def report(kib: int) -> dict[str, list[int]]:
        return soak._understand(f"fio raw;3;fio-3.33;scattered;0;0;{kib};9;9\nfio raw;3;fio\n")

    soak._add("first", report(100))
    soak._add("first", report(150))
    soak._known["first", "raw"] = report(90)["raw"]  # it went back
    soak._add("first", report(120))
    assert soak.verified["raw"] == 180 << 10
    assert soak.failures == {}


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ("wrong raw: crc32c: verify failed at file /dev/vda", "raw"),
        ("wrong tree: /mnt/back differs: +0a0b", "tree"),
        ("wrong something", "guest"),
        ("/figures/network:500 2 0 1", "network"),
        ("/figures/vsock:500 2 0 1", "vsock"),
        ("/figures/vsock:500 2 1 0", "vsock"),
    ],
)
def test_what_is_wrong_fails(soak: linux.LinuxSoak, said: str, path: str) -> None:
    soak._add("second", soak._understand(said + "\n/figures/tree:7\n"))
    assert list(soak.failures) == [path]
    assert soak.verified["tree"] == 7


def test_a_connection_cut_by_a_rollback_is_only_counted(soak: linux.LinuxSoak) -> None:
    soak._add("first", soak._understand("/figures/network:500 2 1 0"))
    assert soak.failures == {}
    assert soak.counts["network connections cut"] == 1


def test_the_look_of_a_guest_is_understood(soak: linux.LinuxSoak, tmp_path: Path) -> None:
    """LOOK, by busybox, over files as guests have them."""
    files = {
        "figures/tree": "77\n",
        "fio-raw": "3;fio-3.33;a;0;0;1;\n3;fio-3.33;a;0;0;2;5;\n",
        "fio-qcow2": "crc32c: verify failed at file /dev/vda\n",
        "wrong": "network: it ended\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    look = linux.LOOK
    for name in ("/figures", "/fio-*", "/wrong"):
        look = look.replace(f" {name}", f" {tmp_path}{name}")
    look = look.replace("#/fio-", f"#{tmp_path}/fio-")
    words = [initrds.busybox(), "sh", "-c", look]
    said = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ})
    found = soak._understand(said.stdout.replace(f"{tmp_path}/", "/"))
    assert found == {"tree": [77], "raw": [2048]}
    assert soak.failures == {"qcow2": files["fio-qcow2"].strip(), "network": "it ended"}


def test_nothing_verified_is_a_failure(soak: linux.LinuxSoak) -> None:
    class Image:
        image = "/dev/null"

    soak.guests = Image()  # type: ignore[assignment]
    assert not soak.verdict()
    assert soak.failures["vsock"] == "nothing was verified"
