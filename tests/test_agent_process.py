"""Commands through the agent, which runs on this host: as subprocess has them, and how they end."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import Any

import pytest

from tests.support import tiny
from tests.support.host_agent import HostAgent
from vmm.agent import wire
from vmm.agent.process import GuestProcess, run
from vmm.errors import AgentError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostAgent]:
    with HostAgent(tmp_path_factory.mktemp("agent")) as running:
        yield running


def sh(agent: HostAgent, script: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    return run(agent, ["sh", "-c", script], **options)


def wait_until_gone(pid: int) -> None:
    """Until no process has this number, or only its remains."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state in "ZX":
            return
        time.sleep(0.01)


def test_output_and_status(agent: HostAgent) -> None:
    done = sh(agent, "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert done.args == ["sh", "-c", "echo out; echo err >&2; exit 7"]
    assert run(agent, "true").returncode == 0
    assert run(agent, "echo $0; exit 3", shell=True, text=True).stdout == "/bin/sh\n"
    for signum in (signal.SIGKILL, signal.SIGSEGV, signal.SIGUSR2):
        assert sh(agent, f"kill -{int(signum)} $$").returncode == -signum
    with pytest.raises(subprocess.CalledProcessError) as failed:
        sh(agent, "echo said; exit 9", check=True)
    assert (failed.value.returncode, failed.value.stdout) == (9, b"said\n")


def test_the_same_as_subprocess(agent: HostAgent, tmp_path: Path) -> None:
    """What cannot be executed is the same exception with the same arguments."""
    plain = tmp_path / "plain"
    plain.write_text("echo hello\n")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x7fELF")
    garbage.chmod(0o755)
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["/no/such/program"], {}),
        (["no-such-program"], {}),
        ([str(plain)], {}),
        ([str(garbage)], {}),
        ([str(tmp_path)], {}),
        (["true"], {"cwd": "/no/such/directory"}),
        (["true"], {"cwd": str(plain)}),
    ]
    for args, options in cases:
        with pytest.raises(OSError) as theirs:
            subprocess.run(args, capture_output=True, check=False, **options)
        with pytest.raises(OSError) as ours:
            run(agent, args, **options)
        assert type(ours.value) is type(theirs.value), args
        assert ours.value.args == theirs.value.args, args
        assert ours.value.filename == theirs.value.filename, args
    with pytest.raises(ValueError, match="embedded null byte"):
        run(agent, ["echo", "a\0b"])
    with pytest.raises(ValueError, match="illegal environment variable name"):
        run(agent, ["true"], env={"A=B": "x"})
    with pytest.raises(OSError, match="Argument list too long"):
        run(agent, ["true", "x" * wire.REQUEST_MAX])
    with pytest.raises(ValueError, match="no command given"):
        run(agent, [])
    with pytest.raises(ValueError, match="stdout=5 is not PIPE or DEVNULL"):
        run(agent, ["true"], stdout=5)


def test_environment_and_directory(agent: HostAgent, tmp_path: Path) -> None:
    got = run(agent, ["/usr/bin/env"], env={"A": "1", "HOME": None}, text=True).stdout.split("\n")
    assert "A=1" in got and "USER=root" in got
    assert not [line for line in got if line.startswith("HOME=")]
    assert run(agent, ["pwd"], cwd=tmp_path, text=True).stdout == f"{tmp_path}\n"
    program = tmp_path / "only-here"
    program.write_text("#!/bin/sh\necho here\n")
    program.chmod(0o755)
    assert run(agent, ["only-here"], env={"PATH": f"/none:{tmp_path}"}).stdout == b"here\n"
    said = sh(agent, "umask; echo $$; cut -d' ' -f5,6 /proc/$$/stat", text=True).stdout
    umask, pid, pair = said.split("\n")[:3]
    assert umask == "0022"
    assert pair == f"{pid} {pid}"  # group and session are its own
    blocked = run(agent, ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"], text=True).stdout
    assert set(blocked.split()) == {"SigBlk:", "SigIgn:", "0" * 16}


def test_descriptors(agent: HostAgent) -> None:
    """The command has its three, and none of the agent's."""
    assert sh(agent, "ls /proc/self/fd | wc -l", text=True).stdout.strip() == "4"


def test_streams_left_out(agent: HostAgent) -> None:
    done = sh(agent, "echo out; echo err >&2", stderr=STDOUT)
    assert (done.stdout, done.stderr) == (b"out\nerr\n", None)
    done = sh(agent, "echo out; echo err >&2", stdout=DEVNULL)
    assert (done.stdout, done.stderr) == (None, b"err\n")
    done = sh(agent, "echo out; echo err >&2; readlink /proc/$$/fd/0", stderr=DEVNULL)
    assert (done.stdout, done.stderr) == (b"out\n/dev/null\n", None)


def test_text(agent: HostAgent) -> None:
    done = run(agent, ["cat"], input="gr\u00fc\u00dfe\r\n")
    assert done.stdout == "gr\u00fc\u00dfe\n"
    assert run(agent, ["cat"], input="\u00e9", encoding="latin-1").stdout == "\u00e9"
    with pytest.raises(UnicodeDecodeError):
        run(agent, ["printf", r"\377"], text=True)


def test_megabytes_both_ways(agent: HostAgent) -> None:
    data = random.Random(3).randbytes(32 << 20)
    done = run(agent, ["cat"], input=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert run(agent, ["md5sum"], input=data).stdout.split()[0].decode() == (
        hashlib.md5(data).hexdigest()
    )
    done = sh(agent, "cat | tee /dev/stderr", input=data[: 4 << 20])
    assert done.stdout == done.stderr == data[: 4 << 20]


def test_every_byte_count_at_the_windows_edge(agent: HostAgent) -> None:
    for size in (0, 1, wire.CHUNK, wire.CREDIT_AFTER - 1, wire.WINDOW, 3 * wire.WINDOW + 7):
        for off in (-1, 0, 1):
            data = bytes(max(size + off, 0))
            assert run(agent, ["cat"], input=data).stdout == data


def test_input_that_is_not_read(agent: HostAgent) -> None:
    assert run(agent, ["true"], input=bytes(8 << 20)).returncode == 0
    assert run(agent, ["head", "-c", "3"], input=b"abcdef" * 1_000_000).stdout == b"abc"
    with GuestProcess(agent, ["sh", "-c", "exec <&-; echo closed; sleep 1000"]) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"closed\n"
        with pytest.raises(BrokenPipeError):
            while True:
                process.stdin.write(b"x" * 1000)
                process.stdin.flush()
        process.kill()
        with pytest.raises(BrokenPipeError):
            process.stdin.close()


def test_two_hundred_commands(agent: HostAgent) -> None:
    for number in range(200):
        done = sh(agent, f"echo {number}; echo {number} >&2; exit {number}")
        assert done.returncode == number
        assert done.stdout == done.stderr == f"{number}\n".encode()


def test_twenty_at_once(agent: HostAgent) -> None:
    data = [random.Random(number).randbytes(1 << 20) for number in range(20)]
    barrier = threading.Barrier(20)

    def one(number: int) -> subprocess.CompletedProcess[Any]:
        barrier.wait()
        return sh(agent, f"cat; echo {number} >&2; exit {number}", input=data[number])

    with ThreadPoolExecutor(20) as pool:
        for number, done in enumerate(pool.map(one, range(20))):
            assert (done.returncode, done.stderr) == (number, f"{number}\n".encode())
            assert done.stdout == data[number]


def test_a_timeout_kills_the_group(agent: HostAgent) -> None:
    script = "trap '' TERM INT HUP; sleep 1000 & echo $! $$; while :; do sleep 1000; done"
    for pid in late(agent, script).split():
        wait_until_gone(int(pid))


def late(agent: HostAgent, script: str) -> bytes:
    """What a command said that was killed for being late; it had time enough for that."""
    for limit in (0.5, 5.0, 50.0):
        with pytest.raises(subprocess.TimeoutExpired) as killed:
            sh(agent, script, timeout=limit)
        assert killed.value.timeout == limit
        said = bytes(killed.value.output)
        if said.endswith(b"\n"):
            return said
    raise AssertionError("it says nothing")


def test_a_timeout_where_only_children_are_left(agent: HostAgent) -> None:
    """The process has ended; what it left behind holds its output open."""
    wait_until_gone(int(late(agent, "sleep 1000 & echo $!")))


def test_hanging_up_is_a_hangup(agent: HostAgent) -> None:
    script = "trap 'exit 0' HUP; echo $$; while :; do sleep 0.05; done"
    process = GuestProcess(agent, ["sh", "-c", script])
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.close()
    wait_until_gone(pid)
    with pytest.raises(AgentError, match="closed"):
        process.wait()
    survivor = GuestProcess(agent, ["nohup", "sh", "-c", "echo $$; sleep 1000"])
    assert survivor.stdout is not None
    pid = int(survivor.stdout.readline())
    survivor.close()
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)  # it is there
    wait_until_gone(pid)


def test_a_dialogue(agent: HostAgent) -> None:
    with GuestProcess(agent, ["sh", "-c", "while read x; do echo got $x; done; exit 5"],
                      text=True, bufsize=1) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        for word in ("one", "two", "three"):
            process.stdin.write(f"{word}\n")
            assert process.stdout.readline() == f"got {word}\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.wait(60) == 5
    assert process.returncode == 5
    assert "returncode: 5" in repr(process)


def test_what_has_ended_holds_nothing(agent: HostAgent) -> None:
    """As with Popen, nobody has to close it."""
    before = tiny.descriptors()
    process = GuestProcess(agent, ["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    assert process.wait() == 3
    process._connection.wait_for(lambda: process._session.complete, None)
    assert tiny.opened_since(before) == []
    assert (process.stdout.read(), process.stderr.read()) == (b"out\n", b"err\n")
    process.kill()
    process.terminate()
    process.stdin.write(b"x")
    with pytest.raises(BrokenPipeError):
        process.stdin.flush()
    with pytest.raises(BrokenPipeError):
        process.stdin.close()
    assert process.poll() == process.wait() == 3
    process.close()


def test_signals(agent: HostAgent) -> None:
    for send, expected in (
        (GuestProcess.terminate, -signal.SIGTERM),
        (GuestProcess.kill, -signal.SIGKILL),
        (GuestProcess.interrupt, -signal.SIGINT),
    ):
        with GuestProcess(agent, ["sleep", "1000"]) as process:
            send(process)
            assert process.wait(60) == expected
            process.send_signal(signal.SIGTERM)  # harmless
    script = "trap 'echo usr1; exit 3' USR1; echo ready; while :; do sleep 0.05; done"
    with GuestProcess(agent, ["sh", "-c", script], text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.read() == "usr1\n"
        assert process.wait(60) == 3
        with pytest.raises(ValueError, match="signal 0"):
            process.send_signal(0, group=True)


def test_a_command_that_ignores_sigterm(agent: HostAgent) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    with GuestProcess(agent, ["sh", "-c", script]) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL


def test_a_flood_and_a_slow_reader(agent: HostAgent, tmp_path: Path) -> None:
    """What the host holds is bounded: the command waits."""
    count = tmp_path / "count"
    step = f"head -c 65536 /dev/zero || exit 9; i=$((i+1)); echo $i > {count}"
    script = f"i=0; while :; do {step}; done"
    with GuestProcess(agent, ["sh", "-c", script]) as process:
        last = ""
        while not last or last != count.read_text():  # until it stands still
            last = count.read_text() if count.exists() else ""
            time.sleep(0.3)
        assert process.poll() is None  # this takes no output either
        session = process._session
        assert session.available(wire.OUT) <= wire.WINDOW
        assert int(last) * 65536 <= 2 * wire.WINDOW + (1 << 20)
        assert process.stdout is not None
        for _ in range(64):
            assert process.stdout.read(65536) == bytes(65536)
        process.stdout.close()  # the command finds its pipe broken
        assert process.wait(60) == 9


def test_one_stream_does_not_hold_up_the_other(agent: HostAgent) -> None:
    script = "yes >&2 & head -c 3000000 /dev/zero; kill $!"
    with GuestProcess(agent, ["sh", "-c", script]) as process:
        assert process.stdout is not None
        assert process.stdout.read() == bytes(3_000_000)
        assert process.wait(60) == 0


def test_communicate_after_a_timeout(agent: HostAgent) -> None:
    with GuestProcess(agent, ["sh", "-c", "echo first; sleep 1000"]) as process:
        with pytest.raises(subprocess.TimeoutExpired) as late:
            process.communicate(timeout=0.3)
        assert late.value.output in (b"first\n", b"")  # a host may be that busy
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=0.3)
        process.kill()
        assert process.communicate() in ((b"first\n", b""), (b"", b""))


def test_threads_share_a_process(agent: HostAgent) -> None:
    """One writes, one reads each stream, one waits."""
    data = random.Random(5).randbytes(4 << 20)
    with GuestProcess(agent, ["sh", "-c", "tee /dev/stderr; exit 6"]) as process:
        files = process.stdin, process.stdout, process.stderr
        assert files[0] is not None and files[1] is not None and files[2] is not None

        def write() -> None:
            assert process.stdin is not None
            process.stdin.write(data)
            process.stdin.close()

        with ThreadPoolExecutor(4) as pool:
            waiting = pool.submit(process.wait, 100)
            reading = [pool.submit(files[1].read), pool.submit(files[2].read)]
            pool.submit(write).result(100)
            assert [part.result(100) == data for part in reading] == [True, True]
            assert waiting.result(100) == 6


def test_a_terminal(agent: HostAgent) -> None:
    process = GuestProcess(agent, ["sh", "-c", "tty; stty size; exec cat"], tty=True, size=(33, 99))
    with process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stderr is None
        assert process.stdout.readline().startswith(b"/dev/")
        assert process.stdout.readline() == b"33 99\r\n"
        process.stdin.write(b"abc\n")
        process.stdin.flush()
        assert process.stdout.read(10) == b"abc\r\nabc\r\n"  # the echo, and cat's
        process.stdin.write(b"\x03")
        process.stdin.flush()
        assert process.wait(60) == -signal.SIGINT
    done = run(agent, ["cat"], tty=True, input=b"line\n")  # the end of input is a ^D
    assert done.stdout.startswith(b"line\r\nline\r\n")
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"
    with GuestProcess(agent, ["sh", "-c", script], tty=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\r\n"
        process.resize(50, 132)
        assert process.stdout.readline() == b"50 132\r\n"


def test_a_process_that_is_left_is_killed(agent: HostAgent) -> None:
    with (
        pytest.raises(RuntimeError, match="the test's"),
        GuestProcess(agent, ["sh", "-c", "echo $$; exec sleep 1000"]) as process,
    ):
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        raise RuntimeError("the test's")
    wait_until_gone(pid)


def test_the_agent_goes(tmp_path: Path) -> None:
    with HostAgent(tmp_path) as agent:
        process = GuestProcess(agent, ["sh", "-c", "read x; kill -9 $PPID; sleep 1000"])
        with pytest.raises(AgentError, match="the agent on this host has gone"):
            process.communicate(b"now\n", timeout=60)
        process.close()
        assert run(agent, ["true"]).returncode == 0  # the others' do not care


def test_run_takes_what_subprocess_run_takes(agent: HostAgent) -> None:
    done = run(agent, ["echo", "x"], capture_output=True, universal_newlines=True)
    assert (done.stdout, done.stderr) == ("x\n", "")
    assert run(agent, ["true"], timeout=float("inf")).returncode == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input": b"x", "stdin": DEVNULL}, "stdin and input"),
        ({"capture_output": False}, "capture_output=False"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"user": ""}, "user='' names nobody"),
        ({"tty": True, "size": (0, -1)}, "size="),
        ({"tty": True, "size": (70000, 1)}, "size="),
    ],
)
def test_run_says_what_it_cannot_take(agent: HostAgent, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(agent, ["true"], **options)
