"""`machine.faults.disk(n)`: what can be wrong with a disk, set and cleared while it is used."""

from __future__ import annotations

import errno as errors
import os
from contextlib import ExitStack, suppress

from vmm.block.vector import whole
from vmm.errors import HostError, StateError, UsageError
from vmm.faults import disk_kinds as kinds
from vmm.faults.disk_layer import DiskFault, DiskLayer
from vmm.faults.rules import Chance, seconds
from vmm.faults.volatile import CACHE, SECTOR, Cut, copy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, TypedDict, TypeVar, Unpack

    from vmm.faults.rules import Control, Fault
    from vmm.faults.volatile import WriteLog
    from vmm.virtio.blk import Block

    Kind = TypeVar("Kind", bound=DiskFault)

    class Which(TypedDict, total=False):
        """Which requests a fault strikes, see `DiskFaults`."""

        sectors: range | int
        nth: int | Iterable[int]
        after: int
        times: int
        probability: float
        after_flush: int


REQUESTS = ("read", "write", "flush", "discard", "write zeroes")
KEEP = {"none": 0.0, "some": 0.5, "all": 1.0}


class DiskFaults:
    """The faults of one disk. All methods from any thread.

    What a fault strikes is said by the same words everywhere:

    - `on`: a kind of request, or several: `read`, `write`, `flush`, `discard`, `write zeroes`; or
      `any`.
    - `sectors`: a `range` of sectors of 512 bytes, or the number of one; requests that touch it.
    - `nth`: the n-th such request from now on, counted from 1, or several of them.
    - `after`, `times`: not the first so many; so many at most.
    - `probability`: of each that is left, from 0 to 1.
    - `after_flush`: not before so many flushes have been answered.

    A fault is in force until `clear()` of what is returned, or the end of a `with` block. Each
    raises UsageError for a value that cannot work.

    Args:
        name: begins an error's message.
    """

    def __init__(self, device: Block, control: Control, name: str) -> None:
        self._device = device
        self._control = control
        self._name = name
        self._layer = DiskLayer(device, control)

    # --- requests ---------------------------------------------------------------------------------

    def fail(
        self,
        on: str | Iterable[str] = ("read", "write", "flush"),
        *,
        errno: int = errors.EIO,
        **which: Unpack[Which],
    ) -> Fault:
        """Have requests fail.

        The guest sees an I/O error, whatever `errno` is; ENOSPC pauses a machine whose disk has
        `werror=stop`, and EOPNOTSUPP says that the disk does not know the request.
        """
        if not isinstance(errno, int) or errno not in errors.errorcode:
            raise UsageError(f"{self._name}.fail: errno={errno!r} is not one of errno's, say EIO")
        fault = self._make(kinds.Fail, "fail", on, which, errno=errors.errorcode[errno])
        fault.errno = errno
        return fault.set()

    def latency(
        self,
        delay: float,
        jitter: float = 0.0,
        on: str | Iterable[str] = "any",
        **which: Unpack[Which],
    ) -> Fault:
        """Have requests wait for `delay` seconds and up to `jitter` more, each by itself."""
        where = f"{self._name}.latency"
        delay, jitter = seconds(where, "delay", delay), seconds(where, "jitter", jitter)
        fault = self._make(kinds.Latency, "latency", on, which, delay=delay, jitter=jitter)
        fault.delay, fault.jitter = delay, jitter
        return fault.set()

    def gone(self, *, silent: bool = False) -> Fault:
        """Take the disk away until the fault is cleared: all requests fail or, if it is `silent`,
        are answered when it is back. (Reset by its driver before, they fail.)"""
        fault = self._make(kinds.Gone, "gone", "any", {}, silent=silent)
        fault.silent = silent
        return fault.set()

    def short_read(
        self, keep: int | None = None, *, silent: bool = False, **which: Unpack[Which]
    ) -> Fault:
        """Have reads give the first `keep` bytes only (None: chance says how many) and fail.

        If it is `silent` they are answered as if they were whole; the rest of the guest's buffers
        stays as it was.
        """
        if keep is not None and (not isinstance(keep, int) or keep < 0):
            raise UsageError(f"{self._name}.short_read: keep={keep!r} is not bytes from 0")
        fault = self._make(kinds.ShortRead, "short_read", "read", which, keep=keep, silent=silent)
        fault.keep, fault.silent = keep, silent
        return fault.set()

    def drop(self, on: str | Iterable[str] = "write", **which: Unpack[Which]) -> Fault:
        """Have requests answered and not carried out: lost writes or, with `on="flush"`, a disk
        that lies about what is safe. (Flushes matter to a power cut, see `volatile`.)"""
        if "read" in self._kinds("drop", on):
            raise UsageError(
                f"{self._name}.drop: on={on!r}: a read cannot be dropped; there is short_read()"
            )
        return self._make(kinds.Drop, "drop", on, which).set()

    def torn(self, *, some: bool = False, **which: Unpack[Which]) -> Fault:
        """Have writes reach the disk in part: the first few sectors or, with `some`, any of them;
        chance says how many. They are answered as if they were whole."""
        fault = self._make(kinds.Torn, "torn", "write", which, some=some or None)
        fault.some = some
        return fault.set()

    def corrupt(self, on: str | Iterable[str] = "read", **which: Unpack[Which]) -> Fault:
        """Have one bit flipped in what a read gives, or in what a write puts on the disk."""
        if not set(self._kinds("corrupt", on)) <= {"read", "write"}:
            raise UsageError(f"{self._name}.corrupt: on={on!r} is not read or write")
        return self._make(kinds.Corrupt, "corrupt", on, which).set()

    def clear(self) -> None:
        """Clear every fault of this disk. `volatile` stays."""
        for fault in reversed(self._control.faults):
            if isinstance(fault, DiskFault) and fault.layer is self._layer:
                fault.clear()

    # --- power cuts -------------------------------------------------------------------------------

    def volatile(self, cache: int = CACHE) -> None:
        """Give the disk a volatile cache: from now on a power cut may take back what the guest has
        written and not flushed.

        Args:
            cache: bytes of memory for it, 64 MiB if not given; beyond, the oldest writes are safe,
                as a disk's cache is written out when it is full.
        """
        if not isinstance(cache, int) or cache < SECTOR:
            raise UsageError(f"{self._name}.volatile: cache={cache!r} is not at least 512 bytes")
        with self._control.lock:
            if self._device.image.readonly:
                raise UsageError(f"{self._name}.volatile: the disk is readonly: nothing is written")
            if self._layer.image.log is None:
                self._layer.keep_log(cache)
        self._device.settle()
        self._control.record(self._device.name, "volatile", "set", {"cache": cache})

    def durable(self) -> None:
        """Take the volatile cache away: what was written is safe. Harmless without one."""
        with self._control.lock:
            if self._layer.image.log is None:
                return
            self._layer.image.log = None
            self._layer.stand()
        self._control.record(self._device.name, "volatile", "cleared", {})

    @property
    def unflushed(self) -> int:
        """Writes that a power cut may take back now."""
        return self.write_log("unflushed").unflushed

    def power_cut_image(self, path: str, keep: str | float = "some", *, torn: float = 0.5) -> Cut:
        """Write to `path` what the disk would hold after a power cut now; the guest goes on.

        What was written before the last flush that has been answered is in it. `keep` and `torn`
        as in `Faults.power_cut`. A file that is there already is replaced.
        """
        where = f"{self._name}.power_cut_image"
        [cut] = cut_images([(self, path)], *check_cut(where, keep, torn))
        return cut

    def write_cut(self, path: str, keep: float, torn: float) -> Cut:
        """The file of `power_cut_image`; the log's lock is held."""
        where, log = f"{self._name}.power_cut_image", self.write_log("power_cut_image")
        image, chance = self._layer.image.base, self._control.stream(self._device.name, "power cut")
        path = os.fspath(path)
        if os.path.exists(path) and os.path.samefile(path, image.path):
            raise UsageError(f"{where}: {path} is the disk itself")
        unfinished = f"{path}.{os.getpid()}.part"
        try:
            fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                copy(image, fd)
                cut = log.cut(
                    lambda at, data: whole(os.pwritev, fd, [memoryview(data)], at),
                    keep, torn, chance,
                )  # fmt: skip
            finally:
                os.close(fd)
            os.rename(unfinished, path)
        except OSError as err:
            with suppress(OSError):
                os.unlink(unfinished)
            raise HostError(f"{where}: {path}: {os.strerror(err.errno or errors.EIO)}") from err
        self._control.record(
            self._device.name, "power cut", "struck",
            {"image": path, "lost": cut.lost, "kept": cut.kept, "torn": cut.torn},
        )  # fmt: skip
        return cut

    def cut(self, keep: float, torn: float) -> Cut:
        """Make the image itself what a power cut leaves; no request may be under way."""
        log = self.write_log("power_cut")
        image, chance = self._layer.image.base, self._control.stream(self._device.name, "power cut")
        with log.lock:
            cut = log.cut(lambda at, data: image.write([memoryview(data)], at), keep, torn, chance)
            log.forget()
        self._control.record(
            self._device.name, "power cut", "struck",
            {"lost": cut.lost, "kept": cut.kept, "torn": cut.torn},
        )  # fmt: skip
        return cut

    @property
    def is_volatile(self) -> bool:
        """Whether `volatile` was called."""
        return self._layer.image.log is not None

    @property
    def device(self) -> Block:
        """The device."""
        return self._device

    def write_log(self, call: str) -> WriteLog:
        """What a power cut may take back. StateError, in the name of `call`, without."""
        log = self._layer.image.log
        if log is None:
            raise StateError(
                f"{self._name}.{call}: nobody knows what a power cut would take; call "
                f"{self._name}.volatile() before the guest writes"
            )
        return log

    # --- making faults ----------------------------------------------------------------------------

    def _kinds(self, call: str, on: str | Iterable[str]) -> tuple[str, ...]:
        given = (on,) if isinstance(on, str) else tuple(on)
        if given == ("any",):
            return REQUESTS
        for each in given:
            if each not in REQUESTS:
                raise UsageError(
                    f"{self._name}.{call}: on={each!r} is not one of {', '.join(REQUESTS)}, any"
                )
        if not given:
            raise UsageError(f"{self._name}.{call}: on is empty; say what is to be struck")
        return given

    def _make(
        self,
        kind: Callable[..., Kind],
        name: str,
        on: str | Iterable[str],
        which: Which,
        **details: object,
    ) -> Kind:
        where = f"{self._name}.{name}"
        requests = self._kinds(name, on)
        unknown = which.keys() - {"sectors", "nth", "after", "times", "probability", "after_flush"}
        if unknown:
            raise TypeError(f"{where}: no such keyword: {', '.join(sorted(unknown))}")
        conditions: dict[str, Any] = {**which}
        sectors = self._sectors(where, conditions.pop("sectors", None))
        if sectors is not None and "flush" in requests:
            if isinstance(on, str) and on == "flush":
                raise UsageError(f"{where}: a flush has no sectors; leave sectors= out")
            requests = tuple(each for each in requests if each != "flush")
        flushes = conditions.pop("after_flush", 0)
        if not isinstance(flushes, int) or flushes < 0:
            raise UsageError(f"{where}: after_flush={flushes!r} is not a count from 0")
        chance = Chance(where, self._control.stream(self._device.name, name), **conditions)
        details = {"on": on if isinstance(on, str) else requests, **details, **which}
        return kind(self._layer, name, details, chance, requests, sectors, flushes)

    def _sectors(self, where: str, sectors: object) -> range | None:
        if sectors is None:
            return None
        if isinstance(sectors, int) and not isinstance(sectors, bool):
            sectors = range(sectors, sectors + 1)
        last = self._device.capacity
        if not isinstance(sectors, range) or sectors.step != 1:
            raise UsageError(f"{where}: sectors={sectors!r} is not a range, or a number")
        if not 0 <= sectors.start < sectors.stop <= last:
            raise UsageError(f"{where}: sectors={sectors!r} is not within the {last} there are")
        return sectors


def cut_images(disks: Sequence[tuple[DiskFaults, str]], keep: float, torn: float) -> list[Cut]:
    """What each disk would hold after a power cut at one moment for all, in the file beside it."""
    with ExitStack() as stack:
        for disk, _ in disks:
            stack.enter_context(disk.write_log("power_cut_image").lock)
        return [disk.write_cut(path, keep, torn) for disk, path in disks]


def check_cut(where: str, keep: str | float, torn: float) -> tuple[float, float]:
    """`keep` and `torn` of a power cut as probabilities. Raises UsageError."""
    value = KEEP.get(keep) if isinstance(keep, str) else keep
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UsageError(f"{where}: keep={keep!r} is not none, some, all or from 0 to 1")
    if not isinstance(torn, int | float) or not 0 <= torn <= 1:
        raise UsageError(f"{where}: torn={torn!r} is not from 0 to 1")
    return float(value), float(torn)
