"""What the broker of a machine's process does at the program's request, and at nobody else's.

The process is locked down once its machine is made. A snapshot's directory is made later, where the
program says, and so are the overlays that a checkpoint puts over disks: the program tells the
broker (vmm.sandbox.broker), over a connection that the process has handed over and no longer has,
for as long as that takes.
"""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

from vmm.isolated.wire import Channel, LateError, Patience, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    from vmm.sandbox.broker import Policy

ANSWER_WITHIN = 10.0
"""Seconds the broker has to answer."""


@contextmanager
def making(channel: Channel, target: str, base: str | None) -> Iterator[None]:
    """In the program: for as long as the block, the process may make the directory `target`, and
    read the snapshot `base` and those below it. Raises WireError, LateError."""
    with _granted(channel, {"making": target, "base": base}):
        yield


@contextmanager
def overlays(channel: Channel, directory: str) -> Iterator[None]:
    """In the program: for as long as the block, the process may make files without a name in
    `directory`. Raises WireError, LateError."""
    with _granted(channel, {"nameless": directory}):
        yield


@contextmanager
def _granted(channel: Channel, message: dict[str, object]) -> Iterator[None]:
    _ask(channel, message)
    try:
        yield
    finally:
        _ask(channel, {"done": 1})


def _ask(channel: Channel, message: dict[str, object]) -> None:
    patience = Patience(ANSWER_WITHIN)
    channel.send(message, patience=patience)
    channel.receive(patience)


def serve(policy: Policy, fds: list[int]) -> Callable[[], object]:
    """In the broker: do what the program says; what ends that."""
    channel = Channel(socket.socket(fileno=fds[0]))
    threading.Thread(target=_serve, args=(channel, policy), daemon=True).start()
    return channel.close


def _serve(channel: Channel, policy: Policy) -> None:
    try:
        while True:
            message, _, _ = channel.receive()
            with _allowed(policy, message):
                channel.send({})
                channel.receive()  # that it is done
            channel.send({})
    except (WireError, LateError):
        pass  # the program has gone: nothing is asked for any more


def _allowed(policy: Policy, message: dict[str, Any]) -> AbstractContextManager[None]:
    if "nameless" in message:
        return policy.nameless([message["nameless"]])
    from vmm.snapshot.chain import chain

    base = message["base"]
    return policy.making(message["making"], chain(base) if base is not None else [])
