"""`vmm run` on guests of a few instructions: statuses, signals, consoles, the terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import boot_files, tiny
from tests.support.tiny import HALT, AtTerminal
from vmm import __version__, errors
from vmm.cli import COMMANDS

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

Make = Callable[[bytes], str]


@pytest.fixture
def kernel(tmp_path: Path) -> Make:
    """Makes a file that runs the code given: its path."""
    return lambda code: tiny.kernel(tmp_path, code)


def vmm(*arguments: str, **options: object) -> tuple[int, str, str]:
    done = tiny.run("run", "--memory", "16M", *arguments, **options)
    return done.returncode, done.stdout, done.stderr


def started(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    """`vmm run` going; its output is in pipes."""
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        tiny.command("run", "--memory", "16M", *arguments),
        env=tiny.environment(),
        **{
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **options,
        },
    )


def read_until(process: subprocess.Popen[bytes], text: bytes) -> None:
    assert process.stdout is not None
    got = b""
    while text not in got:
        more = os.read(process.stdout.fileno(), 4096)
        assert more, (got, process.communicate())
        got += more


# --- how it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_exit_port(kernel: Make, status: int) -> None:
    says = f"vmm: the guest wrote {status} to the exit port (status {status})\n" if status else ""
    assert vmm(kernel(tiny.exits(status))) == (status, "", says)


@pytest.mark.parametrize(
    ("code", "options", "status", "says"),
    [
        (tiny.POWEROFF, [], 0, ""),
        (tiny.RESET, [], 0, ""),
        (
            tiny.PANIC,
            [],
            errors.EXIT_PANIC,
            r"vmm: the guest's kernel panicked \(status 120\)\n",
        ),
        (
            tiny.PANIC,
            ["--on-panic", "pause", "--timeout", "0.5"],
            errors.EXIT_TIMEOUT,
            r"vmm: the guest's kernel panicked; it is paused \(SIGINT or Ctrl-A x ends it\)\n"
            r"vmm: nothing was ever written to the console \(ttyS0\)\n"
            r"vmm: vCPU 0 was running at 0x1[0-9a-f]{5} in the guest's kernel .*\n"
            r"vmm: no end within 0.5 s \(--timeout\) \(status 124\)\n",
        ),
        (
            b"",
            ["--timeout", "0.3"],
            errors.EXIT_TIMEOUT,
            r"vmm: nothing was ever written to the console \(ttyS0\)\n"
            r"vmm: vCPU 0 had halted at 0x100001 in the guest's kernel \(32-bit protected mode\)\n"
            r"vmm: no end within 0.3 s \(--timeout.*\n",
        ),
        (
            tiny.SPIN,
            ["--timeout", "0.3", "--cpus", "2"],
            errors.EXIT_TIMEOUT,
            r"vmm: nothing was ever written to the console \(ttyS0\)\n"
            r"vmm: vCPU 0 was running at 0x100000 in the guest's kernel \(32-bit protected mode\)\n"
            r"vmm: vCPU 1 was never started\n"
            r"vmm: no end within 0.3 s.*\n",
        ),
        (tiny.exits(3), ["--timeout", "9e8"], 3, r"vmm: the guest wrote 3 to the exit port.*\n"),
    ],
    ids=["poweroff", "reset", "panic", "panic, pause", "halted", "spinning", "a long limit"],
)
def test_other_ends(kernel: Make, code: bytes, options: list[str], status: int, says: str) -> None:
    ended, out, err = vmm(kernel(code + HALT), *options)
    assert (ended, out) == (status, ""), err
    assert re.fullmatch(says, err), err


def test_time_limit_with_several_vcpus_and_output(kernel: Make) -> None:
    flood = tiny.out(0x3F8, ord("x")) + b"\xeb\xf7"  # 1: ...; jmp 1b
    ended, out, _ = vmm(kernel(flood), "--cpus", "3", "--timeout", "0.4")
    assert ended == errors.EXIT_TIMEOUT
    assert set(out) == {"x"}


def test_triple_fault(kernel: Make) -> None:
    ended, out, err = vmm(kernel(tiny.TRIPLE_FAULT))
    assert (ended, out) == (errors.EXIT_TRIPLE_FAULT, "")
    assert err.startswith("vCPU 0: triple fault at 0x")
    assert "\n  rip  " in err and "\n  what to do: " in err
    assert err.endswith("\nvmm: triple fault: the guest could not handle a fault (status 121)\n")


@pytest.mark.native_only
def test_emulation_failure_tells_all(kernel: Make) -> None:
    code = b"\xb8\x78\x56\x34\x12" + tiny.POPCNT + HALT  # mov eax, 0x12345678
    ended, out, err = vmm(kernel(code))
    assert (ended, out) == (errors.EXIT_EMULATION, "")
    lines = err.splitlines()
    assert lines[0] == (
        "vCPU 0: emulation failure at 0x100005 (32-bit protected mode, CPL 0): "
        "KVM cannot emulate `popcnt eax, eax`"
    )
    assert "  rip  0000000000100005  rflags 00000002 []" in lines
    assert any(line.startswith("  rax  0000000012345678  rbx  ") for line in lines), err
    assert re.search(r"^  => 0000000000100005  f3 0f b8 c0 +popcnt eax, eax$", err, re.M)
    assert (
        "  why: this host's KVM is kvm_pvm, which interprets guest kernel code, "
        "and popcnt is not known to its interpreter"
    ) in lines
    assert "use a host with VT-x or AMD-V, see `vmm doctor`" in err
    assert lines[-1] == ("vmm: KVM could not emulate an instruction of the guest (status 122)")


@pytest.mark.native_only
@pytest.mark.parametrize("linux", [True, False])
def test_a_host_that_cannot_run_linux_is_told_of(tmp_path: Path, linux: bool) -> None:
    """Always, not only with -v; and not of a guest that is no Linux."""
    code = tiny.exits(0)
    notes = boot_files.pvh_note(tiny.ENTRY) + (boot_files.LINUX_NOTE if linux else b"")
    path = tmp_path / "kernel"
    path.write_bytes(boot_files.elf(((tiny.ENTRY, code, 4096),), entry=tiny.ENTRY, notes=notes))
    ended, _, err = vmm(str(path), "--boot", "pvh")
    assert ended == 0
    says = "vmm: this host's KVM is kvm_pvm, which interprets guest kernel code: a stock Linux is "
    assert (err.startswith(says), bool(err)) == (linux, linux)


# --- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signums", "status", "name"),
    [
        ([signal.SIGINT], 130, "SIGINT"),
        ([signal.SIGHUP], 129, "SIGHUP"),
    ],
)
def test_signals_end_it(kernel: Make, signums: list[int], status: int, name: str) -> None:
    process = started(kernel(tiny.prints(b"ready\n") + HALT))
    read_until(process, b"ready\n")
    for signum in signums:
        process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, b"")
    assert err.decode() == f"vmm: ended by {name} (status {status})\n"


def test_sigterm_presses_the_power_button(kernel: Make) -> None:
    process = started(kernel(tiny.POLITE))
    read_until(process, b"ready\n")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"")
    assert re.fullmatch(rb"(vmm: SIGTERM: the guest's power button is pressed; .*\n)?", err)


def test_an_ignored_hangup_stays_ignored(kernel: Make) -> None:
    """nohup vmm run ... &"""
    process = started(
        kernel(tiny.POLITE), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    read_until(process, b"ready\n")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == b""
    assert process.returncode == 0


# --- consoles -----------------------------------------------------------------------------------


def test_output_arrives_before_the_end(kernel: Make) -> None:
    process = started(kernel(tiny.prints(b"one\n") + tiny.prints(b"no newline") + HALT))
    read_until(process, b"one\nno newline")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_input_from_a_pipe_and_its_end(kernel: Make) -> None:
    process = started(kernel(tiny.ECHO), stdin=subprocess.PIPE)
    out, err = process.communicate(b"ab\x01q", timeout=60)
    assert (process.returncode, out) == (7, b"ready\n[a][b][\x01]"), err


@pytest.mark.parametrize("code", [HALT, tiny.prints(b"two\n") + tiny.SPIN], ids=["silent", "not"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_it_ends_when_its_reader_has_gone(kernel: Make, code: bytes, kind: str) -> None:
    """vmm run ... | head -1"""
    path = kernel(tiny.prints(b"one\n") + code)
    ours, theirs = os.pipe() if kind == "pipe" else (s.detach() for s in socket.socketpair())
    process = started(path, stdout=theirs)
    os.close(theirs)
    assert os.read(ours, 4) == b"one\n"
    os.close(ours)
    _, err = process.communicate(timeout=60)
    assert (
        err == b"vmm: standard output: its reader has gone (--console none runs without one) "
        b"(status 141)\n"
    )
    assert process.returncode == 141


def test_a_reader_that_is_not_the_consoles_may_go(kernel: Make) -> None:
    process = started(kernel(tiny.prints(b"ready\n") + tiny.exits(4)), "--console", "none")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 4


@pytest.mark.parametrize("how", ["time limit", "SIGTERM"])
def test_a_reader_that_is_stuck_holds_nothing_up(kernel: Make, how: str) -> None:
    flood = tiny.out(0x3F8, ord("x")) + b"\xeb\xf7"  # 1: ...; jmp 1b
    limit = ["--timeout", "1"] if how == "time limit" else []
    process = started(kernel(flood), "--cpus", "2", *limit)
    assert process.stdout is not None and process.stderr is not None
    if not limit:
        read_until(process, b"x")
        time.sleep(0.5)  # the pipe fills up: nobody reads on
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == (124 if limit else 143)
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    # (On a slow host the pipe has not filled up in this time.)
    assert (
        err.splitlines()[0] == "vmm: console stdio: nobody reads it; the rest of the output is lost"
    )
    assert re.search(r"^vmm: (no end|ended by SIGTERM)", err, re.M)


@pytest.mark.parametrize("how", ["time limit", "SIGTERM", "end"])
def test_a_reader_of_our_own_lines_that_is_stuck_holds_nothing_up(kernel: Make, how: str) -> None:
    """The guest brings about more lines than the pipe holds: -v tells of unclaimed addresses."""
    touches = (
        b"\x66\xba\x00\x10\xb9\x00\x04\x00\x00\xec\x66\x42\xe2\xfb"  # in al, dx: of 1,024 ports
    )
    after = tiny.exits(7) if how == "end" else tiny.prints(b"on\n") + tiny.SPIN
    limit = ["--timeout", "1"] if how == "time limit" else []
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 8192)
    try:
        process = started(kernel(touches + after), "-v", *limit, stderr=writing)
        if how == "SIGTERM":
            read_until(process, b"on")  # it goes on
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == {"time limit": 124, "SIGTERM": 143, "end": 7}[how]
        assert process.stdout is not None
        process.stdout.close()
        lines = os.read(reading, 1 << 16).decode().splitlines()
        assert len(lines) > 10 and all(line.startswith("vmm: ") for line in lines)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("closed", [[0], [2], [0, 2]], ids=str)
def test_started_with_descriptors_closed(kernel: Make, closed: list[int]) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    ended, out, _ = vmm(
        kernel(tiny.prints(b"hi\n") + tiny.exits(9)), "-v", stdin=None, preexec_fn=close
    )
    assert (ended, out) == (9, "hi\n")


def test_all_descriptors_closed(kernel: Make) -> None:
    ended, _, _ = vmm(
        kernel(tiny.prints(b"hi\n") + tiny.exits(9)),
        "--console",
        "none",
        stdin=None,
        preexec_fn=lambda: os.closerange(0, 3),
    )
    assert ended == 9


def test_standard_error_on_a_closed_pipe(kernel: Make) -> None:
    """What is said with -v has no reader; the guest goes on."""
    reading, writing = os.pipe()
    os.close(reading)
    code = tiny.out(0x1234, 1) + tiny.prints(b"hi\n") + tiny.exits(9)
    ended, out, _ = vmm(kernel(code), "-v", stderr=writing)
    os.close(writing)
    assert (ended, out) == (9, "hi\n")


def test_console_file_and_none(kernel: Make, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a longer line of the run before\n")
    path = kernel(tiny.prints(b"hi\n") + tiny.exits(9))
    for console in (f"file:{log}", "none"):
        ended, out, _ = vmm(path, "--console", console)
        assert (ended, out) == (9, "")
    assert log.read_text() == "hi\n"


def test_console_on_a_full_disk(kernel: Make) -> None:
    ended, _, err = vmm(kernel(tiny.prints(b"hi\n") + tiny.exits(9)), "--console", "file:/dev/full")
    assert ended == 9
    assert err.startswith("vmm: console file:/dev/full: No space left on device; further output")


def test_console_pty(kernel: Make) -> None:
    process = started(kernel(tiny.ECHO), "--console", "pty")
    assert process.stderr is not None
    match = re.fullmatch(rb"vmm: console on (/dev/pts/\d+)\n", process.stderr.readline())
    assert match
    fd = os.open(match[1], os.O_RDWR | os.O_NOCTTY)
    os.write(fd, b"x\x01")  # no escape key here: it belongs to the program that is connected
    got = b""
    while not got.endswith(b"[x][\x01]"):
        assert select.select([fd], [], [], 60)[0], got
        got += os.read(fd, 100)
    os.write(fd, b"q")
    out, _ = process.communicate(timeout=60)
    os.close(fd)
    assert (process.returncode, out) == (7, b"")


# --- a person at a terminal -------------------------------------------------------------------


def test_terminal_keys(kernel: Make) -> None:
    with AtTerminal("run", kernel(tiny.ECHO)) as person:
        person.expect(b"ready\r\n")
        assert person.is_raw
        person.type(b"a\x03\r")  # Ctrl-C is the guest's
        person.expect(b"[a][\x03][\r]")
        person.type(b"\x01h")
        person.expect(b"Ctrl-A x   end the machine now\r\n")
        person.expect(b"Ctrl-A h   this help\r\n")
        person.type(b"\x01c")
        person.expect(b"[B]")
        person.type(b"\x01\x01\x01a")
        person.expect(b"[\x01][\x01]")
        person.type(b"\x01zb")
        person.expect(b"[b]")
        person.type(b"\x01x")
        assert person.wait() == errors.EXIT_INTERRUPTED
        assert person.is_restored
        # On a line of its own.
        assert b"\r\nvmm: ended from the keyboard (Ctrl-A x) (status 130)\r\n" in person.output


def test_a_paused_guest_is_told_after_its_last_words(kernel: Make) -> None:
    code = tiny.prints(b"oops") + tiny.PANIC + HALT
    with AtTerminal("run", kernel(code), "--on-panic", "pause") as person:
        person.expect(b"oops\r\nvmm: the guest's kernel panicked; it is paused (SIGINT or Ctrl-A x")
        person.type(b"\x01x")
        assert person.wait() == errors.EXIT_INTERRUPTED
        assert person.is_restored


def test_help_shows_while_the_guest_prints(kernel: Make) -> None:
    flood = tiny.prints(b"ready") + tiny.out(0x3F8, ord("x")) + b"\xeb\xf7"  # 1: ...; jmp 1b
    with AtTerminal("run", kernel(flood)) as person:
        person.expect(b"ready")
        person.type(b"\x01h")
        person.expect(b"Ctrl-A h   this help\r\n")
        person.type(b"\x01x")
        assert person.wait() == errors.EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        (tiny.prints(b"\nhi") + tiny.POWEROFF + HALT, 0, b"hi"),
        (tiny.exits(42), 42, b"vmm: the guest wrote 42 to the exit port (status 42)\r\n"),
        (tiny.TRIPLE_FAULT, 121, b"vmm: triple fault"),
    ],
    ids=["poweroff", "exit port", "triple fault"],
)
def test_terminal_is_restored_at_the_end(
    kernel: Make, code: bytes, status: int, says: bytes
) -> None:
    with AtTerminal("run", kernel(code)) as person:
        assert person.wait() == status
        assert person.is_restored
        assert says in person.output


@pytest.mark.parametrize(
    ("signums", "status"),
    [
        ([signal.SIGTERM] * 2, 143),
        ([signal.SIGTERM] * 6, 143),  # impatience must not leave the terminal raw
        ([signal.SIGINT] * 5, 130),
        ([signal.SIGHUP], 129),
        ([signal.SIGQUIT], -signal.SIGQUIT),
        ([signal.SIGUSR1], -signal.SIGUSR1),
        ([signal.SIGALRM], -signal.SIGALRM),
        ([signal.SIGABRT], -signal.SIGABRT),
    ],
)
def test_terminal_is_restored_after_signals(kernel: Make, signums: list[int], status: int) -> None:
    with AtTerminal("run", kernel(tiny.prints(b"ready\n") + HALT)) as person:
        person.expect(b"ready")
        assert person.is_raw
        for signum in signums:
            person.kill(signum)
            time.sleep(0.02)
        # One that comes after all is given back takes the process as ever; to a shell, the same.
        late = [-signum for signum in signums[1:]]
        assert person.wait() in (status, *late)
        assert person.is_restored


def test_the_terminal_is_raw_again_after_a_stop(kernel: Make) -> None:
    """kill -STOP, then `fg`: the shell had the terminal, in modes of its own."""
    with AtTerminal("run", kernel(tiny.ECHO)) as person:
        person.expect(b"ready")
        person.kill(signal.SIGSTOP)
        os.waitpid(person.pid, os.WUNTRACED)
        termios.tcsetattr(person.slave, termios.TCSANOW, person.before)
        assert not person.is_raw
        person.kill(signal.SIGCONT)
        deadline = time.monotonic() + 30
        while not person.is_raw:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        person.type(b"q")
        assert person.wait() == 7
        assert person.is_restored


@pytest.mark.parametrize(
    ("term", "options", "words", "missing"),
    [
        (
            "xterm-256color",
            [],
            ["TERM=xterm-256color", "systemd.tty.term.ttyS0=xterm-256color"],
            [],
        ),
        ("xterm", ["--console", "hvc"], ["systemd.tty.term.hvc0=xterm"], ["ttyS0=xterm"]),
        ("xterm", ["--append", "TERM=linux"], ["TERM=linux"], ["TERM=xterm"]),
        ("x y", [], ["systemd.tty.rows.ttyS0=31"], ["TERM", "tty.term"]),
        ("xterm", ["--console", "none"], [], ["TERM", "tty.rows"]),
    ],
)
def test_the_terminal_is_named_to_the_guest(
    kernel: Make, term: str, options: list[str], words: list[str], missing: list[str]
) -> None:
    path = kernel(tiny.exits(0))
    with AtTerminal("run", "-v", *options, path, term=term) as person:
        termios.tcsetwinsize(person.slave, (31, 90))
        assert person.wait() == 0
        line = re.search(r"command line: (.*)", person.output.decode())
        assert line is not None
        for word in words:
            assert word in line[1]
        for word in missing:
            assert word not in line[1]
        if not missing:
            assert "systemd.tty.rows.ttyS0=31 systemd.tty.columns.ttyS0=90" in line[1]


def test_terminal_is_untouched_by_a_failed_start(tmp_path: Path) -> None:
    with AtTerminal("run", str(tmp_path / "nosuch")) as person:
        assert person.wait() == errors.EXIT_USAGE
        assert person.is_restored
        assert b"no such file\r\n" in person.output


def has_open(pid: int, name: str) -> bool:
    """Whether a descriptor of process `pid` leads to something with `name` in its name."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if name in os.readlink(f"/proc/{pid}/fd/{fd}"):
                return True
    return False


def test_ctrl_c_before_the_guest_runs(tmp_path: Path, kernel: Make) -> None:
    """While a large initrd is read: nothing is raw yet, and nothing is traced back."""
    initrd = tmp_path / "initrd"
    with open(initrd, "wb") as file:
        file.truncate(1 << 30)
    process = started("--memory", "1100M", "--initrd", str(initrd), kernel(HALT))
    while process.poll() is None and not has_open(process.pid, "kvm"):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == errors.EXIT_INTERRUPTED
    assert out == b"" and b"Traceback" not in err


# --- what is said -------------------------------------------------------------------------------


def test_verbose(kernel: Make) -> None:
    ended, out, err = vmm(
        kernel(tiny.out(0x1234, 1) + tiny.POWEROFF + HALT),
        *("-v", "--append", "quiet", "--append", "x=y \udcff", "--cpus", "2"),
    )
    assert (ended, out) == (0, "")
    lines = err.splitlines()
    assert all(line.startswith("vmm: ") for line in lines)
    assert lines[0] == "vmm: 2 vCPU (host), 16 MiB of memory"
    assert any(re.fullmatch("vmm: starts at 0x100000, .*", line) for line in lines)
    assert any(
        re.fullmatch(r"vmm: command line: console=ttyS0 .*quiet x=y \\udcff", line)
        for line in lines
    )
    assert any("0x1234" in line for line in lines)
    assert lines[-1] == "vmm: the guest powered off (status 0)"


SCRIPT = Path(sys.prefix, "bin", "vmm")


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS), ["-h"]],
)
def test_help_and_version(arguments: list[str]) -> None:
    done = tiny.run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("usage: vmm", f"vmm {__version__}\n"))
    if SCRIPT.exists():
        script = subprocess.run(
            [SCRIPT, *arguments], capture_output=True, text=True, env=tiny.environment(), check=True
        )
        assert (script.stdout, script.stderr) == (done.stdout, "")


def test_help_lists_options_and_statuses() -> None:
    text = tiny.run("run", "--help").stdout
    for option in (
        *("--initrd FILE", "--append CMDLINE", "--memory SIZE", "--cpus N", "--cpu POLICY"),
        *("--console WHERE", "--boot HOW", "--no-acpi", "--timeout S", "--on-panic ACTION"),
        *("-v, --verbose", "-h, --help", "KERNEL"),
    ):
        assert option in text, option
    others = tiny.run("exec", "--help").stdout  # where the status is of a command in the guest
    for name, value in vars(errors).items():
        if name.startswith("EXIT_"):
            assert re.search(rf"\b{value} ", others if name == "EXIT_AGENT" else text), name
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_answers_that_cannot_be_written(arguments: list[str]) -> None:
    """Not 120, Python's own for this: it is a guest's panic here."""
    with open("/dev/full", "wb") as full:
        done = tiny.run(*arguments, stdout=full)
    assert done.returncode == errors.EXIT_HOST
    assert done.stderr == "vmm: standard output: No space left on device\n"
    reading, writing = os.pipe()
    os.close(reading)
    done = tiny.run(*arguments, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_both_ways_to_call_it(kernel: Make) -> None:
    if not SCRIPT.exists():
        pytest.skip("vmm is not installed beside this Python")
    path = kernel(tiny.prints(b"hi\n") + tiny.exits(9))
    script = subprocess.run(
        [SCRIPT, "run", path],
        capture_output=True,
        text=True,
        env=tiny.environment(),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert (script.returncode, script.stdout, script.stderr) == vmm(path)


@pytest.mark.parametrize(
    "order",
    ["run KERNEL --cpus 2 --memory 16M", "run --cpus=2 --memory=16M KERNEL", "run -v -- KERNEL"],
)
def test_option_order(kernel: Make, order: str) -> None:
    path = kernel(tiny.exits(9))
    assert tiny.run(*order.replace("KERNEL", path).split()).returncode == 9


def test_a_value_may_begin_with_a_dash(kernel: Make) -> None:
    _, _, err = vmm(kernel(tiny.exits(9)), "-v", "--append", "-- -x", "--append", "-s")
    assert re.search(r"^vmm: command line: .* -- -x -s$", err, re.M), err


def test_verbose_lists_devices_with_address_and_interrupt(kernel: Make, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    options = ("--drive", f"{disk},format=raw", "--rng", "-v")
    guest = kernel(tiny.exits(9))
    _, _, err = vmm(guest, *options)
    assert "vmm: virtio device blk0 at 0xd0000000, GSI 16\n" in err
    assert "vmm: virtio device rng at 0xd0001000, GSI 17\n" in err
    assert "virtio_mmio.device" not in err
    _, _, err = vmm(guest, *options, "--no-acpi", "--append", "x=y -- z")
    assert "vmm: virtio device blk0 at 0xd0000000, GSI 5\n" in err
    line = "virtio_mmio.device=512@0xd0000000:5 virtio_mmio.device=512@0xd0001000:6 x=y -- z\n"
    assert line in err
    _, _, err = vmm(guest, *options, "--cmdline-devices")
    assert "virtio_mmio.device=512@0xd0000000:16 virtio_mmio.device=512@0xd0001000:17\n" in err
    _, _, err = vmm(guest, *options, "--transport", "pci", "--no-acpi")
    assert "vmm: virtio device blk0 at PCI 00:01.0, MSI-X\n" in err
    assert "vmm: virtio device rng at PCI 00:02.0, MSI-X\n" in err
    assert "virtio_mmio.device" not in err
