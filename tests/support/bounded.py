"""Calls that must return, whatever the guest or a peer does."""

from __future__ import annotations

import threading
from collections.abc import Callable

WITHIN = 8.0
"""Seconds that a call has: it takes milliseconds, or it waits for somebody who never comes."""


def within(what: str, function: Callable[[], object], seconds: float = WITHIN) -> None:
    """Call `function`, which must return; what it raises is raised."""
    failures: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as err:
            failures.append(err)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"{what} does not return within {seconds:g} s"
    if failures:
        raise failures[0]
