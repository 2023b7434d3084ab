"""vmm/cli/supervise.py: which signals end a machine, when, and what is said of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import tiny
from vmm.cli import supervise
from vmm.errors import UsageError

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(120)]

SPINNING = tiny.prints(b"ready\n") + tiny.SPIN
PRESSED = (
    "vmm: SIGTERM: the guest's power button is pressed; the machine ends in {} s at the latest "
    "(--grace), or at another SIGTERM\n"
)


class Running:
    """`vmm run` with a guest that has said `ready`, in a process group of its own."""

    def __init__(self, directory: Path, code: bytes, *options: str, before: str = "") -> None:
        self.code = code
        command = tiny.command("run", "--memory", "16M", *options, tiny.kernel(directory, code))
        self.process = subprocess.Popen(
            [*before.split(), *command],
            env=tiny.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Running:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def kill(self, *signums: int) -> None:
        for signum in signums:
            os.kill(self.process.pid, signum)

    def said(self) -> str:
        """The next line on standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.readline().decode()

    def end(self) -> tuple[int, str]:
        """The status, and what was said since the last look."""
        err = self.process.communicate(timeout=60)[1]
        return self.process.returncode, err.decode()

    def runs(self, seconds: float) -> bool:
        """Whether it is still there after that long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False


def test_a_second_sigterm_counts_after_a_moment(tmp_path: Path) -> None:
    with Running(tmp_path, tiny.DEAF) as run:
        run.kill(signal.SIGTERM)
        assert run.said() == PRESSED.format(30)
        run.kill(signal.SIGTERM)
        run.kill(signal.SIGTERM)
        assert run.runs(supervise.MOMENT + 0.1)
        run.kill(signal.SIGTERM)
        assert run.end() == (143, "vmm: ended by SIGTERM (status 143)\n")


def test_grace_ends_a_guest_that_goes_on(tmp_path: Path) -> None:
    with Running(tmp_path, tiny.DEAF, "--grace", "0.7") as run:
        run.kill(signal.SIGTERM)
        assert run.said() == PRESSED.format(0.7)
        assert run.end() == (
            143,
            "vmm: ended by SIGTERM: the guest was still on after 0.7 s (--grace) (status 143)\n",
        )


def test_no_grace(tmp_path: Path) -> None:
    with Running(tmp_path, tiny.DEAF, "--grace", "0") as run:
        run.kill(signal.SIGTERM)
        assert run.end() == (143, "vmm: ended by SIGTERM (status 143)\n")


def test_grace_without_end(tmp_path: Path) -> None:
    with Running(tmp_path, tiny.DEAF, "--grace", "inf") as run:
        run.kill(signal.SIGTERM)
        assert "grace" not in run.said()
        assert run.runs(1.1)
        run.kill(signal.SIGTERM)
        assert run.end()[0] == 143


@pytest.mark.parametrize("value", ["-1", "soon", "nan", "1,5"])
def test_a_grace_that_is_none(value: str) -> None:
    with pytest.raises(UsageError, match=f"--grace '{value}' is not a number of seconds; say"):
        supervise.parse_grace(value)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--no-acpi"], "the guest has no ACPI, and so no power button (--no-acpi)"),
        ([], "no driver in the guest has taken its power button"),
    ],
)
@pytest.mark.parametrize(
    "code", [SPINNING, tiny.prints(b"ready\n") + tiny.HALT], ids=["spin", "hlt"]
)
def test_a_guest_that_cannot_see_the_button(
    tmp_path: Path, code: bytes, options: list[str], why: str
) -> None:
    with Running(tmp_path, code, *options) as run:
        run.kill(signal.SIGTERM)
        assert run.end() == (143, f"vmm: ended by SIGTERM: {why} (status 143)\n")


def test_a_paused_guest(tmp_path: Path) -> None:
    code = tiny.prints(b"ready\n") + tiny.PANIC + tiny.HALT
    with Running(tmp_path, code, "--on-panic", "pause") as run:
        assert "it is paused" in run.said()
        run.kill(signal.SIGTERM)
        assert run.end() == (143, "vmm: ended by SIGTERM: it is paused (status 143)\n")


def test_sighup_with_sigterm_is_one(tmp_path: Path) -> None:
    """systemd's SendSIGHUP=yes; a login session's end."""
    for signums in ((signal.SIGTERM, signal.SIGHUP), (signal.SIGHUP, signal.SIGTERM)):
        with Running(tmp_path, tiny.DEAF, "--grace", "0.5") as run:
            run.kill(signal.SIGSTOP, *signums, signal.SIGCONT)  # both wait for it
            assert run.said() == PRESSED.format(0.5)
            assert run.end()[0] == 143


@pytest.mark.one_lane  # an emulated host has not begun to run by then
@pytest.mark.parametrize("guest", ["polite", "deaf", "unaware"])
def test_timeout_1(tmp_path: Path, guest: str) -> None:
    """GNU timeout signals its child, then its process group, in which the child is."""
    code = {"polite": tiny.POLITE, "deaf": tiny.DEAF, "unaware": SPINNING}[guest]
    with Running(tmp_path, code, "--grace", "0.6", before="timeout --preserve-status 2") as run:
        status, err = run.end()
    if guest == "polite":
        assert status == 0
        assert err in ("", PRESSED.format(0.6))
    else:
        assert status == 143
        assert ("still on after 0.6 s" if guest == "deaf" else "no driver in the guest") in err


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_to_a_whole_pipeline(tmp_path: Path, signum: signal.Signals, status: int) -> None:
    """The reader of standard output ends by it, too: the signal counts, SIGTERM stays polite."""
    path = tmp_path / "status"
    command = " ".join(tiny.command("run", "--memory", "16M", tiny.kernel(tmp_path, tiny.POLITE)))
    trap = f"trap : {signum.name[3:]}"
    script = f"({trap}; {command}; echo $? > {path}) | tee {tmp_path}/out"
    with subprocess.Popen(
        ["bash", "-c", f"{trap}; {script}"],
        env=tiny.environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as shell:
        while not (tmp_path / "out").exists() or not (tmp_path / "out").read_bytes():
            assert shell.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        os.killpg(shell.pid, signum)
        shell.wait(60)
    until = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert path.read_text() == f"{status}\n"


def test_as_the_first_process_of_a_container(tmp_path: Path) -> None:
    """To process 1 of a PID namespace only signals with a handler are delivered."""
    before = "unshare --fork --pid --kill-child --mount-proc"
    if subprocess.run([*before.split(), "true"], check=False, capture_output=True).returncode:
        pytest.skip("no PID namespaces here")
    with Running(tmp_path, tiny.POLITE, before=before) as run:
        children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text()
        os.kill(int(children.split()[0]), signal.SIGTERM)
        assert run.end()[0] == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_machine_is_built(tmp_path: Path, signum: signal.Signals) -> None:
    """Nothing is left behind: the socket of a port, a socket of vsock."""
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as file:
        file.truncate(400 << 20)  # takes a while to load
    process = subprocess.Popen(
        tiny.command(
            *("run", "--port", f"name=p,socket={tmp_path}/p"),
            *("--vsock", f"cid=3,path={tmp_path}/v", "--initrd", str(initrd)),
            *("--memory", "512M"),
            tiny.kernel(tmp_path, tiny.SPIN),
        ),
        env=tiny.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "p").exists() or not (tmp_path / "v").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signum)
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 128 + signum
    assert err == (
        f"vmm: ended by {signum.name}, before the machine had started (status {128 + signum})\n"
    )
    assert not (tmp_path / "p").exists()
    assert not (tmp_path / "v").exists()


def test_a_signal_while_building_waits_for_another_program(tmp_path: Path) -> None:
    """A vhost-user back end that accepts and never answers."""
    path = str(tmp_path / "silent")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        process = subprocess.Popen(
            tiny.command("run", "--vhost-user-blk", path, tiny.kernel(tmp_path, tiny.SPIN)),
            env=tiny.environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        client = listener.accept()[0]
        client.recv(1)
        for _ in range(2):  # timeout(1)
            process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=supervise.BUILDING_MAX + 5)[1].decode()
        client.close()
    says = "vmm: ended by SIGTERM, before the machine had started (status 143)\n"
    assert (process.returncode, err) == (143, says)


def test_what_is_said_is_one_line_each(tmp_path: Path) -> None:
    with Running(tmp_path, tiny.DEAF, "--grace", "0.3") as run:
        run.kill(signal.SIGTERM)
        status, err = run.end()
    assert status == 143
    assert re.fullmatch(r"(vmm: [^\n]+\n){2}", err)
