"""Python functions as hardware: a Bochs-like debug port, and a timer in memory.

    python examples/host_functions.py KERNEL [INITRD ...]

A kernel writes text to port 0xe9 (`outb`, or from user space `printf x | dd of=/dev/port bs=1
seek=233`), and reads microseconds since the start at GPA 0xd8000000 (64 bits).
"""

import sys
import time

from vmm import Machine, MachineConfig

TIMER = 0xD8000000
begin = time.monotonic_ns()


def read_port(offset: int, size: int) -> int:
    return 0xE9  # how a guest finds out that it is there


def write_port(offset: int, size: int, value: int) -> None:
    sys.stdout.buffer.write(value.to_bytes(size, "little"))


def read_timer(offset: int, size: int) -> int:
    microseconds = (time.monotonic_ns() - begin) // 1000
    return microseconds >> 8 * offset & (1 << 8 * size) - 1


kernel, *initrds = sys.argv[1:]
with Machine(MachineConfig(kernel, initrds=initrds, timeout=300)) as m:
    m.bind_port(0xE9, read=read_port, write=write_port)
    m.bind_mmio(TIMER, 8, read=read_timer)
    m.start()
    ended = m.wait()
    sys.stdout.flush()
print(f"{ended.message} (status {ended.status})")
