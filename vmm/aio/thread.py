"""Blocking calls in threads of their own, for asyncio."""

from __future__ import annotations

import asyncio
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


async def in_thread(
    function: Callable[..., T], *arguments: object, abort: Callable[[], object] | None = None
) -> T:
    """What `function` returns or raises, called in a new thread; see `AsyncMachine.call`."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = function(*arguments)
        except BaseException as err:
            loop.call_soon_threadsafe(done.set_exception, _for_future(err))
        else:
            loop.call_soon_threadsafe(done.set_result, result)

    thread = threading.Thread(target=run, name=f"vmm-{getattr(function, '__name__', 'call')}")
    thread.start()
    cancelled: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError as err:
            if cancelled is None and abort is not None:
                abort()
            cancelled = err
    thread.join()
    if cancelled is not None:
        done.exception()  # seen: nobody else will look at it
        raise cancelled
    return done.result()


def _for_future(err: BaseException) -> BaseException:
    """A future takes any exception but StopIteration."""
    return RuntimeError(str(err)) if isinstance(err, StopIteration) else err
