"""vmm/sandbox/seccomp.py: a thread keeps the system calls that are on its list."""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.confined import in_process, in_thread, outcome
from vmm import libc
from vmm.sandbox import privileges, seccomp
from vmm.sandbox.numbers import NUMBERS

ALL = dict.fromkeys(NUMBERS, ())
EPERM = seccomp.fails(errno.EPERM)


def on_both_kernels(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test that asks the kernel runs in both lanes."""
    lacks = not seccomp.available()
    test = pytest.mark.skipif(lacks, reason="this kernel has no seccomp")(test)
    return pytest.mark.needs_kvm(test)


def run(
    program: bytes, number: int, arguments: tuple[int, ...] = (), arch: int = 0xC000003E
) -> int:
    """The filter's answer to a call, by an interpreter of the BPF it uses."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *(word & (1 << 64) - 1 for word in words))
    code = list(struct.iter_unpack("<HBBI", program))
    at = value = 0
    for _ in range(len(code)):
        op, yes, no, k = code[at]
        at += 1
        if op == 0x20:
            value = int.from_bytes(data[k : k + 4], "little")
        elif op == 0x54:
            value &= k
        elif op == 0x05:
            at += k
        elif op == 0x06:
            return int(k)
        else:
            holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[op]
            at += yes if holds else no
    raise AssertionError("it does not return")


@pytest.mark.parametrize("seed", range(20))
def test_every_number_has_its_answer(seed: int) -> None:
    """Lists of many lengths: the search has near and far jumps."""
    chance = random.Random(seed)
    names = chance.sample(sorted(NUMBERS), chance.choice((0, 1, 2, 30, 150, len(NUMBERS))))
    others = {name: seccomp.fails(errno.ENOSYS) for name in names[::7]}
    tests = ((0, "in", tuple(range(chance.randrange(1, 200)))), (1, "without", (4,)))
    tested = set(chance.sample(names, min(len(names), 12)))
    calls = {name: tests if name in tested else () for name in names if name not in others}
    program = seccomp.compile_filter(calls, EPERM, others)
    for number in [*range(600), 0x40000000, 0x40000001, 0xFFFFFFFF]:
        name = next((each for each, known in NUMBERS.items() if known == number), "")
        passes = seccomp.ALLOW if name in calls else others.get(name, EPERM)
        assert run(program, number) == passes
        refused = EPERM if calls.get(name) else passes
        assert run(program, number, (1000,)) == refused
        assert run(program, number, (0, 4)) == refused
    assert run(program, 0, arch=0x40000003) == seccomp.KILL  # i386


@pytest.mark.parametrize(
    ("test", "passing", "failing"),
    [
        ((2, "in", (0xAE80, 0x4010AE67)), [0xAE80, 0x4010AE67, 0x1_0000_AE80], [0, 0xAE81]),
        ((2, "without", (4,)), [0, 3, 8], [4, 5, 0xFFFFFFFF]),
        ((2, "with", (0x10100,)), [0x10100, 0xFFFFFFFF], [0x100, 0x10000, 0]),
        ((2, "not all", (6,)), [0, 2, 4, 5, 8], [6, 7, 0xFFFFFFFF]),
        ((2, "in", (-1,)), [-1, 0xFFFFFFFF], [1]),
    ],
)  # fmt: skip
def test_tests_of_arguments(test: seccomp.Test, passing: list[int], failing: list[int]) -> None:
    program = seccomp.compile_filter({"ioctl": [test]}, EPERM)
    assert [run(program, 16, (0, 0, each)) for each in passing] == [seccomp.ALLOW] * len(passing)
    assert [run(program, 16, (0, 0, each)) for each in failing] == [EPERM] * len(failing)


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(KeyError):
        seccomp.compile_filter({"no_such_call": ()}, EPERM)
    with pytest.raises(ValueError, match="no such test"):
        seccomp.compile_filter({"read": [(0, "maybe", (1,))]}, EPERM)
    with pytest.raises(ValueError, match="300 values"):
        seccomp.compile_filter({"read": [(0, "in", tuple(range(300)))]}, EPERM)


@on_both_kernels
def test_the_kernel_takes_it_for_this_thread_alone() -> None:
    calls = {**ALL, "socket": [(0, "in", (1,))]}
    del calls["uname"]
    others = {"sched_yield": seccomp.fails(errno.ENOSYS)}
    program = seccomp.compile_filter(calls, EPERM, others)

    def confined() -> list[str]:
        privileges.no_new_privs()
        seccomp.restrict(program)
        return [
            outcome(os.uname),
            outcome(lambda: libc.syscall(NUMBERS["sched_yield"])),
            outcome(lambda: os.close(libc.syscall(NUMBERS["socket"], 1, 1, 0))),
            outcome(lambda: libc.syscall(NUMBERS["socket"], 2, 1, 0)),
            outcome(lambda: os.close(os.dup(0))),
        ]

    assert in_thread(confined) == ["EPERM", "ENOSYS", "ok", "EPERM", "ok"]
    assert outcome(os.uname) == "ok"


@on_both_kernels
def test_all_threads_at_once() -> None:
    calls = {name: () for name in NUMBERS if name != "uname"}
    program = seccomp.compile_filter(calls, EPERM)

    def confined() -> list[str]:
        go, done = threading.Event(), []
        other = threading.Thread(target=lambda: (go.wait(), done.append(outcome(os.uname))))
        other.start()
        privileges.no_new_privs()
        seccomp.restrict(program, all_threads=True)
        go.set()
        other.join()
        return [*done, outcome(os.uname)]

    assert in_process(confined)[0] == ["EPERM", "EPERM"]


@on_both_kernels
def test_the_deadly_action_ends_the_process() -> None:
    deadly = seccomp.compile_filter(ALL, EPERM, {"ptrace": seccomp.KILL})

    def confined() -> str:
        privileges.no_new_privs()
        seccomp.restrict(deadly)
        libc.syscall(NUMBERS["ptrace"], 0, 0, 0, 0)
        return "survived"

    result, status = in_process(confined)
    assert result is None and os.WTERMSIG(status) == signal.SIGSYS


@on_both_kernels
def test_no_memory_is_both_written_and_executed() -> None:
    """The test of flags, on the kernel: mmap without PROT_EXEC."""
    calls = {**ALL, "mmap": [(2, "without", (mmap.PROT_EXEC,))]}
    program = seccomp.compile_filter(calls, EPERM)

    def confined() -> list[str]:
        privileges.no_new_privs()
        seccomp.restrict(program)
        return [
            outcome(lambda: mmap.mmap(-1, 4096).close()),
            outcome(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()),
        ]

    assert in_thread(confined) == ["ok", "EPERM"]


def test_numbers_are_those_of_the_header() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no linux-libc-dev")
    found = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    assert len(found) > 300
    assert {name: int(number) for name, number in found.items()}.items() <= NUMBERS.items() | {
        (name, int(number)) for name, number in found.items() if name not in NUMBERS
    }


def test_the_shipped_filter_is_what_the_list_makes() -> None:
    """vmm/sandbox/_filters.py is written when the package is built: `make setup`."""
    from vmm.sandbox import _filters, calls, confinement
    from vmm.sandbox.filter_build import beside_broker, brokered, monitor

    assert monitor() == _filters.MONITOR
    assert brokered() == _filters.BROKERED
    assert monitor(beside_broker(calls.BROKER_PID)) == _filters.BESIDE_BROKER
    assert (calls.OWN_PID, calls.BROKER_PID) == (confinement._OWN_PID, confinement._BROKER_PID)


def test_the_monitors_list_has_the_ioctls_of_a_machine_that_is_built() -> None:
    """Every ioctl that vmm.kvm knows is allowed with its number, or one that makes something."""
    from vmm.kvm import ioctls
    from vmm.sandbox import calls

    makes = {
        "KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_CREATE_DEVICE", "KVM_CREATE_IRQCHIP",
        "KVM_SET_TSS_ADDR", "KVM_SET_IDENTITY_MAP_ADDR", "KVM_SET_USER_MEMORY_REGION2",
    }  # fmt: skip
    known = {
        each.name: each.number for each in vars(ioctls).values() if isinstance(each, ioctls.Ioctl)
    }
    assert known.keys() - makes == calls.KVM_IOCTLS.keys()
    assert {name: known[name] for name in calls.KVM_IOCTLS} == calls.KVM_IOCTLS


def test_deadly_calls_are_deadly_whatever_their_arguments() -> None:
    from vmm.sandbox import calls
    from vmm.sandbox.filter_build import monitor

    program = monitor()
    for name in calls.DEADLY:
        assert run(program, NUMBERS[name]) == seccomp.KILL, name
    for name in ("execve", "execveat", "fork", "vfork", "socket", "bind", "connect", "unlink"):
        assert run(program, NUMBERS[name]) == EPERM, name
    assert run(program, NUMBERS["clone"], (calls.CLONE_THREAD,)) == seccomp.ALLOW
    assert run(program, NUMBERS["clone"], (17,)) == EPERM
    assert not set(calls.MONITOR) & (set(calls.DEADLY) | set(calls.ENOSYS))
