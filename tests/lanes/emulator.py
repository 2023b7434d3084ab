"""QEMU as the nested lane runs it: a copy without one wrong store of its helper for VMRUN.

Where KVM injects an interrupt (EVENTINJ, type INTR), QEMU 7.2 (target/i386/tcg/sysemu/svm_helper.c,
helper_vmrun) delivers it at once, by do_interrupt_x86_hardirq(), and yet leaves its vector in
CPUState.exception_index, where an exception waits to be delivered. The next request to leave
cpu_exec() that finds no interrupt pending (a kick: another thread's turn, an exclusive section, or
an interrupt that comes between the looks at interrupt_request and at exit_request) has the vector
delivered a second time, whether or not the guest has interrupts enabled. In the middle of the timer
interrupt's handler that is a deadlock: all processors wait for timekeeper_lock or its sequence
count. Before the handler's swapgs it is a kernel with the user's GS: a triple fault.
Seen with a probe on cpu_exec() of both: `thread=single`, which kicks ten times a second, hung every
first guest of four processors; `thread=multi` has it now and then, in bursts on a busy host.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_STORE = re.compile(
    rb"(\x89[\x80-\xbf].{4})"  # mov %vector,exception_index(%env): what goes
    rb"\xc7[\x80-\xbf].{4}\0\0\0\0"  # movl $0,exception_is_int(%env)
    rb"\x48\xc7[\x80-\xbf].{4}\xff\xff\xff\xff"  # movq $-1,exception_next_eip(%env)
    rb"\xf6\x05.{4}\x02\x0f\x85.{4}"  # testb $CPU_LOG_TB_IN_ASM,qemu_loglevel; jne
    rb"\xba\x01\0\0\0",  # mov $1,%edx: is_hw of do_interrupt_x86_hardirq()
    re.DOTALL,
)
_NOP = b"\x66\x0f\x1f\x44\x00\x00"


def mend(program: bytes) -> bytes | None:
    """QEMU's `program` without the store, or None if it is not there exactly once."""
    found = list(_STORE.finditer(program))
    if len(found) != 1:
        return None
    start, end = found[0].span(1)
    return program[:start] + _NOP + program[end:]


def mended(qemu: Path, directory: Path) -> Path | None:
    """A copy of the program `qemu`, mended, below `directory`; None if it is another build.

    It finds its modules and firmware from where it is: lib and share beside its bin are links.
    """
    program = mend(qemu.read_bytes())
    if program is None:
        return None
    home = qemu.resolve().parent
    copy = directory / home.name / qemu.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(program)
    shutil.copymode(qemu, copy)
    for name in ("lib", "share"):
        (directory / name).symlink_to(home.parent / name)
    return copy
