"""Many machines at once, in one thread of the program's own.

    python examples/async_many.py COUNT TEXT KERNEL [INITRD ...]

Boots COUNT of them, tells how long each took to print TEXT, and ends them. A machine that fails has
the others ended too: the task group cancels them, and a cancelled machine leaves nothing behind.
"""

import asyncio
import sys
import time

from vmm import AsyncMachine, MachineConfig


async def boot(number: int, config: MachineConfig, text: str) -> None:
    begin = time.monotonic()
    async with AsyncMachine(config) as m:
        await m.start()
        line = await m.wait_for(text, timeout=300)
        print(f"machine {number}: {line!r} after {time.monotonic() - begin:.2f} s", flush=True)


async def main(count: str, text: str, kernel: str, *initrds: str) -> None:
    config = MachineConfig(kernel, initrds=initrds, append="quiet", memory=128 << 20)
    async with asyncio.TaskGroup() as group:
        for number in range(int(count)):
            group.create_task(boot(number, config, text))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
