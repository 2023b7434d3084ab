"""Between a disk and its image, while faults of the disk are set.

`Block` gives each request to `plan` in the order of its queue, before a worker carries it out; what
chance decides is decided there, so that it follows from the seed and that order. A request that is
delayed is held by nobody: no thread waits with it, and a reset or the machine's end has it hurried.
"""

from __future__ import annotations

import struct
from time import monotonic

from vmm.faults.rules import LayerFault
from vmm.faults.volatile import SECTOR, FaultyImage, WriteLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.faults.rules import Chance, Control
    from vmm.virtio.blk import Block, Storage
    from vmm.virtio.queue import Chain

    Work = Callable[[], None]

HEADER = 16
_RANGE = struct.Struct("<QII")


class Request:
    """A request on its way to the image.

    Attributes:
        what: `read`, `write`, `flush`, `discard` or `write zeroes`.
        offset: byte of the disk where it begins.
        chain: its buffers.
        work: carries it out, raising OSError; faults put theirs in its place.
        delay: seconds until then.
        until: the fault it waits for the end of, whatever `delay` is.
    """

    __slots__ = ("chain", "delay", "offset", "until", "what", "work")

    def __init__(self, what: str, offset: int, chain: Chain, work: Work) -> None:
        self.what = what
        self.offset = offset
        self.chain = chain
        self.work = work
        self.delay = 0.0
        self.until: DiskFault | None = None

    def data(self) -> list[memoryview]:
        """The guest's buffers: what is read or written, without header and status."""
        if self.what == "read":
            # The status is the last byte, wherever the driver has put it.
            *views, last = self.chain.writable
            return [*views, last[:-1]] if len(last) > 1 else views
        skip, views = HEADER, []
        for view in self.chain.readable:
            part = view[skip:]
            skip -= len(view) - len(part)
            if len(part):
                views.append(part)
        return views

    def sectors(self) -> list[range]:
        """The sectors it names."""
        first = self.offset // SECTOR
        if self.what in ("read", "write"):
            return [range(first, first + sum(map(len, self.data())) // SECTOR)]
        if self.what == "flush":
            return []
        data = b"".join(self.data())
        return [range(sector, sector + count) for sector, count, _ in _RANGE.iter_unpack(data)]


class DiskFault(LayerFault):
    """A fault of requests.

    Args:
        on: the kinds of request it may strike.
        sectors: those it may strike; None: all.
        after_flush: how many flushes must have been answered since it was set.
    """

    layer: DiskLayer

    def __init__(
        self,
        layer: DiskLayer,
        kind: str,
        details: dict[str, object],
        chance: Chance,
        on: tuple[str, ...],
        sectors: range | None = None,
        after_flush: int = 0,
    ) -> None:
        super().__init__(layer, kind, details)
        self.random = chance.random
        self._chance = chance
        self._on = on
        self._sectors = sectors
        self._flushes_left = after_flush

    def meets(self, request: Request) -> bool:
        """Whether it strikes `request`; called once for each, in order."""
        if request.what not in self._on or self._flushes_left > 0:
            return False
        wanted = self._sectors
        if wanted is not None and not any(
            sectors.start < wanted.stop and wanted.start < sectors.stop
            for sectors in request.sectors()
        ):
            return False
        if not self._chance.strikes():
            return False
        self.struck(request=self._chance.seen, what=request.what, sector=request.offset // SECTOR)
        return True

    def strike(self, request: Request) -> None:
        """Do it to `request`: change its `work` or its `delay`. Under the control's lock."""
        raise NotImplementedError

    def flushed(self) -> None:
        """A flush was carried out; its answer is next."""
        self._flushes_left -= 1


class DiskLayer:
    """The faults of `device`. In the way only while there are any.

    Attributes:
        image: what stands for the device's image then.
    """

    def __init__(self, device: Block, control: Control) -> None:
        self.device = device
        self.control = control
        assert not isinstance(device.image, FaultyImage)
        self.image = FaultyImage(device.image)
        self._faults: tuple[DiskFault, ...] = ()
        self._held: dict[int, tuple[Work, DiskFault | None]] = {}
        self._count = 0

    # --- from whoever sets faults; under control.lock ---------------------------------------------

    def add(self, fault: DiskFault) -> None:
        """One more fault."""
        self._faults = (*self._faults, fault)
        self.stand()

    def remove(self, fault: DiskFault) -> None:
        """One fault less; what waits for its end goes on."""
        self._faults = tuple(other for other in self._faults if other is not fault)
        for number in [number for number, (_, until) in self._held.items() if until is fault]:
            self._release(number)
        self.stand()

    def keep_log(self, cache: int) -> None:
        """Keep what a power cut may take back, in so many bytes of memory."""
        self._adopt()
        self.image.log = WriteLog(self.image.base, cache)
        self.stand()

    def stand(self) -> None:
        """Be in the way, or not, as there is reason to."""
        device, ours = self.device, self.image
        if self._faults or ours.log is not None:
            self._adopt()
            device.faults = self
            device.image = ours
        else:
            if device.image is ours:
                device.image = ours.base
            device.faults = self if self._held else None  # it hurries them

    @property
    def storage(self) -> Storage:
        """The disk's image, and not what stands for it; whoever sets it has made all safe."""
        with self.control.lock:
            self._adopt()
            return self.image.base

    @storage.setter
    def storage(self, image: Storage) -> None:
        with self.control.lock:
            self.image.base = image
            if self.device.image is not self.image:
                self.device.image = image
            if self.image.log is not None:
                self.image.log.move(image)

    def _adopt(self) -> None:
        """The device's image of now: not always the one there was when this layer was made."""
        image = self.device.image
        if image is not self.image:
            assert not isinstance(image, FaultyImage)
            self.image.base = image

    # --- from the device --------------------------------------------------------------------------

    def plan(
        self, what: str, offset: int, chain: Chain, work: Work
    ) -> tuple[Work, Callable[[Work], None] | None]:
        """What is to be done for a request, and who takes it where it has to wait first.

        In the thread of its queue, in order; the queue's lock is held.
        """
        request = Request(what, offset, chain, work)
        if what == "flush":
            request.work = self._flush(work)
        with self.control.lock:  # another queue of this disk may be served at the same time
            for fault in self._faults:
                if fault.meets(request):
                    fault.strike(request)
        if request.delay or request.until is not None:
            return request.work, lambda job: self._hold(job, request)
        return request.work, None

    def _flush(self, work: Work) -> Work:
        def flush() -> None:
            work()
            with self.control.lock:
                for fault in self._faults:
                    fault.flushed()

        return flush

    def _hold(self, job: Work, request: Request) -> None:
        until = request.until
        with self.control.lock:
            self._count += 1
            number = self._count
            self._held[number] = job, until
            self.stand()
        if until is None:
            self.control.schedule.at(monotonic() + request.delay, lambda: self._release(number))
        elif not until.active:  # it was cleared a moment ago
            self._release(number)

    def _release(self, number: int) -> None:
        with self.control.lock:
            job, _ = self._held.pop(number, (None, None))
            if not self._held:
                self.stand()
        if job is not None:
            self.device.enqueue(job)

    def hurry(self) -> None:
        """Have what is held carried out now. From any thread."""
        for number in list(self._held):
            self._release(number)
