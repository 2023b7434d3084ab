"""vmm/child.py: a helper program that ends with us, whatever ends us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmm.child import Child, find
from vmm.errors import HostError


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_pid(path: Path) -> int:
    limit = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    return int(path.read_text())


def test_close_ends_it(tmp_path: Path) -> None:
    child = Child(["/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000"])
    pid = wait_for_pid(tmp_path / "pid")
    assert running(pid)
    child.close()
    assert not running(pid)
    child.close()


def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    child = Child(
        ["/bin/sh", "-c", f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done"]
    )
    pid = wait_for_pid(tmp_path / "pid")
    child.close()
    assert not running(pid)


def test_it_ends_with_us_even_when_we_are_killed(tmp_path: Path) -> None:
    code = (
        "import time; from vmm.child import Child\n"
        f"c = Child(['/bin/sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 1000'])\n"
        "time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        pid = wait_for_pid(tmp_path / "pid")
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    limit = time.monotonic() + 20
    while running(pid):
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_it_does_not_begin_without_its_keeper(tmp_path: Path) -> None:
    """We are killed between the two processes a child is made of."""
    code = (
        "import os, signal, subprocess; from vmm.child import Child\n"
        "real = subprocess.Popen\n"
        "def popen(*args, **options):\n"
        "    made.append(real(*args, **options))\n"
        "    print(made[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "made = []; subprocess.Popen = popen\n"
        f"Child(['/bin/sh', '-c', 'touch {tmp_path}/began; exec sleep 1000'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    limit = time.monotonic() + 20
    while running(int(done.stdout)):
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert not (tmp_path / "began").exists()


def test_it_inherits_only_what_it_is_given(tmp_path: Path) -> None:
    read, write = os.pipe()
    try:
        child = Child(
            [
                "/bin/sh",
                "-c",
                f"ls /proc/self/fd | wc -l > {tmp_path}/n; echo given >/dev/fd/{write}",
            ],
            pass_fds=[write],
        )
        assert os.read(read, 100) == b"given\n"
        child.close()
        assert int((tmp_path / "n").read_text()) <= 5  # 0 1 2, the one given, ls's own
    finally:
        os.close(read)
        os.close(write)


def test_what_it_said_last() -> None:
    child = Child(["/bin/sh", "-c", "echo first >&2; echo cannot do that >&2; echo >&2; exit 3"])
    limit = time.monotonic() + 20
    while child.said() != "cannot do that":
        assert time.monotonic() < limit
        time.sleep(0.01)
    child.close()


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(HostError, match=r"^no-such is not installed; apt-get install some-p"):
        find("no-such", "some-package")
    assert find("no-such", "x", "/nowhere", "/bin/sh") == "/bin/sh"
