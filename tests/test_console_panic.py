"""vmm/console/panic.py: a panic and the text of one, as Linux and other programs print them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.bare import bare_machine
from vmm.console.panic import PanicWatch
from vmm.console.tail import ConsoleTail
from vmm.devices.power import RESET, RESET_VALUE
from vmm.machine import exits

PANIC = b"Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100"
STAMPED = (
    b"[    2.153407] " + PANIC + b"\r\n"
    b"[    2.153900] CPU: 0 PID: 1 Comm: init Not tainted 6.1.0-57-cloud-amd64 #1\r\n"
    b"[    2.155003] Call Trace:\r\n[    2.155231]  <TASK>\r\n"
    b"[    2.155466]  dump_stack_lvl+0x44/0x5c\r\n"
    b"[    2.160391] Kernel Offset: disabled\r\n"
)
UNSTAMPED = (
    PANIC + b"\r\nCPU: 0 PID: 1 Comm: init Not tainted 6.1.0 #1\r\nCall Trace:\r\n <TASK>\r\n"
    b" dump_stack_lvl+0x44/0x5c\r\n ? rest_init+0xc0/0xc0\r\n </TASK>\r\n"
)
PANICS = {
    "the line alone": PANIC + b"\n",
    "the line alone, without an end": PANIC,
    "with the time": STAMPED,
    "without the time": UNSTAMPED,
    "after a prompt": b"debian login: " + STAMPED,
    "after a prompt, without the time": b"debian login: " + UNSTAMPED,
    "with a caller": b"[    2.153407][    T1] " + PANIC + b"\n[    2.160391][    T1] ---[ end\n",
    "Rebooting in": PANIC + b"\nKernel Offset: disabled\nRebooting in 1 seconds..\n",
    "with another processor's last words": STAMPED.replace(b"<TASK>", b"<TASK>\r\nok 3 - sleep"),
    "after old text": PANIC + b"\nok\n" + STAMPED,
    "RIP": PANIC + b"\nRIP: 0033:0x7f9c1c\nRSP: 002b:00007ffe2 EFLAGS: 00000246\n",
    "registers": PANIC + b"\nRAX: 0000000000000000 RBX: 0000000000000001\n",
    "panic_print": UNSTAMPED + b"Wakeup Device: <NULL>\n\nDumping ftrace buffer:\n"
    b"   (ftrace buffer empty)\n",
    "ftrace_dump_on_oops": UNSTAMPED + b"Dumping ftrace buffer:\n" + b"-" * 33 + b"\n"
    b"  init-1  0d..1 2153407us : f <-g\n" + b"-" * 33 + b"\n",
    "filler": PANIC + b"\n" + b"x" * 70000,
}
OTHERS = {
    "nothing": b"",
    "other text": b"all 3 tests passed\n",
    "old text in a line": b"log: " + PANIC + b"\nall 3 tests passed\n",
    "old text in a line, at the end": b"log: " + PANIC + b"\n",
    "old text": PANIC + b"\nall 3 tests passed\n",
    "an old log": STAMPED + b"all 3 tests passed\n",
    "an old log without the time": UNSTAMPED + b"PASS\n",
    "pstore": b"<0>[    2.153407] " + PANIC + b"\n<0>[    2.160391] Kernel Offset: disabled\n",
    "an old log, then a restart": STAMPED + b"[   10.153407] reboot: Restarting system\r\n",
    "restart with a command": STAMPED + b"reboot: Restarting system with command 'x'\n"
    b"[   10.1] reboot: machine restart\n",
    "sysrq-b": STAMPED + b"[   10.153407] sysrq: Resetting\n",
    "a prompt": STAMPED + b"# ",
}


@pytest.mark.parametrize("text", PANICS.values(), ids=list(PANICS))
def test_a_panic(text: bytes) -> None:
    assert PanicWatch().judge(b"Linux version 6.1\r\n" + text).startswith("Kernel panic - not")
    assert PanicWatch().judge(text) == PANIC.decode()


def test_a_panic_has_no_way_to_the_terminal() -> None:
    """Its line is in the message of the machine's end, and whatever prints that."""
    line = PanicWatch().judge(STAMPED.replace(b"\n", b": \x1b]0;evil\x07\xe2\x80\xae\r\n", 1))
    assert line.startswith("Kernel panic - not") and "evil" in line
    assert line.isprintable()


@pytest.mark.parametrize("text", OTHERS.values(), ids=list(OTHERS))
def test_the_text_of_one(text: bytes) -> None:
    assert PanicWatch().judge(text) == ""


def watched() -> tuple[ConsoleTail, PanicWatch]:
    tail, watch = ConsoleTail(), PanicWatch()
    tail.before_cut = watch.cut
    return tail, watch


MORE = b"[    2.170391]     init-1 0d..1 2153407us : some_function <-other_function\r\n"


@pytest.mark.parametrize("before", [0, 1, 8, 40, 60, 120])
def test_panics_before_much_output(before: int) -> None:
    """panic_print=, ftrace_dump_on_oops: the line is not kept any more, or cut in two."""
    for text in (STAMPED, b"debian login: " + STAMPED):
        tail, watch = watched()
        tail.write(b"x" * (65536 - before) + b"\n" + text)
        for _ in range(3000):
            tail.write(MORE)
        assert b"panic" not in tail.bytes()
        assert watch.judge(tail.bytes()) == PANIC.decode()
        tail.write(b"[   30.170391] reboot: Restarting system\r\n")
        assert watch.judge(tail.bytes()) == ""


def test_old_text_before_much_output() -> None:
    tail, watch = watched()
    tail.write(b"log: " + PANIC + b"\n")
    for number in range(20000):
        tail.write(b"test %d passed\n" % number)
    assert watch.judge(tail.bytes()) == ""


def test_back_in_time() -> None:
    watch = PanicWatch()
    watch.cut(STAMPED)
    assert watch.judge(b"") == PANIC.decode()
    watch.forget(len(STAMPED))
    assert (watch.judge(b""), watch.since) == ("", len(STAMPED))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("line", [b" " * 4000, b" a" * 2000, b"[ " * 2000, b"A" * 4000], ids=repr)
def test_lines_made_to_take_long(line: bytes) -> None:
    for _ in range(100):
        PanicWatch().judge(STAMPED + line)


Make = Callable[[bytes], str]


def flood(text: bytes, times: int) -> bytes:
    """Prints `text` that often: mov ebx, times; 1: ...; dec ebx; jnz 1b."""
    code = tiny.prints(text)
    back = -(len(code) + 7)
    return (
        b"\xbb" + times.to_bytes(4, "little") + code + b"\x4b\x0f\x85"
        + back.to_bytes(4, "little", signed=True)
    )  # fmt: skip


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize("back", [True, False])
def test_what_was_printed_before_a_rollback_does_not_count(back: bool) -> None:
    with bare_machine("1: hlt; jmp 1b") as machine:
        machine.start()
        machine.checkpoint()
        machine.platform.console.sink(STAMPED)
        if back:
            machine.rollback()
        machine.platform.power.write8(RESET, RESET_VALUE)  # as the guest does
        assert machine.wait(30).kind == (exits.REBOOT if back else exits.PANIC)


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("code", "status"),
    [
        (tiny.prints(b"log: " + PANIC + b"\nall 3 tests passed\n"), 0),
        (tiny.prints(PANIC + b"\nall 3 tests passed\n"), 0),
        (tiny.prints(PANIC + b"\n"), 120),
        (tiny.prints(PANIC + b"\n") + flood(b" <TASK>\n", 18000), 120),
    ],
    ids=["in a line", "a line", "a panic", "a panic before much output"],
)
def test_machines(tmp_path: Path, code: bytes, status: int) -> None:
    kernel = tiny.kernel(tmp_path, code + tiny.RESET + tiny.HALT)
    done = tiny.run("run", "--memory", "16M", kernel, stdout=-3)
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr == f"vmm: the guest's kernel panicked: {PANIC.decode()} (status 120)\n"
