"""The life of a Machine: its states, what each call does in each, and that nothing is left."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import host, tiny
from tests.support.tiny import HALT
from vmm import (
    ConsoleClosed,
    HostError,
    Machine,
    MachineConfig,
    StateError,
    UsageError,
    errors,
)
from vmm.devices.device import Device
from vmm.isolated import nursery
from vmm.machine import exits
from vmm.virtio.device import VirtioDevice
from vmm.virtio.rng import Entropy

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(120)]

MIB = 1 << 20
IDLE = tiny.prints(b"ready\n") + HALT

Make = Callable[..., Machine]


@pytest.fixture(scope="module", autouse=True)
def no_zygote_is_left() -> Iterator[None]:
    yield
    nursery.end()


@pytest.fixture
def machine(tmp_path: Path, isolate: bool) -> Make:
    """Makes machines that run the code given; the test closes them (`with`)."""
    if isolate:
        nursery.start().close()  # who counts descriptors counts the zygote's

    def make(code: bytes, **options: object) -> Machine:
        values: dict[str, object] = {"memory": 16 * MIB, **options}
        config = MachineConfig(tiny.kernel(tmp_path, code), **values)  # type: ignore[arg-type]
        return Machine(config, isolate=isolate)

    return make


HERE_ONLY = (
    "test_a_device_can_have_it_paused", "test_a_virtio_device_by_its_name",
    "test_a_bug_in_a_device_ends_the_machine_with_its_traceback",
    "test_200_machines_leave_nothing", "test_running_out_of_descriptors_leaves_nothing",
    "test_without_a_kernel_the_program_sets_the_registers", "test_stopped_right_after_the_start",
)  # fmt: skip
"""Tests of what only a machine of this process has."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test with a machine of this process, and with one in a process of its own."""
    if "isolate" in metafunc.fixturenames:
        ways: list[Any] = [pytest.param(False, id="here")]
        if metafunc.function.__name__ not in HERE_ONLY:
            ways.append(pytest.param(True, id="isolated", marks=pytest.mark.one_lane))
        metafunc.parametrize("isolate", ways)


def never_ends(m: Machine) -> bool:
    try:
        m.wait(0.2)
    except TimeoutError:
        return True
    return False


class Stuck(VirtioDevice):
    """A device that is told when the machine goes on."""

    def __init__(self) -> None:
        super().__init__("stuck")
        self.told = 0

    def resumed(self) -> None:
        self.told += 1


# --- states ---------------------------------------------------------------------------------------


def test_the_states_in_turn(machine: Make) -> None:
    m = machine(IDLE)
    events: list[str] = []
    with m:
        m.listen(events.append)
        assert (m.state, m.exit) == ("created", None)
        m.start()
        assert m.state == "running"
        assert m.console.wait_for("ready", timeout=60) == "ready"
        m.pause()
        assert m.state == "paused"
        m.resume()
        assert m.state == "running"
        ended = m.stop()
        assert m.state == "stopped"
        assert m.exit is ended is m.wait() is m.stop()
        assert (ended.kind, ended.status) == (exits.STOPPED, errors.EXIT_INTERRUPTED)
        assert not ended.ok
    assert m.state == "closed"
    assert m.exit is ended is m.wait() is m.stop()
    assert m.state == "closed"
    assert events == ["started", "paused", "resumed", "stopped"]
    m.close()


def test_a_device_can_have_it_paused(machine: Make) -> None:
    """As from its worker's thread; nobody waits for the vCPUs."""
    events: list[str] = []
    with machine(tiny.SPIN, cpus=2, devices=[Stuck]) as m:
        assert m.platform.virtio is not None
        device = m.platform.virtio.transports[0].device
        assert isinstance(device, Stuck)
        m.listen(events.append)
        device.on_stop("too early")
        m.start()
        for count in (1, 2):
            device.on_stop("stuck: no space")
            device.on_stop("stuck: another")
            assert (m.state, m.paused_for) == ("paused", "stuck: no space")
            m.resume()
            assert (m.state, m.paused_for, device.told) == ("running", "", count)
    assert events == ["started", *["paused", "resumed"] * 2, "stopped"]


def test_a_virtio_device_by_its_name(machine: Make) -> None:
    with machine(IDLE, rng="rate=1K") as m:
        device = m.virtio_device("rng")
        assert isinstance(device, Entropy)
        assert device.limit.rates == (1024, 0)
        with pytest.raises(StateError, match="no virtio device 'blk0'; it has rng"):
            m.virtio_device("blk0")
    with machine(IDLE) as m, pytest.raises(StateError, match="it has no virtio devices"):
        m.virtio_device("blk0")


CALLS: dict[str, Callable[[Machine], object]] = {
    "start": Machine.start,
    "pause": Machine.pause,
    "resume": Machine.resume,
    "shutdown": lambda m: m.shutdown(1),
    "wait": lambda m: m.wait(1),
    "stop": Machine.stop,
    "press_power_button": Machine.press_power_button,
    "vcpus": lambda m: m.vcpus,
    "send": lambda m: m.send("x"),
}
BEFORE: dict[str, Callable[[Machine], object]] = {
    "created": lambda m: None,
    "running": lambda m: m.start(),
    "paused": lambda m: (m.start(), m.pause()),
    "stopped": lambda m: (m.start(), m.stop()),
    "closed": lambda m: m.close(),
}
WRONG = {
    "start": ("running", "paused", "stopped", "closed"),
    "pause": ("created", "paused", "stopped", "closed"),
    "resume": ("created", "running", "stopped", "closed"),
    "shutdown": ("created", "stopped", "closed"),
    "wait": ("created", "closed"),
    "stop": ("closed",),
    "press_power_button": ("created", "closed"),
    "vcpus": ("running", "closed"),
    "send": ("created", "stopped", "closed"),
}


@pytest.mark.parametrize(
    ("call", "state"), [(call, state) for call, states in WRONG.items() for state in states]
)
def test_a_call_in_the_wrong_state_changes_nothing(machine: Make, call: str, state: str) -> None:
    with machine(HALT) as m:
        BEFORE[state](m)
        with pytest.raises(StateError, match=f"{call}: the machine is {state}"):
            CALLS[call](m)
        assert m.state == state


@pytest.mark.parametrize("state", ["created", "running", "paused", "stopped"])
@pytest.mark.parametrize("cpus", [1, 3])
def test_a_clean_stop_in_every_state(machine: Make, state: str, cpus: int) -> None:
    before = tiny.descriptors(), threading.active_count()
    m = machine(tiny.SPIN, cpus=cpus)
    BEFORE[state](m)
    assert m.stop().kind == exits.STOPPED
    assert m.state == "stopped"
    m.close()
    m.close()
    assert (tiny.descriptors(), threading.active_count()) == before


@pytest.mark.parametrize("state", ["created", "running", "paused", "stopped"])
def test_an_exception_inside_with_closes(machine: Make, state: str) -> None:
    before = tiny.descriptors(), threading.active_count()
    with pytest.raises(ZeroDivisionError), machine(tiny.SPIN) as m:
        BEFORE[state](m)
        _ = 1 // 0
    assert m.state == "closed"
    assert (m.exit is None) == (state == "created")
    assert (tiny.descriptors(), threading.active_count()) == before


def test_stopped_right_after_the_start(machine: Make) -> None:
    """A thread may be kicked before it has run its first line: with this interval, often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            with machine(tiny.SPIN, cpus=3) as m:
                m.start()
                m.stop()
    finally:
        sys.setswitchinterval(interval)


# --- pause and resume -----------------------------------------------------------------------------


def test_nothing_runs_while_paused(machine: Make) -> None:
    with machine(tiny.COUNTING) as m:
        m.start()
        last = 0
        for _ in range(5):
            deadline = time.monotonic() + 60
            while m.memory.read_u32(tiny.COUNTER) == last:
                assert time.monotonic() < deadline, "the guest does not count"
            m.pause()
            last = m.memory.read_u32(tiny.COUNTER)
            time.sleep(0.02)
            assert m.memory.read_u32(tiny.COUNTER) == last
            assert m.vcpus[0].get_regs().rip in (tiny.ENTRY, tiny.ENTRY + 6)
            m.resume()


def test_pause_and_resume_many_times(machine: Make) -> None:
    """No kick is lost, none comes too late: a wrong one would hang this or end the process."""
    with machine(tiny.SPIN, cpus=2) as m:
        m.start()
        for _ in range(200):
            m.pause()
            m.resume()
        assert m.state == "running"


def test_paused_while_it_prints(machine: Make) -> None:
    with machine(tiny.out(0x3F8, ord("x")) + b"\xeb\xf7") as m:
        m.start()
        m.console.wait_for("x", timeout=60)
        m.pause()
        printed = m.console.position
        time.sleep(0.05)
        assert m.console.position == printed
        m.resume()
        m.console.wait_for("x", timeout=60, since=printed)


def test_stopped_while_paused_does_not_run_on(machine: Make) -> None:
    with machine(tiny.COUNTING) as m:
        m.start()
        m.pause()
        count = m.memory.read_u32(tiny.COUNTER)
        m.stop()
        assert m.memory.read_u32(tiny.COUNTER) == count


def test_the_guest_may_end_while_it_is_paused(machine: Make) -> None:
    """The two race; whichever is first, both calls return and the states agree."""
    for _ in range(20):
        with machine(tiny.exits(5)) as m:
            m.start()
            try:
                m.pause()
            except StateError:
                assert m.state == "stopped"
            if m.state == "paused":
                m.resume()
            assert m.wait(60).status == 5


# --- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        (tiny.exits(0), exits.EXIT_PORT, 0),
        (tiny.exits(200), exits.EXIT_PORT, 200),
        (tiny.POWEROFF + HALT, exits.POWEROFF, 0),
        (tiny.RESET + HALT, exits.REBOOT, 0),
        (tiny.PANIC + HALT, exits.PANIC, errors.EXIT_PANIC),
        (tiny.TRIPLE_FAULT, exits.TRIPLE_FAULT, errors.EXIT_TRIPLE_FAULT),
    ],
)
def test_how_the_guest_ended(machine: Make, code: bytes, kind: str, status: int) -> None:
    with machine(code) as m:
        m.start()
        ended = m.wait(60)
        assert (ended.kind, ended.status, m.state) == (kind, status, "stopped")
        assert ended.ok == (status == 0)
        assert bool(ended.report) == (kind == exits.TRIPLE_FAULT)


def test_the_first_reason_stays(machine: Make) -> None:
    with machine(tiny.exits(1) + tiny.exits(2)) as m:
        m.start()
        ended = m.wait(60)
        m.end(exits.MachineExit(exits.TIMEOUT, "late"))
        assert m.exit is ended
        assert ended.status == 1


def test_wait_gives_up_and_the_machine_goes_on(machine: Make) -> None:
    with machine(tiny.COUNTING) as m:
        m.start()
        with pytest.raises(TimeoutError, match=r"the machine has not ended within 0\.2 s"):
            m.wait(0.2)
        assert m.state == "running"
        count = m.memory.read_u32(tiny.COUNTER)
        deadline = time.monotonic() + 60
        while m.memory.read_u32(tiny.COUNTER) == count:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("code", [tiny.SPIN, HALT, tiny.out(0x3F8, ord("x")) + b"\xeb\xf7"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_the_time_limit(machine: Make, code: bytes, cpus: int) -> None:
    with machine(code, timeout=0.2, cpus=cpus) as m:
        m.start()
        ended = m.wait()
        assert (ended.kind, ended.status) == (exits.TIMEOUT, errors.EXIT_TIMEOUT)
        assert ended.message == "no end within 0.2 s (--timeout)"


def test_the_time_limit_is_kept_though_nobody_waits(machine: Make) -> None:
    with machine(HALT, timeout=0.2) as m:
        m.start()
        with pytest.raises(ConsoleClosed):
            m.console.wait_for("never")
        assert m.exit is not None and m.exit.kind == exits.TIMEOUT


def test_the_time_limit_goes_on_while_paused(machine: Make) -> None:
    with machine(tiny.SPIN, timeout=0.2) as m:
        m.start()
        m.pause()
        assert m.wait(60).kind == exits.TIMEOUT


def test_a_guest_that_ends_in_time_leaves_no_watchdog(machine: Make) -> None:
    before = threading.active_count()
    with machine(tiny.exits(3), timeout=1000) as m:
        m.start()
        assert m.wait(60).status == 3
    assert threading.active_count() == before


def test_shutdown_asks_the_guest(machine: Make) -> None:
    with machine(tiny.POLITE) as m:
        m.start()
        m.console.wait_for("ready", timeout=60)
        assert m.shutdown(60).kind == exits.POWEROFF


def test_shutdown_of_a_guest_that_ignores_the_button(machine: Make) -> None:
    with machine(tiny.DEAF) as m:
        m.start()
        m.console.wait_for("ready", timeout=60)
        assert m.power_button_unseen() == ""
        before = time.monotonic()
        ended = m.shutdown(0.4)
        assert (ended.kind, m.state) == (exits.STOPPED, "stopped")
        assert time.monotonic() - before >= 0.4


@pytest.mark.parametrize(
    ("acpi", "paused", "why"),
    [
        (True, False, "no driver in the guest has taken its power button"),
        (False, False, "the guest has no ACPI, and so no power button (--no-acpi)"),
        (True, True, "the machine is paused"),
    ],
)
def test_shutdown_of_a_guest_that_cannot_see_the_button(
    machine: Make, acpi: bool, paused: bool, why: str
) -> None:
    with machine(IDLE, acpi=acpi) as m:
        m.start()
        m.console.wait_for("ready", timeout=60)
        if paused:
            m.pause()
        assert m.power_button_unseen() == why
        assert m.shutdown(None).kind == exits.STOPPED


def test_on_panic_pause(machine: Make) -> None:
    paused = threading.Event()
    with machine(tiny.PANIC + tiny.exits(4), on_panic="pause") as m:
        events: list[str] = []

        def listen(event: str) -> None:
            events.append(event)
            if event == "paused":
                paused.set()

        m.listen(listen)
        m.start()
        assert paused.wait(60)
        assert (m.state, m.exit) == ("paused", None)
        assert never_ends(m)
        # The mov and out of the panic are done, what follows is not.
        assert m.vcpus[0].get_regs().rip == tiny.ENTRY + len(tiny.PANIC)
        m.resume()
        assert m.wait(60).status == 4
        assert events == ["started", "panicked", "paused", "resumed", "stopped"]


class Broken(Device):
    """A device with a bug."""

    def write(self, offset: int, size: int, value: int) -> None:
        raise RuntimeError(f"bug {value}")


def test_a_bug_in_a_device_ends_the_machine_with_its_traceback(machine: Make) -> None:
    with machine(tiny.out(0x1234, 7) + HALT) as m:
        m.platform.pio.add(0x1234, 1, Broken("broken"))
        m.start()
        ended = m.wait(60)
    assert (ended.kind, ended.status) == (exits.MONITOR_ERROR, errors.EXIT_INTERNAL)
    assert ended.message == "monitor error: RuntimeError: bug 7"
    assert "in write\n" in ended.report and "Traceback" in ended.report


# --- the console --------------------------------------------------------------------------------


def test_waiting_for_output_in_turn(machine: Make) -> None:
    with machine(tiny.prints(b"one\ntwo\n") + tiny.ECHO) as m:
        m.start()
        assert m.console.wait_for("o", timeout=60).startswith("o")
        assert m.console.wait_for(re.compile(r"t.o"), timeout=60).startswith("two")
        m.console.wait_for("ready", timeout=60)
        m.send("x")
        assert m.wait_for("]", timeout=60).endswith("[x]")
        with pytest.raises(TimeoutError, match="never"):
            m.console.wait_for("never", timeout=0.1)


def test_waiting_for_what_is_not_printed_ends_with_the_machine(machine: Make) -> None:
    with machine(tiny.prints(b"last words\n") + tiny.exits(1)) as m:
        m.start()
        with pytest.raises(ConsoleClosed, match=r"without 'never' .*last words"):
            m.console.wait_for("never")
        assert m.console.wait_for("words", since=0) == "last words"
        assert m.wait(60).status == 1
    assert m.console.text() == "last words\n"


def test_all_output_is_there_when_it_has_ended(machine: Make) -> None:
    text = b"".join(b"line %d\n" % i for i in range(100))
    with machine(tiny.prints(text) + tiny.exits(0)) as m:
        m.start()
        m.wait(60)
        assert m.console.bytes() == text


# --- several, and many --------------------------------------------------------------------------


def test_several_machines_at_once(machine: Make) -> None:
    machines = [machine(tiny.COUNTING) for _ in range(4)]
    try:
        for m in machines:
            m.start()
        machines[1].pause()
        machines[2].stop()
        for m in (machines[0], machines[3]):
            count = m.memory.read_u32(tiny.COUNTER)
            deadline = time.monotonic() + 60
            while m.memory.read_u32(tiny.COUNTER) == count:
                assert time.monotonic() < deadline
        assert [m.state for m in machines] == ["running", "paused", "stopped", "running"]
    finally:
        for m in machines:
            m.close()
    assert [m.state for m in machines] == ["closed"] * 4


def held() -> tuple[object, ...]:
    """Descriptors, threads, files and devices mapped, and bytes of writable anonymous memory."""
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    named = sorted(row[5] for row in maps if len(row) > 5)
    size = 0
    for row in maps:
        if len(row) == 5 and row[1].startswith("rw"):
            start, end = (int(part, 16) for part in row[0].split("-"))
            size += end - start
    return tiny.descriptors(), sorted(os.listdir("/proc/self/task")), named, size


@pytest.mark.parametrize("options", [{}, {"cpus": 2, "console": "pty", "timeout": 100.0}], ids=str)
def test_200_machines_leave_nothing(machine: Make, options: dict[str, object]) -> None:
    memory = 64 * MIB
    m = machine(tiny.prints(b"x" * 300) + tiny.exits(7))
    path = m.config.kernel
    m.close()

    def life() -> None:
        config = MachineConfig(path, memory=memory, **options)  # type: ignore[arg-type]
        with Machine(config) as m:
            m.start()
            assert m.wait(60).status == 7
            assert "x" * 300 in m.console.text()

    for _ in range(5):
        life()
    descriptors, tasks, named, size = held()
    for _ in range(200 if host.lane() != "nested" else 30):  # 0.3 s each there
        life()
    after = held()
    assert after[:3] == (descriptors, tasks, named)
    # Python's and glibc's own arenas grow by a few; the memory of one machine is more.
    assert after[3] - size < memory // 2  # type: ignore[operator]


@pytest.mark.parametrize("console", ["none", "pty"])
def test_a_failed_start_leaves_nothing(machine: Make, tmp_path: Path, console: str) -> None:
    good = machine(HALT)
    path = good.config.kernel
    good.close()
    wrong: list[tuple[type[Exception], dict[str, object]]] = [
        (UsageError, {"kernel": str(tmp_path / "nosuch")}),
        (UsageError, {"cpu": "nosuch"}),
        (UsageError, {"initrds": [str(tmp_path / "nosuch")]}),
        (UsageError, {"backing": "nosuch"}),
        (HostError, {"device": "/dev/null"}),
        (HostError, {"device": str(tmp_path / "kvm")}),
    ]
    before = tiny.descriptors(), threading.active_count()
    for error, options in wrong:
        values: dict[str, object] = {"kernel": path, "memory": 16 * MIB, "console": console}
        with pytest.raises(error) as caught:
            Machine(MachineConfig(**(values | options)))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert (tiny.descriptors(), threading.active_count()) == before, options


def test_running_out_of_descriptors_leaves_nothing(machine: Make) -> None:
    """Every place that opens one fails once."""
    good = machine(HALT, cpus=3)
    config = good.config
    good.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = [os.open("/dev/null", os.O_RDONLY)]
    while fillers[-1] <= highest:  # the limit is on numbers: leave none free below it
        fillers.append(os.dup(fillers[0]))
    before = tiny.descriptors()
    failures = 0
    for more in range(1, 40):
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + more, hard))
        try:
            with Machine(config) as m:
                m.start()
                m.stop()
            break
        except (HostError, UsageError, OSError):
            failures += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert tiny.opened_since(before) == []
    for fd in fillers:
        os.close(fd)
    assert failures >= 5  # device, VM, kernel, three vCPUs


def test_without_a_kernel_the_program_sets_the_registers(machine: Make) -> None:
    with Machine(MachineConfig(memory=2 * MIB)) as m:
        m.memory.write(0x8000, b"\xb0\x2a\xe6\xf4\xf4")  # mov al, 42; out 0xf4, al; hlt
        vcpu = m.vcpus[0]
        sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
        sregs.cs.base, sregs.cs.selector = 0, 0
        vcpu.set_sregs(sregs)
        regs.rip, regs.rflags = 0x8000, 2
        vcpu.set_regs(regs)
        m.start()
        assert m.wait(60).status == 42


def test_a_machine_is_made_of_a_configuration() -> None:
    odd: Any
    for odd in (None, "vmlinuz", {"kernel": "vmlinuz"}, MachineConfig):
        with pytest.raises(UsageError, match="is not a MachineConfig"):
            Machine(odd)


def test_a_machine_is_not_copied_by_the_way(tmp_path: Path) -> None:
    with Machine(MachineConfig(tiny.kernel(tmp_path, tiny.COUNTING), memory=16 << 20)) as m:
        m.start()
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="clone"):
                way(m)
        gc.collect()
        m.pause()  # its descriptors are its own still
        m.resume()
