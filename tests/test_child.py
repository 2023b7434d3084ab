"""vmm/child.py: a helper program that ends with us, whatever ends us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.bare import until
from tests.support.helpers import LOOSE
from vmm.child import SAID_MAX, Child, find
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
    child = Child(["/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000"], LOOSE)
    pid = wait_for_pid(tmp_path / "pid")
    assert running(pid)
    child.close()
    assert not running(pid)
    child.close()


def test_descriptors_beyond_the_limit_are_kept_from_it(tmp_path: Path) -> None:
    """A shell's own descriptor 250, then `ulimit -n 64`."""
    code = (
        "import os, resource, time\n"
        "from vmm.child import Child; from tests.support.helpers import LOOSE\n"
        "os.dup2(1, 250)\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        f"c = Child(['/bin/sh', '-c', 'ls /proc/self/fd > {tmp_path}/list; echo $$ > "
        f"{tmp_path}/pid; exec sleep 1000'], LOOSE)\n"
        f"while not os.path.exists('{tmp_path}/pid'): time.sleep(0.01)\n"
        "c.close(); print(os.get_inheritable(250))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert "250" not in (tmp_path / "list").read_text().split()


def test_one_that_does_not_listen_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.child.GRACE", 0.5)
    child = Child(
        ["/bin/sh", "-c", f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done"],
        LOOSE,
    )
    pid = wait_for_pid(tmp_path / "pid")
    child.close()
    assert not running(pid)


DEAF = "trap '' TERM; echo $$ > {}/pid; while :; do sleep 0.1; done"


def test_close_does_not_wait_for_one_that_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper that was taken over has its grace all the same: it may be writing what it has."""
    monkeypatch.setattr("vmm.child.GRACE", 3.0)
    children = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        children.append(Child(["/bin/sh", "-c", DEAF.format(tmp_path / str(number))], LOOSE))
    pids = [wait_for_pid(tmp_path / str(number) / "pid") for number in range(3)]
    for child in children:
        child.close()
    assert all(map(running, pids))
    children[0].close()
    assert running(pids[0])
    until(lambda: not any(map(running, pids)))
    until(lambda: not any(child._keeper or child._life >= 0 for child in children))


@pytest.mark.parametrize("patience", [False, True])
def test_close_waits_where_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: bool
) -> None:
    """For another user of the same image, or of rings that it served; right after one that did not
    end too."""
    monkeypatch.setattr("vmm.child.GRACE", 60.0 if not patience else 1.0)
    monkeypatch.setattr("vmm.child._gave_up", time.monotonic())
    child = Child(["/bin/sh", "-c", DEAF.format(tmp_path)], LOOSE)
    pid = wait_for_pid(tmp_path / "pid")
    if patience:
        child.close(patience=5.0)
    else:
        child.close(patience=0.5, grace=0.5)
    assert not running(pid)


def test_one_that_is_stopped_ends_by_itself(tmp_path: Path) -> None:
    """It takes SIGTERM, and no SIGKILL in the middle of what it writes."""
    code = f"trap 'echo ended > {tmp_path}/end; exit' TERM; echo $$ > {tmp_path}/pid; " \
        "while :; do sleep 0.1; done"  # fmt: skip
    child = Child(["/bin/sh", "-c", code], LOOSE)
    os.kill(wait_for_pid(tmp_path / "pid"), signal.SIGSTOP)
    child.close(patience=20.0)
    assert (tmp_path / "end").read_text() == "ended\n"


@pytest.mark.parametrize("killed", [False, True])
def test_what_it_has_started_is_woken(tmp_path: Path, killed: bool) -> None:
    """virtiofsd is served by a child of its own, which may be stopped too; without a cgroup, that
    is left stopped for ever."""
    inner = f"echo $$ > {tmp_path}/inner; kill -STOP $$; echo woken > {tmp_path}/woken"
    code = (
        "import os, signal, sys, vmm.sandbox; from pathlib import Path\n"
        "from vmm.child import Child; from tests.support.helpers import LOOSE\n"
        "from tests.test_child import wait_for_pid\n"
        "vmm.sandbox.cgroup.directory = lambda: ''\n"
        "c = Child(['/bin/sh', '-c', '/bin/sh -c \"$0\" & wait', sys.argv[1]], LOOSE)\n"
        f"pid = wait_for_pid(Path({str(tmp_path)!r}) / 'inner')\n"
        "while ') T ' not in Path(f'/proc/{pid}/stat').read_text(): pass\n"
        f"if {killed}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.close()\n"
    )
    subprocess.run([sys.executable, "-c", code, inner], check=not killed)
    until(lambda: (tmp_path / "woken").exists())


@pytest.mark.parametrize("cgroup", [False, True])
@pytest.mark.parametrize("keeper", [False, True])
def test_one_that_does_not_listen_is_killed_when_we_end_first(
    tmp_path: Path, cgroup: bool, keeper: bool
) -> None:
    code = (
        "from vmm import child; from tests.support.helpers import LOOSE\n"
        "from tests.test_child import wait_for_pid; from pathlib import Path; import vmm.sandbox\n"
        f"if not {cgroup}: vmm.sandbox.cgroup.directory = lambda: ''\n"
        f"c = child.Child(['/bin/sh', '-c', {DEAF.format(tmp_path)!r}], LOOSE, keeper={keeper})\n"
        f"pid = wait_for_pid(Path({str(tmp_path)!r}) / 'pid')\n"
        "c.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    until(lambda: not running(wait_for_pid(tmp_path / "pid")))


def test_once_it_has_ended_its_number_is_nobodys(tmp_path: Path) -> None:
    """The keeper is gone before the number may be another program's."""
    code = (
        "import os, signal, vmm.sandbox; from vmm.child import Child\n"
        "from tests.support.helpers import LOOSE\n"
        "vmm.sandbox.cgroup.directory = lambda: ''\n"
        "c = Child(['/bin/sh', '-c', 'exit 3'], LOOSE)\n"
        "keeper = c._keeper\n"
        "assert keeper and c.wait(20) and c._keeper == 0\n"
        "try:\n"
        "    os.kill(keeper, 0)\n"
        "except ProcessLookupError:\n"
        "    print(c.how())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "has ended (status 3)\n"


@pytest.mark.parametrize("stopped", [False, True])
def test_it_ends_with_us_even_when_we_are_killed(tmp_path: Path, stopped: bool) -> None:
    code = (
        "import time; from vmm.child import Child; from tests.support.helpers import LOOSE\n"
        f"c = Child(['/bin/sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 1000'], LOOSE)\n"
        "time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        pid = wait_for_pid(tmp_path / "pid")
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    limit = time.monotonic() + 20
    while running(pid):
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_it_does_not_begin_without_its_keeper(tmp_path: Path) -> None:
    """We are killed between the two processes a child is made of."""
    code = (
        "import os, signal; from vmm.child import Child; from tests.support.helpers import LOOSE\n"
        "real = os.posix_spawn\n"
        "def spawn(*args, **options):\n"
        "    print(real(*args, **options), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.posix_spawn = spawn\n"
        f"Child(['/bin/sh', '-c', 'touch {tmp_path}/began; exec sleep 1000'], LOOSE)\n"
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
            LOOSE,
            pass_fds=[write],
        )
        assert os.read(read, 100) == b"given\n"
        child.close()
        assert int((tmp_path / "n").read_text()) <= 5  # 0 1 2, the one given, ls's own
    finally:
        os.close(read)
        os.close(write)


def test_what_this_process_was_given_is_not_passed_on(tmp_path: Path) -> None:
    """Such as a descriptor that a shell opened, a signal that nohup ignores."""
    code = (
        "import os, signal; from vmm.child import Child; from tests.support.helpers import LOOSE\n"
        "os.set_inheritable(os.open('/etc/passwd', os.O_RDONLY), True)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])\n"
        "for keeper in (False, True):\n"
        f"    c = Child(['/bin/sh', '-c', 'ls -l /proc/self/fd > {tmp_path}/fds; '\n"
        f"               'cat /proc/self/status > {tmp_path}/status'], LOOSE, keeper=keeper)\n"
        "    assert c.wait(20) and c.how() == 'has ended (status 0)', c.how()\n"
        "    c.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "passwd" not in (tmp_path / "fds").read_text()
    status = dict(
        line.split(":\t")
        for line in (tmp_path / "status").read_text().splitlines()
        if ":\t" in line
    )
    assert int(status["SigBlk"], 16) == 0
    assert not int(status["SigIgn"], 16) >> signal.SIGHUP - 1 & 1


def test_without_standard_descriptors(tmp_path: Path) -> None:
    code = (
        "import os, sys; from vmm.child import Child; from tests.support.helpers import LOOSE\n"
        "for fd in range(3): os.close(fd)\n"
        "c = Child(['/bin/sh', '-c', 'echo out; echo err >&2; cat'], LOOSE)\n"
        f"with open('{tmp_path}/said', 'w') as f: print(c.wait(20), repr(c.text()), file=f)\n"
        "c.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / "said").read_text() == "True 'out\\nerr\\n'\n"


def test_what_it_says_is_bounded() -> None:
    """A helper with an enemy for a guest complains for ever."""
    child = Child(
        ["/bin/sh", "-c", "yes 'something is wrong' >&2; echo $? >&2; exec sleep 1000"], LOOSE
    )
    try:
        limit = time.monotonic() + 20
        while len(child.text()) < SAID_MAX - 20:
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(0.1)
        assert os.fstat(child._output).st_size == SAID_MAX
        assert child.said().startswith("something is wrong"[: len(child.said())])
    finally:
        child.close()


def test_how_it_ended() -> None:
    for command, how in (
        ("exit 3", "has ended (status 3)"),
        ("kill -9 $$", "was killed by SIGKILL"),
        ("kill -40 $$", "was killed by signal 40"),
    ):
        child = Child(["/bin/sh", "-c", command], LOOSE)
        assert child.wait(20)
        assert child.how() == how
        child.close()


def test_one_that_cannot_be_started() -> None:
    with pytest.raises(HostError, match=r"^program cannot be started: No such file or directory$"):
        Child(["/nowhere/program"], LOOSE, keeper=False)
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == ""


def test_what_it_said_last() -> None:
    child = Child(
        ["/bin/sh", "-c", "echo first >&2; echo cannot do that >&2; echo >&2; exit 3"], LOOSE
    )
    limit = time.monotonic() + 20
    while child.said() != "cannot do that":
        assert time.monotonic() < limit
        time.sleep(0.01)
    child.close()


def test_what_it_says_moves_no_terminal() -> None:
    """An image, for one, chooses the names of features that a daemon tells of."""
    text = r"\033]0;title\007\033[31mred\r\013\302\205\302\233x\n" + "y" * 5000
    child = Child(["/bin/sh", "-c", f"printf '{text}' >&2"], LOOSE)
    assert child.wait(20)
    first, last = child.text().split("\n")
    assert first.isprintable() and first.startswith(r"\x1b]0;title\x07\x1b[31mred\r")
    assert last == child.said() == "y" * 400 + " ..."
    child.close()


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(HostError, match=r"^no-such is not installed; apt-get install some-p"):
        find("no-such", "some-package")
    assert find("no-such", "x", "/nowhere", "/bin/sh") == "/bin/sh"


def test_a_forked_child_keeps_nothing_of_it(tmp_path: Path) -> None:
    """It neither ends the helper nor keeps it alive when this process has ended."""
    code = (
        "import os, time; from vmm.child import Child; from tests.support.helpers import LOOSE\n"
        f"c = Child(['/bin/sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 1000'], LOOSE)\n"
        "if not os.fork():\n"
        "    c.close()\n"
        f"    open('{tmp_path}/forked', 'w').write(str(os.getpid()))\n"
        "    time.sleep(1000)\n"
        "time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        pid, forked = wait_for_pid(tmp_path / "pid"), wait_for_pid(tmp_path / "forked")
        try:
            time.sleep(0.1)
            assert running(pid)
            parent.kill()
            parent.wait()
            limit = time.monotonic() + 20
            while running(pid):
                assert time.monotonic() < limit
                time.sleep(0.01)
        finally:
            os.kill(forked, signal.SIGKILL)
