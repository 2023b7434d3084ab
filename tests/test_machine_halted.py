"""vmm/machine/halted.py: machines whose guest has halted all processors for good, and others."""

from __future__ import annotations

import os
import threading
import time
import warnings
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import Machine, MachineConfig
from vmm.machine import exits, halted

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(120)]

HALT = b"\xfa\xf4\xeb\xfd"  # cli; 1: hlt; jmp 1b
IDLE = b"\xfb" + HALT[1:]  # sti; 1: hlt; jmp 1b
LIMIT = 30.0
LOOKS = 4


def machine(directory: Path, code: bytes, **options: object) -> Machine:
    values: dict[str, object] = {"memory": 16 << 20, **options}
    return Machine(MachineConfig(tiny.kernel(directory, code), **values))  # type: ignore[arg-type]


def lives(m: Machine) -> bool:
    """Whether it goes on for some looks more."""
    try:
        m.wait(LOOKS * halted.PERIOD)
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_guest_that_says_that_it_halts(tmp_path: Path, cpus: int) -> None:
    """The second processor was never started, and so can do nothing either."""
    text = b"reboot: Power off not available: System halted instead\n"
    with machine(tmp_path, tiny.prints(text) + HALT, cpus=cpus) as m:
        m.start()
        ended = m.wait(LIMIT)
    assert (ended.kind, ended.status) == (exits.HALTED, 0)
    assert ended.message == "the guest halted, and cannot wake up"


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        (b"", exits.HALTED, "did not say why"),
        (b"reboot: Restarting system\nhello\n", exits.HALTED, "did not say why"),
        (b"\n\n -- System halted", exits.PANIC, "decompressor gave up"),
        (b"PANIC: early exception 0x0e IP 10:0", exits.PANIC, "crashed early"),
        (b"Kernel panic - not syncing: x\n", exits.PANIC, "kernel panicked"),
    ],
    ids=["nothing", "restarting", "decompressor", "early", "panic"],
)
def test_a_guest_that_does_not_is_given_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, kind: str, says: str
) -> None:
    monkeypatch.setattr(halted, "SILENT_TIME", 1.0)
    with machine(tmp_path, tiny.prints(text) + HALT) as m:
        m.start()
        ended = m.wait(LIMIT)
    assert (ended.kind, ended.status) == (kind, 120)
    assert says in ended.message


def test_others_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that an interrupt can wake, one that runs, one that is paused, one without a kernel."""
    monkeypatch.setattr(halted, "SILENT_TIME", 0.0)
    said = tiny.prints(b"reboot: System halted\n")
    with (
        machine(tmp_path, said + IDLE) as idle,
        machine(tmp_path, said + tiny.COUNTING) as busy,
        machine(tmp_path, said + HALT) as paused,
        Machine(MachineConfig(memory=16 << 20)) as bare,
    ):
        vcpu = bare.vcpus[0]
        bare.memory.write(0x1000, HALT)
        registers, segments = vcpu.get_regs(), vcpu.get_sregs()
        registers.rip, registers.rflags = 0x1000, 2
        segments.cs.base = segments.cs.selector = 0
        vcpu.set_sregs(segments)
        vcpu.set_regs(registers)
        for m in (idle, busy, paused, bare):
            m.start()
        paused.wait_for("halted", LIMIT)
        paused.pause()
        assert lives(idle)
        for m in (busy, paused, bare):
            assert m.exit is None, m
        paused.resume()
        assert paused.wait(LIMIT).kind == exits.HALTED


def test_the_watcher_ends_with_the_last_machine(tmp_path: Path) -> None:
    with machine(tmp_path, IDLE) as one:
        one.start()
        with machine(tmp_path, IDLE) as other:
            other.start()
        assert halted._watcher == os.getpid()
    end = time.monotonic() + LIMIT
    while halted._watcher and time.monotonic() < end:
        time.sleep(0.01)
    assert not halted._watcher
    assert not halted._looks


def test_close_waits_for_a_look_but_not_for_a_listener_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    text = tiny.prints(b"reboot: System halted\n")
    with machine(tmp_path, text + HALT) as m:
        m.listen(lambda event: release.wait(LIMIT) if event == "stopped" else None)
        m.start()
        end = time.monotonic() + LIMIT
        while m.state != "stopped" and time.monotonic() < end:
            time.sleep(0.01)
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            m.close()
        assert time.monotonic() - start < 10
        release.set()
    with machine(tmp_path, text + HALT) as m:  # and the watcher goes on with others
        m.start()
        assert m.wait(LIMIT).kind == exits.HALTED
