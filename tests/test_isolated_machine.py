"""vmm/isolated: `Machine(config, isolate=True)`, a machine in a process of its own."""

from __future__ import annotations

import gc
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import projects, tiny
from tests.support.bare import until
from vmm import (
    AsyncMachine,
    GuestMemoryError,
    HostError,
    Machine,
    MachineConfig,
    StateError,
    UsageError,
)
from vmm.events import Event, Stopped
from vmm.isolated import machine as isolated_machine
from vmm.isolated import memory, nursery, parts
from vmm.isolated.machine import IsolatedMachine
from vmm.kvm.vcpu import Vcpu
from vmm.machine import exits
from vmm.memory import GuestMemory

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

MIB = 1 << 20
Make = Callable[..., IsolatedMachine]


@pytest.fixture(scope="module", autouse=True)
def no_zygote_is_left() -> Iterator[None]:
    yield
    nursery.end()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes machines in processes of their own; all are closed, and nothing is left of them."""
    nursery.start().close()  # the zygote stays
    before = held()
    made: list[IsolatedMachine] = []

    def make_one(code: bytes = tiny.ECHO, **options: object) -> IsolatedMachine:
        values: dict[str, Any] = {"memory": 16 * MIB, **options}
        machine = Machine(MachineConfig(tiny.kernel(tmp_path, code), **values), isolate=True)
        assert isinstance(machine, IsolatedMachine)
        made.append(machine)
        return machine

    yield make_one
    for machine in made:
        machine.close()
    nursery.start().close()
    gc.collect()
    assert held() == before


def held() -> tuple[list[str], int]:
    """Kinds of descriptors, and threads."""
    kinds = [re.sub(r"\d+", "N", each.partition(" ")[2]) for each in tiny.descriptors()]
    return sorted(kinds), threading.active_count()


def pid_of(m: IsolatedMachine) -> int:
    return m.process.process.pid


# --- what it has of Machine -----------------------------------------------------------------------


SAME_HERE = {
    "bind_vsock", "emit", "event_log", "events", "exit", "faults", "get", "has_run", "isolated",
    "listen", "monitor_failed", "need", "on_close", "panic_seen", "popen", "put", "restore", "run",
    "shutdown", "state", "subscribe", "wait", "wait_for", "wait_for_agent", "device_error",
}  # fmt: skip
"""Names of Machine that are made of others, all of this process."""


@pytest.mark.parametrize(
    ("kind", "of", "same"),
    [
        (IsolatedMachine, Machine, SAME_HERE),
        (memory.IsolatedMemory, GuestMemory, {"size", "base", "at_close", "leave"}),
        (parts.IsolatedVcpu, Vcpu, {"number", "fd", "kvm_run", "run_map", "vm"}),
    ],
)
def test_each_name_is_carried_or_refused(kind: type, of: type, same: set[str]) -> None:
    """A new public call of Machine is not silently made on what is not there."""
    public = {name for name, _ in inspect.getmembers(of) if not name.startswith("_")}
    assert {name for name in public if name not in vars(kind)} - same == set()


def test_it_is_a_machine(make: Make) -> None:
    with make(tiny.ECHO) as m:
        assert isinstance(m, Machine)
        assert m.isolated and not Machine.isolated
        assert repr(m).startswith("<Machine created: ")
        assert repr(m).endswith(f"process {pid_of(m)}>")
        assert pid_of(m) != os.getpid()


def test_registers_and_memory(make: Make) -> None:
    with make(tiny.COUNTING, cpus=2) as m:
        data = os.urandom(3 * MIB + 5)
        m.memory.write(4 * MIB - 3, data)
        assert m.memory.read(4 * MIB - 3, len(data)) == data
        m.memory.fill(4 * MIB, 100, 7)
        m.memory.write_u16(4 * MIB + 1, 0xABCD)
        assert m.memory.read(4 * MIB, 4) == b"\x07\xcd\xab\x07"
        assert m.memory.read_u64(4 * MIB + 50) == 0x0707070707070707
        assert m.memory.contains(16 * MIB - 1) and not m.memory.contains(16 * MIB)
        with pytest.raises(GuestMemoryError) as caught:
            m.memory.read(16 * MIB - 1, 2)
        assert (caught.value.gpa, caught.value.size) == (16 * MIB - 1, 2)
        m.start()
        until(lambda: m.memory.read_u32(tiny.COUNTER) > 10)
        m.pause()
        vcpu = m.vcpus[0]
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        assert 0x100000 <= regs.rip < 0x100100
        assert sregs.cs.db == 1
        regs.r15 = 0x1122334455667788
        vcpu.set_regs(regs)
        assert vcpu.get_regs().r15 == 0x1122334455667788
        assert vcpu.get_msrs([0x10])[0x10] > 0
        assert len(vcpu.get_xsave()) >= 4096
        assert vcpu.get_mp_state() == 0
        vcpu.set_fpu(vcpu.get_fpu())
        with pytest.raises(StateError, match=r"vcpus\[\].run: the machine has a process of its"):
            vcpu.run()
        with pytest.raises(StateError, match=r"vcpus\[\].kvm_run: "):
            _ = vcpu.kvm_run


def test_checkpoints_and_the_end_again(make: Make) -> None:
    with make(tiny.ECHO) as m:
        m.start()
        m.wait_for("ready", timeout=60)
        m.checkpoint()
        for _ in range(3):
            m.send("q")
            assert m.wait(60).status == 7
            assert m.state == "stopped"
            m.rollback()
            assert (m.state, m.exit) == ("paused", None)
            m.resume()
            m.send("x")
            m.wait_for("[x]", timeout=60)


def test_a_snapshot_and_a_machine_of_it(make: Make, tmp_path: Path) -> None:
    with make(tiny.ECHO, balloon=0) as m:
        m.start()
        m.wait_for("ready", timeout=60)
        m.memory.write(8 * MIB, b"kept")
        m.snapshot(tmp_path / "snap")
    with Machine.restore(tmp_path / "snap", isolate=True, timeout=100.0) as again:
        assert isinstance(again, IsolatedMachine)
        assert (again.state, again.restored, again.config.balloon) == ("created", True, 0)
        assert again.config.timeout == 100.0
        assert again.memory.read(8 * MIB, 4) == b"kept"
        again.start()
        again.send("y")
        again.wait_for("[y]", timeout=60)
    with pytest.raises(UsageError, match="nosuch"):
        Machine.restore(tmp_path / "nosuch", isolate=True)


def test_a_working_directory_that_changes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are those of the directory the program was in."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        m = make(console="file:console", ports=["name=a,socket=port"])
        m.start()
        m.wait_for("ready", timeout=60)
        monkeypatch.chdir("/")
        assert m.config.console == f"file:{tmp_path}/{name}/console"
        assert (tmp_path / name / "port").is_socket()
        m.close()
        assert not (tmp_path / name / "port").exists()
        assert (tmp_path / name / "console").read_bytes() == b"ready\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"console": "auto"}, "--console auto: this process's terminal"),
        ({"console": "hvc"}, "--console hvc: this process's terminal"),
        ({"nets": ["lan=a"]}, "a LAN joins machines of one process"),
        ({"devices": [list]}, "devices: a program's own devices cannot be in a process"),
    ],
)
def test_what_cannot_be(make: Make, options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make(**options)


def test_what_is_not_carried_says_so(make: Make) -> None:
    class Mine(Machine):
        pass

    with make() as m:
        for name in ("platform", "kvm", "vm"):
            with pytest.raises(StateError, match=f"^{name}: the machine has a process of its own"):
                getattr(m, name)
        with pytest.raises(StateError, match=r"^clone: a machine in a process of its own"):
            m.clone()
        for call in (lambda: m.memory.view(0, 1), lambda: m.memory.regions):
            with pytest.raises(StateError, match=r"^memory.*use read and write"):
                call()
        with pytest.raises(UsageError, match="isolate=True is for Machine"):
            Mine(m.config, isolate=True)
    for call in (m.checkpoint, m.rollback, m.pause, lambda: m.memory.read(0, 1)):
        with pytest.raises((StateError, GuestMemoryError), match="closed"):
            call()


def test_wrong_values_are_told_as_ever(make: Make, tmp_path: Path) -> None:
    for options, error, says in (
        ({"cpu": "nosuch"}, UsageError, "nosuch"),
        ({"drives": [tmp_path / "nosuch.img"]}, UsageError, "nosuch.img"),
        ({"device": "/dev/null"}, HostError, "/dev/null"),
    ):
        with pytest.raises(error, match=says) as caught:
            make(**options)
        assert "\n" not in str(caught.value)


def test_what_the_program_asks_for_is_done_later(make: Make, tmp_path: Path) -> None:
    """Snapshots with their bases, checkpoints of disks with overlays, files that grow."""
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(MIB))
    kernel = tiny.kernel(tmp_path, tiny.ECHO)
    config = MachineConfig(kernel, memory=16 * MIB, drives=[f"{disk},snapshot"])
    with Machine(config, isolate=True) as m:
        m.start()
        m.wait_for("ready", timeout=60)
        m.snapshot(tmp_path / "one", track=True)
        m.memory.write(8 * MIB, b"changed")
        m.snapshot(tmp_path / "deep" / "er" / "two", base=tmp_path / "one")
        for _ in range(2):
            m.checkpoint()
            m.rollback()
        m.faults.disk(0).fail(nth=1).clear()
    assert (tmp_path / "one" / "memory").exists()
    with Machine.restore(tmp_path / "deep" / "er" / "two", isolate=True, verify=True) as m:
        assert m.memory.read(8 * MIB, 7) == b"changed"
        m.start()
        m.send("x")
        m.wait_for("[x]", timeout=60)
        m.checkpoint()
        m.rollback()
    grown = tmp_path / "grown"
    grown.write_bytes(bytes(MIB))
    with Machine(MachineConfig(kernel, memory=16 * MIB, drives=[str(grown)]), isolate=True) as m:
        m.start()
        assert m.virtio_device("blk0").resize(2 * MIB) == 2 * MIB
    assert grown.stat().st_size == 2 * MIB


# --- events and functions of the program ----------------------------------------------------------


def test_listeners_are_called_here(make: Make) -> None:
    heard: list[Event] = []
    threads = set()
    with make(tiny.prints(b"one\ntwo\n") + tiny.exits(3)) as m:

        def listen(event: Event) -> None:
            threads.add(threading.get_ident())
            heard.append(event)

        m.subscribe(listen)
        with m.events(history=True) as stream:
            m.start()
            assert m.wait(60).status == 3
            assert [str(event) for event in stream] == [str(event) for event in heard]
        assert [event.name for event in heard] == ["started", "console", "console", "stopped"]
        assert len(threads) == 1
        assert m.console.text() == "one\ntwo\n"


def test_a_listener_may_pause_and_end_it(make: Make) -> None:
    with make(tiny.prints(b"now\n") + tiny.SPIN) as m:
        end = exits.MachineExit(exits.STOPPED, "enough", status=9)

        def listen(event: Event) -> None:
            if event.name == "console":
                m.pause()
                m.end(end)

        m.subscribe(listen)
        m.start()
        assert m.wait(60) is end


def test_what_a_listener_raises_ends_it(make: Make) -> None:
    with make(tiny.prints(b"now\n") + tiny.SPIN) as m:
        m.subscribe(lambda event: {}[event.name] if event.name == "console" else None)
        m.start()
        ended = m.wait(60)
        assert ended.kind == exits.MONITOR_ERROR
        assert "KeyError" in ended.message and "Traceback" in ended.report


def test_a_slow_function_of_the_program_is_waited_for(make: Make) -> None:
    """A process that waits for the program is not late; one that runs on is."""
    code = bytes.fromhex("66ba1005 ed 66baf400 ee f4")  # in eax, 0x510; out 0xf4, al
    began, go_on = threading.Event(), threading.Event()

    def read(offset: int, size: int) -> int:
        began.set()
        go_on.wait(60)
        return 42

    with make(code) as m:
        m.bind_port(0x510, 4, read=read)
        m.start()
        assert began.wait(60)
        threading.Timer(2.0, go_on.set).start()
        m.pause()  # which waits for the vCPU
        m.resume()
        assert m.wait(60).status == 42


def test_functions_on_vsock(make: Make) -> None:
    """The connection itself is handed over: what is no socket is not taken for one."""
    with make(vsock="cid=9") as m:
        unbind = m.bind_vsock(1024, lambda sock: None)
        with pytest.raises(UsageError, match="port 1024 is bound already"):
            m.bind_vsock(1024, lambda sock: None)
        unbind()
        m.bind_vsock(1024, lambda sock: None)
    read, write = os.pipe()
    with pytest.raises(parts.WireError, match="no socket"):
        parts.connection(read)
    os.close(write)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read)


async def _life(config: MachineConfig) -> str:
    async with AsyncMachine(config, isolate=True) as m:
        assert m.machine.isolated
        await m.start()
        line = await m.wait_for("ready", timeout=60)
        await m.pause()
        await m.stop()
        return line


def test_with_asyncio(make: Make) -> None:
    import asyncio

    config = make().config
    assert asyncio.run(_life(config)) == "ready"


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSEGV", "SIGBUS", "SIGABRT"])
def test_a_crash_is_an_event(make: Make, tmp_path: Path, number: str) -> None:
    path = tmp_path / "vsock"
    other = make(tiny.ECHO)
    other.start()
    m = make(tiny.ECHO, vsock=f"cid=5,path={path}", ports=[f"name=a,socket={tmp_path}/a"])
    heard: list[Event] = []
    m.subscribe(heard.append, Stopped)
    m.start()
    assert path.is_socket()
    os.kill(pid_of(m), signal.Signals[number])
    ended = m.wait(60)
    assert (ended.kind, ended.status, ended.ok) == (exits.CRASHED, 70, False)
    assert ended.message == f"the machine's process was killed by {number}"
    assert m.state == "stopped"
    assert len(heard) == 1
    assert not path.exists() and not (tmp_path / "a").exists()
    with pytest.raises(
        HostError, match=f"memory.read: the machine's process was killed by {number}"
    ):
        m.memory.read(0, 4)
    with pytest.raises(HostError, match="rollback"):
        m.rollback()
    assert m.stop() is ended
    m.close()
    assert m.exit is ended
    other.wait_for("ready", timeout=60)
    other.send("x")
    other.wait_for("[x]", timeout=60)


def test_an_answer_that_comes_late_does_not_bring_it_back(make: Make) -> None:
    """A call's answer may be dealt with after the end of the process is known."""
    m = make(tiny.SPIN)
    m.start()
    os.kill(pid_of(m), signal.SIGKILL)
    ended = m.wait(60)
    m.absorb([1 << 40, "running", "", None])
    assert (m.state, m.exit) == ("stopped", ended)
    m.close()
    m.absorb([1 << 41, "running", "", None])
    assert (m.state, m.exit) == ("closed", ended)


def test_one_that_was_never_started_and_is_gone(make: Make) -> None:
    m = make()
    os.kill(pid_of(m), signal.SIGKILL)
    until(lambda: m.state == "stopped")
    assert m.exit is not None and m.exit.kind == exits.CRASHED
    with pytest.raises(StateError, match="start: the machine is stopped"):
        m.start()


def test_whoever_waits_is_told(make: Make) -> None:
    m = make(tiny.SPIN)
    m.start()
    threading.Timer(0.2, os.kill, (pid_of(m), signal.SIGKILL)).start()
    with pytest.raises(Exception, match="closed without"):
        m.wait_for("never", timeout=60)


def test_sigstop_does_not_hold_the_program_up(make: Make) -> None:
    for call in ("pause", "stop", "close"):
        m = make(tiny.SPIN)
        m.start()
        os.kill(pid_of(m), signal.SIGSTOP)
        begun = time.monotonic()
        if call == "pause":
            with pytest.raises(HostError, match="did not answer pause within 1 s, and was killed"):
                m.pause()
            assert m.wait(60).kind == exits.CRASHED
        else:
            getattr(m, call)()
            assert m.exit is not None
        assert time.monotonic() - begun < 5  # 1 s, where the host does nothing else
        m.close()


PROGRAM = """
import os, sys, time
from vmm import Machine, MachineConfig
m = Machine(MachineConfig({kernel!r}, memory="16M", vsock="cid=9,path=v.sock"), isolate=True)
m.start()
zygote = m.process.process
print(m.process.process.pid, os.getpid(), flush=True)
{end}
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)", "sys.exit(3)", ""])
def test_it_ends_with_the_program(end: str, tmp_path: Path) -> None:
    text = PROGRAM.format(kernel=tiny.kernel(tmp_path, tiny.SPIN), end=end)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", text], cwd=tmp_path, env=tiny.environment(),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    pid, program = map(int, done.stdout.split())
    until(lambda: gone(pid))
    assert gone(program)
    if end in ("", "sys.exit(3)"):
        assert done.stderr.count("ResourceWarning: unclosed <Machine running: ") == 1
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "v.sock").exists()


def test_it_ends_with_the_zygote(make: Make) -> None:
    m = make(tiny.SPIN)
    m.start()
    zygote = nursery._zygotes[-1]
    os.kill(zygote.child.pid, signal.SIGKILL)
    assert m.wait(60).kind == exits.CRASHED
    with make() as again:  # of another zygote
        assert again.state == "created"
    m.close()
    until(lambda: zygote not in nursery._zygotes)


def test_forgotten_ones_are_told_of(make: Make, tmp_path: Path) -> None:
    m = Machine(MachineConfig(memory=16 * MIB), isolate=True)
    pid = m.process.process.pid  # type: ignore[attr-defined]
    forgotten = weakref.ref(m)
    with pytest.warns(ResourceWarning, match="unclosed <Machine created: "):
        del m
        # While another thread collects, collect() returns at once.
        until(lambda: gc.collect() >= 0 and forgotten() is None)
    until(lambda: gone(pid))
    until(lambda: "vmm-close" not in [thread.name for thread in threading.enumerate()])


def test_a_forked_child_has_closed_machines(make: Make) -> None:
    m = make(tiny.ECHO)
    m.start()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if m.state == "closed" and not nursery._zygotes else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    m.wait_for("ready", timeout=60)
    m.send("x")
    m.wait_for("[x]", timeout=60)


def test_other_limits_take_another_zygote(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process keeps of its parent is not a former state of the program's."""
    first = make(tiny.ECHO)
    zygote = nursery._zygotes[-1]
    kind = nursery._kind()
    monkeypatch.setattr(nursery, "_kind", lambda: (kind, "another user"))
    second = make(tiny.ECHO)
    assert nursery._zygotes == [zygote, nursery._zygotes[-1]]
    first.close()
    assert zygote not in nursery._zygotes  # it ends with its last machine
    until(lambda: zygote.child.pid == 0)
    second.close()
    nursery._zygotes.pop().close()
    monkeypatch.undo()


def test_the_process_has_nothing_of_the_programs(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither descriptors, nor memory, nor environment, nor other machines' connections."""
    monkeypatch.setenv("API_TOKEN", "s3cret")
    secret = tmp_path / "secret"
    secret.write_text("x")
    others = [make(), make()]
    with open(secret) as file:
        os.set_inheritable(file.fileno(), True)
        m = make(balloon=0)
        links = [os.readlink(path) for path in Path(f"/proc/{pid_of(m)}/fd").iterdir()]
    assert str(secret) not in links
    sockets = {link for link in links if link.startswith("socket:")}
    for other in others:
        theirs = [os.readlink(path) for path in Path(f"/proc/{pid_of(other)}/fd").iterdir()]
        assert not sockets & {link for link in theirs if link.startswith("socket:")}
    variables = Path(f"/proc/{pid_of(m)}/environ").read_bytes()
    assert b"PATH=" in variables and b"s3cret" not in variables
    maps = Path(f"/proc/{pid_of(m)}/maps").read_text()
    assert "pytest" not in maps
    assert isolated_machine.__file__ not in maps


PROJECT = """
pytestmark = pytest.mark.vmm(memory="16M", agent=False, isolate=True)

def test_one(booted_machine):
    assert booted_machine.isolated
    assert booted_machine.state == "running"

def test_two(restored_machine):
    assert restored_machine.isolated
    assert False, "to be seen in the report"
"""


def test_the_pytest_plugin(tmp_path: Path) -> None:
    """The marker `isolate`, and what a failure's report shows of such a machine."""
    project = projects.small(tmp_path)
    projects.write(project, projects.MARKED + PROJECT)
    done = projects.run_pytest(project, "--vmm-require")
    assert "1 failed, 1 passed" in done.stdout
    for title in ("events", "registers"):
        assert re.search(f"machine 0: {title}", done.stdout)
    assert "not to be had" not in done.stdout
    assert "CR3" in done.stdout.upper()
