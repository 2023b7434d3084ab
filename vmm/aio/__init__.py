"""A machine for asyncio: the calls of `Machine` as coroutines.

What may block runs in a thread of its own for as long as the call, never on the caller's loop, and
never in the loop's default executor, whose few threads a machine that waits would take from others.
A call that is cancelled has ended before the cancellation goes on: no thread is left, and the
machine is in one of its states.
"""

from __future__ import annotations

from vmm.aio.machine import AsyncMachine

__all__ = ["AsyncMachine"]
