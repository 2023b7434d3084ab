"""A snapshot taken once and used by many tests, in this process and others."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

from vmm.testing.identity import digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import IO

    from vmm import Machine

LOOK = 0.1
MESSAGE_MAX = 20_000
"""Characters of a failure that are kept."""


class TriedError(Exception):
    """The machine a snapshot was to be taken of did not come up before, and is not tried again.

    Attributes:
        skipped: it was left out on purpose (`pytest.skip`), for the reason that is the message.
    """

    def __init__(self, message: str, skipped: bool = False) -> None:
        super().__init__(message)
        self.skipped = skipped


def shared_snapshot(
    base: Path,
    what: Iterable[object],
    boot: Callable[[], Machine],
    *,
    wait: float,
    who: str = "",
    failure: Callable[[BaseException], tuple[str, bool] | None] = lambda err: (str(err), False),
    again: bool = False,
) -> Path:
    """The directory under `base` with a snapshot of `what`, taken of `boot()`'s machine if new.

    One process boots while the others wait for it. Where it does not come up, that is remembered
    too, and told to whoever asks for the same.

    Args:
        what: all that the machine's state follows from; see `vmm.testing.identity`. What `boot`
            itself changes in it (it may keep a count) makes no difference.
        boot: makes the machine, which the caller closes.
        wait: seconds another process may take for its boot.
        who: asks, for the message to those who ask later.
        failure: the message of what `boot` raised, and whether it is a reason to skip; None where
            it says nothing of the next try (an interrupt).
        again: try again what has failed.

    Raises:
        TriedError: it was tried, and failed; or another process takes too long.
    """
    what = list(what)
    key = _first(base, digest(what)[:32])
    directory, failed = base / key, base / f"{key}.failed"
    base.mkdir(parents=True, exist_ok=True)
    with _locked(base / f"{key}.lock", wait):
        if directory.is_dir():
            return directory
        if failed.exists() and not again:
            told = json.loads(failed.read_text())
            raise TriedError(told["message"], told["skipped"])
        failed.unlink(missing_ok=True)
        try:
            boot().snapshot(os.fspath(directory))
        except BaseException as err:
            found = failure(err)
            if found is not None:
                message, skipped = found
                if not skipped:
                    message = (
                        f"the machine of this snapshot did not come up for {who}, and is tried "
                        f"once a session: {message[:MESSAGE_MAX]}"
                    )
                with contextlib.suppress(OSError):
                    failed.write_text(json.dumps({"message": message, "skipped": skipped}))
            raise
        finally:
            now = digest(what)[:32]
            if now != key:
                with contextlib.suppress(OSError):
                    (base / f"{now}.same").write_text(key)
    return directory


def _first(base: Path, key: str) -> str:
    """The key under which what has `key` now was asked for first."""
    try:
        return (base / f"{key}.same").read_text() or key
    except OSError:
        return key


@contextlib.contextmanager
def _locked(path: Path, wait: float) -> Iterator[IO[str]]:
    until = time.monotonic() + wait
    with open(path, "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise TriedError(
                        f"another process has been booting this snapshot's machine for more than "
                        f"{wait:g} s ({path} is locked)"
                    ) from None
                time.sleep(LOOK)
        try:
            yield lock
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child this process has forked may hold it too
