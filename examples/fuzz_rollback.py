"""A fuzz loop: thousands of inputs into one guest, each from the same point, crashes and all.

    python examples/fuzz_rollback.py [SEED]

The guest stands for the code under test: it reads INPUT, marks in COVERAGE what it has reached, and
ends. One input crashes it. The loop keeps what reaches something new, changes a byte of it, and
goes back to the checkpoint, which takes less than a millisecond.
"""

import random
import sys
import time

from vmm import Machine, MachineConfig
from vmm.boot import registers
from vmm.boot.state import BootState

CODE, STACK, INPUT, COVERAGE = 0x100000, 0x80000, 0x200000, 0x201000
SECRET = b"fuzz!"
ALPHABET = b"abcdefghijklmnopqrstuvwxyz!?"


def guest() -> bytes:
    """32-bit code: compares INPUT with SECRET, a byte and a mark at a time; the end is a crash."""
    checks = [b"\xac\x3c" + bytes([letter]) + b"\x75%c" for letter in SECRET]  # lodsb; cmp al; jne
    marks = [b"\xc6\x47" + bytes([place, 1]) for place in range(len(SECRET))]  # mov [edi+place], 1
    step = len(checks[0] + marks[0]) - 1
    code = b"\xbe" + INPUT.to_bytes(4, "little") + b"\xbf" + COVERAGE.to_bytes(4, "little")
    for place, (check, mark) in enumerate(zip(checks, marks, strict=True)):
        out = (len(SECRET) - place - 1) * step + len(mark) + 2  # over the rest, and the crash
        code += check % out + mark
    return code + b"\x0f\x0b" + b"\xb0\x00\xe6\xf4\xf4"  # ud2; mov al, 0; out 0xf4; hlt


def main(seed: int) -> bytes:
    """Fuzz until it crashes; the input that did it."""
    chance = random.Random(seed)
    corpus, reached, tries, begin = [bytes(len(SECRET))], 0, 0, time.monotonic()
    with Machine(MachineConfig(memory=16 << 20)) as m:
        m.memory.write(CODE, guest())
        registers.set_up(m.vcpus[0], BootState("pvh32", CODE, rsp=STACK))
        m.checkpoint()
        while True:
            data = bytearray(chance.choice(corpus[-2:]))
            data[chance.randrange(len(data))] = chance.choice(ALPHABET)
            m.rollback()
            m.memory.write(INPUT, data)
            m.start() if m.state == "created" else m.resume()
            ended = m.wait(60)
            tries += 1
            if ended.kind == "triple-fault":
                print(f"crash: {data.decode()!r} after {tries} inputs, "
                      f"{tries / (time.monotonic() - begin):.0f} a second")  # fmt: skip
                return bytes(data)
            marks = m.memory.read(COVERAGE, len(SECRET)).count(1)
            if marks > reached:
                print(f"reached {marks}: {data.decode('ascii', 'backslashreplace')!r}")
                reached = marks
                corpus.append(bytes(data))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
