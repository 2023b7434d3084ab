"""vmm.cli.relay: what `vmm exec` carries between here and the command, which runs on this host."""

from __future__ import annotations

import hashlib
import os
import pwd
import random
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.host_agent import HostAgent
from tests.support.terminals import on_a_terminal, read_until
from vmm.agent.wire import DATA, FRAME, OUT

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A command line up to the options."""
    directory = tmp_path_factory.mktemp("exec")
    kernel = tiny.kernel(directory, tiny.prints(b"no Linux\n") + tiny.HALT)
    with HostAgent(directory) as agent:
        yield [
            sys.executable, "-m", "tests.support.exec_on_host", agent.path, str(kernel),
            "--memory", "32M", "--append", "root=none",
        ]  # fmt: skip


def execute(words: list[str], *command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    options.setdefault("stdin", subprocess.DEVNULL) if "input" not in options else None
    return subprocess.run(
        [*words, "--", *command], capture_output=True, check=False, timeout=100, **options
    )


def test_output_and_status(words: list[str]) -> None:
    done = execute(words, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert execute(words, "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL
    assert execute([*words, "-w", "/usr", "-e", "A=b"], "sh", "-c", "pwd; echo $A").stdout == (
        b"/usr\nb\n"
    )


def test_what_cannot_be_executed(words: list[str], tmp_path: Path) -> None:
    done = execute(words, "/no/such/program")
    assert done.stderr == b"vmm: /no/such/program: No such file or directory (in the guest)\n"
    assert done.returncode == 127
    done = execute(words, str(tmp_path))
    assert done.stderr == f"vmm: {tmp_path}: Permission denied (in the guest)\n".encode()
    assert done.returncode == 126
    done = execute([*words, "--workdir", "/no/such"], "true")
    assert done.stderr == b"vmm: --workdir /no/such: No such file or directory (in the guest)\n"
    assert done.returncode == 126


def test_another_user(words: list[str]) -> None:
    script = "id -un; id -u; id -g; echo $HOME; echo said > /dev/stdout"
    nobody = pwd.getpwnam("nobody")
    done = execute([*words, "-u", "nobody"], "sh", "-c", script)
    assert done.stdout.decode().split("\n")[:5] == [
        "nobody", str(nobody.pw_uid), str(nobody.pw_gid), nobody.pw_dir, "said",
    ]  # fmt: skip
    done = execute([*words, "--user", "12345:54321"], "sh", "-c", "id -u; id -g; id -G; echo $HOME")
    assert done.stdout == b"12345\n54321\n54321\n/\n"
    for user, line in (
        ("no-such-user", "the guest's /etc/passwd has no user no-such-user"),
        ("root:no-such-group", "the guest's /etc/group has no group no-such-group"),
    ):
        done = execute([*words, "-u", user], "true")
        assert done.stderr == f"vmm: --user: {line}; names and numbers are the guest's\n".encode()
        assert done.returncode == 126
    done = execute([*words, "-u", ":5"], "true")
    assert done.stderr.startswith(b"vmm: --user ':5' has no name; say USER or USER:GROUP")
    assert done.returncode == 2


def test_standard_input_closed(words: list[str]) -> None:
    """Nothing is read then, and no descriptor of the monitor's own is taken for it."""
    done = execute(["sh", "-c", 'exec "$@" <&-', "sh", *words], "sh", "-c", "cat; echo $?")
    assert (done.stdout, done.stderr, done.returncode) == (b"0\n", b"", 0)
    done = execute(["sh", "-c", 'exec "$@" <&-', "sh", *words, "--tty"], "true")
    assert done.stderr.startswith(b"vmm: --tty: standard input is no terminal")
    assert done.returncode == 2


def test_a_large_environment(words: list[str]) -> None:
    """As much as a request takes comes through; more is one line, before anything is started."""
    large = "x" * 100_000
    names = [f"N{number}" for number in range(9)]
    options = [word for name in names for word in ("-e", f"{name}={large}")]
    done = execute([*words, *options], "sh", "-c", "echo ${#N0} ${#N8}")
    assert (done.stdout, done.stderr) == (b"100000 100000\n", b"")
    done = execute([*words, *options, "-e", f"M={large}", "-e", f"O={large}"], "true")
    assert done.stderr.startswith(b"vmm: the command cannot be: "), done.stderr
    assert b"Argument list too long" in done.stderr and done.returncode == 2


def test_megabytes_both_ways(words: list[str]) -> None:
    data = random.Random(8).randbytes(16 << 20)
    done = execute(words, "sh", "-c", "tee /dev/stderr", input=data)
    want = hashlib.sha256(data).digest()
    assert hashlib.sha256(done.stdout).digest() == want
    assert hashlib.sha256(done.stderr).digest() == want
    assert done.returncode == 0


@pytest.mark.parametrize("says", [b"", FRAME.pack(DATA, OUT, 0, 0) * 1000])
def test_an_agent_that_starts_nothing(words: list[str], tmp_path: Path, says: bytes) -> None:
    """It takes the connection, and is mute, or says nothing of weight without an end."""
    path = str(tmp_path / "mute")
    script = (
        "import sys; from tests.support import exec_on_host; from vmm.cli import relay; "
        "relay.SILENCE = 0.5; sys.exit(exec_on_host.main(sys.argv[1], sys.argv[2:]))"
    )

    def serve() -> None:
        with listener.accept()[0] as sock, suppress(OSError):
            while says:
                sock.sendall(says)
            sock.recv(1 << 20)
            sock.recv(1)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        threading.Thread(target=serve, daemon=True).start()
        done = execute([sys.executable, "-c", script, path, *words[4:]], "true")
    line = "vmm: the guest's agent has not started the command within 0.5 s"
    assert done.stderr.decode().splitlines()[-1] == line
    assert done.returncode == 125


def test_files(words: list[str], tmp_path: Path) -> None:
    data = random.Random(9).randbytes(3 << 20)
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        command = [*words, "--", "cat"]
        subprocess.run(command, stdin=source, stdout=target, check=True, timeout=100)
    assert (tmp_path / "out").read_bytes() == data


def test_a_reader_that_goes(words: list[str]) -> None:
    """The command finds its pipe broken, as in a pipeline."""
    with subprocess.Popen([*words, "--", "yes"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(100) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_go_to_the_command(words: list[str], signum: signal.Signals) -> None:
    trap = f"trap 'echo caught; exit 9' {signum.name[3:]}"
    script = f"{trap}; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen([*words, "--", "sh", "-c", script], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signum)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(100) == 9


def test_the_third_ctrl_c_ends_the_machine(words: list[str]) -> None:
    script = "trap 'echo caught' INT; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen([*words, "--", "sh", "-c", script], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == b"caught\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130
        assert process.stderr.read() == (
            b"vmm: ended by SIGINT, before the command had ended (status 130)\n"
        )


def test_timeout_1_and_a_command_that_ignores_it(words: list[str]) -> None:
    """GNU timeout sends SIGTERM twice; --grace ends the machine of a command that goes on."""
    script = "trap 'echo caught' TERM; echo ready; while :; do sleep 0.05; done"
    done = execute(
        ["timeout", "--preserve-status", "2", *words, "--grace", "1.5"], "sh", "-c", script
    )
    assert done.stdout.splitlines()[:2] == [b"ready", b"caught"]
    lines = done.stderr.decode().splitlines()
    assert [line for line in lines if line.startswith("vmm:")] == [
        "vmm: SIGTERM: sent to the command; the machine ends in 1.5 s at the latest (--grace), or "
        "at the third SIGTERM",
        "vmm: ended by SIGTERM: the command was still there after 1.5 s (--grace), before the "
        "command had ended (status 143)",
    ]
    assert done.returncode == 143


def test_a_reader_that_waits_holds_up_no_signal(words: list[str]) -> None:
    script = "trap 'exit 8' INT; while :; do head -c 100000 /dev/zero; done"
    with subprocess.Popen([*words, "--", "sh", "-c", script], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\0"
        process.send_signal(signal.SIGINT)  # `head` is ended by it, in the middle of a write
        assert set(process.stdout.read()) == {0}
        assert process.wait(100) == 8


def test_a_time_limit(words: list[str]) -> None:
    done = execute([*words, "--timeout", "2"], "sleep", "1000")
    assert done.returncode == 124
    assert b"vmm: no end within 2 s (--timeout), before the command" in done.stderr


def test_terminals(words: list[str]) -> None:
    with on_a_terminal([*words, "--tty", "--", "sh", "-c", "stty size; exec cat"]) as (run, tty):
        before = termios.tcgetattr(tty)
        read_until(tty, b"33 101\r\n")
        os.write(tty, b"typed\r")
        read_until(tty, b"typed\r\ntyped\r\n")
        os.write(tty, b"\x04")
        assert run.wait(100) == 0
        assert termios.tcgetattr(tty) == before
    with on_a_terminal([*words, "--", "sh", "-c", "echo ready; exec cat"]) as (run, tty):
        read_until(tty, b"ready\r\n")
        os.write(tty, b"\x03")
        assert run.wait(100) == 130
