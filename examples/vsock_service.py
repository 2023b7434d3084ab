"""A key-value store for a guest, on vsock port 1024 of the host.

    python examples/vsock_service.py KERNEL [INITRD ...]

In the guest, with a socket driver: `echo set colour blue | socat - VSOCK-CONNECT:2:1024`.
"""

import asyncio
import sys

from vmm import AsyncMachine, MachineConfig

PORT = 1024
store: dict[str, str] = {}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """`set KEY VALUE` and `get KEY`, a line each; a task for each connection."""
    async for line in reader:
        match line.decode(errors="replace").split(maxsplit=2):
            case ["set", key, value]:
                store[key] = value.strip()
                answer = "ok"
            case ["get", key]:
                answer = store.get(key, "")
            case _:
                answer = "say: set KEY VALUE, or get KEY"
        writer.write(answer.encode() + b"\n")
        await writer.drain()


async def main(kernel: str, *initrds: str) -> int:
    config = MachineConfig(kernel, initrds=initrds, vsock="cid=3", timeout=300)
    async with AsyncMachine(config) as m:
        m.bind_vsock(PORT, serve)
        await m.start()
        return (await m.wait()).status


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
