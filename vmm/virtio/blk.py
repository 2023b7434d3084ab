"""The block device (virtio 1.2, section 5.2).

Requests are handled in the thread that serves their queue, straight between the image and guest
memory: reads the page cache holds, and buffered writes. What would block (reads from the disk,
O_DIRECT, flushes, discards) goes to a few worker threads, so that one slow request does not hold up
those behind it. A flush is answered after fdatasync has returned, never before.

Whoever waits for the device (a pause, a checkpoint, a reset, the end) shall not wait for long,
whatever the guest asks for: what workers have before them is bounded, and a large request is
carried out in slices by its queue's thread, which puts it back into the queue when it is told to.
"""

from __future__ import annotations

import errno
import struct
from _queue import SimpleQueue
from _thread import allocate_lock

from vmm.errors import HostError, ShapeError, StateError
from vmm.virtio import spec
from vmm.virtio.device import Interrupted, VirtioDevice
from vmm.virtio.queue import QueueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from threading import Thread

    from vmm.block.nbd import NbdImage
    from vmm.block.overlay import Overlay
    from vmm.block.raw import RawImage
    from vmm.faults.disk_layer import DiskLayer
    from vmm.faults.volatile import FaultyImage
    from vmm.virtio.blk_kernel import DiskKernel
    from vmm.virtio.limit import Limit
    from vmm.virtio.queue import Chain
    from vmm.virtio.throttle import Throttle

    Storage = RawImage | NbdImage | Overlay
    Image = Storage | FaultyImage

SECTOR = 512
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY = 2, 5, 6, 9, 10
F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = 11, 12, 13, 14
RANGE_FEATURES = {T_DISCARD: F_DISCARD, T_WRITE_ZEROES: F_WRITE_ZEROES}
CONFIG = struct.Struct("<QII4xIBBHIBxHIIIIIB3x")
"""struct virtio_blk_config: capacity, size_max, seg_max, (geometry), blk_size, topology (4 fields),
writeback, num_queues, then limits of discard and of write zeroes."""
BLK_SIZE = 20
"""Offset of `blk_size` in it."""
WRITEBACK = 32
"""Offset of `writeback` in it."""
QUEUE_SIZE = 256
SEG_MAX = 254
"""Data segments in a request: a queue's worth less header and status."""
RANGE_MAX = 1 << 22
"""Sectors in one discard or write zeroes request (2 GiB)."""
RANGES = 64
ID_BYTES = 20
REQUEST_MAX = 1 << 30
"""Bytes in one read or write. Linux asks for far less; a guest that names its whole memory a
thousand times over in one request shall not keep a thread for hours."""
LARGE = 16 << 20
"""Bytes of a request that is carried out in slices. (Linux asks for 4 MiB at most by itself.)"""
SLICE = 4 << 20
"""Bytes read or written between two looks at `quiet`."""
RANGE_SLICE = 64 << 20
"""Bytes discarded or zeroed between two looks."""
BACKLOG = 64 << 20
"""Bytes of requests that workers have before them; more wait in the queue."""
BUFFER_COST = 1 << 10
"""Bytes that each buffer of a kept request counts for besides: it costs this process 200, and time
in each run of the garbage collector. A request of 512 bytes, or a flush, may name a thousand."""
WORKERS = 8

_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")


class Block(VirtioDevice):
    """A disk.

    Args:
        image: what is on it; closed with the device.
        serial: up to 20 bytes, what the guest finds as /sys/block/vd*/serial.
        queues: how many request queues.
        stop_when_full: where there is no space left for a write, have the machine paused, and
            write again when it goes on; else the guest is told of an error.
        discard: offer discards, and zeroes that give back space.
        block_size: bytes of a logical block, a power of two from 512 to 4096.
        physical_size: bytes of a physical block, no smaller.
    """

    ID = spec.ID_BLOCK

    def __init__(
        self,
        image: Storage,
        *,
        serial: str = "",
        queues: int = 1,
        stop_when_full: bool = False,
        discard: bool = True,
        block_size: int = SECTOR,
        physical_size: int = 4096,
        name: str = "blk",
    ) -> None:
        self.QUEUES = (QUEUE_SIZE,) * queues
        features = spec.bits(F_SEG_MAX, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_MQ)
        if image.readonly:
            features |= 1 << F_RO
        else:
            features |= spec.bits(F_WRITE_ZEROES, *([F_DISCARD] if discard else []))
        self.FEATURES = features
        super().__init__(name)
        self.image: Image = image
        self.serial = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self.stop_when_full = stop_when_full
        self._throttle: Throttle | None = None
        self._kernel: DiskKernel | None = None
        self.capacity = image.size // SECTOR
        self.config[:] = CONFIG.pack(
            self.capacity, 0, SEG_MAX, block_size,
            (physical_size // block_size).bit_length() - 1, 0, 0, 0,
            1, queues, RANGE_MAX, RANGES, 8, RANGE_MAX, RANGES, int(discard),
        )  # fmt: skip
        self._writeback = True
        self._closing = False
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._workers: list[Thread] = []
        self._parked: list[tuple[int, Callable[[], None]]] = []
        """(queue, job) of writes there was no space for."""
        self._backlog = self._stalled = 0
        """Bytes that the requests which workers have count for; a bit for each queue that waits for
        there to be fewer."""
        self._pending = 0
        self._pending_lock = allocate_lock()
        self._idle = allocate_lock()
        self.faults: DiskLayer | None = None
        """Takes part in requests while there are any; `image` is then one that only workers use."""

    @property
    def storage(self) -> Storage:
        """`image`, or what is below it while faults are in the way; to be set while it is still."""
        return self.image if self.faults is None else self.faults.storage  # type: ignore[return-value]

    @storage.setter
    def storage(self, image: Storage) -> None:
        if self.faults is None:
            self.image = image
        else:
            self.faults.storage = image

    # --- limits -------------------------------------------------------------------------------

    @property
    def limit(self) -> Limit:
        """Bytes and requests a second; `limit.change(bytes=..., ops=...)` at any time."""
        with self.control:
            if self._throttle is None:
                from vmm.virtio.throttle import Throttle

                self._throttle = Throttle(self, _payload)
            return self._throttle.limit

    def notify(self, index: int) -> None:
        if self._throttle is not None and self._throttle.limit.active:
            self._throttle.serve(index)
        elif self._kernel is None or not self._kernel.serve(index):
            super().notify(index)

    def offered(self) -> int:
        from vmm.block.raw import RawImage
        from vmm.virtio import kernel

        plain = type(self.storage) is RawImage and not self.storage.direct
        return kernel.only_split(self.features) if plain else self.features

    @property
    def buffers_writes(self) -> bool:
        """Whether a write is done when the page cache has it."""
        return self._writeback and not self.image.direct and not self.image.readonly

    # --- requests -----------------------------------------------------------------------------

    def request(self, index: int, chain: Chain) -> int | None:
        readable, writable = chain.readable, chain.writable
        if not writable:
            raise QueueError("a block request without room for its status")
        if readable and len(readable[0]) == 16:
            kind, _, sector = _HEADER.unpack_from(readable[0])
            out = readable[1:]
        else:
            kind, sector, out = self._header(chain)
        # The status is the last byte, however the driver has laid the buffers out (2.7.4.1).
        last = writable[-1]
        if len(last) == 1:
            status, into = last, writable[:-1]
        else:
            status, into = last[-1:], [*writable[:-1], last[:-1]]
        size = 0
        for view in into:
            size += len(view)
        if kind == T_IN:
            offset = sector * SECTOR
            if not self._in_range(sector, size) or size > REQUEST_MAX:
                status[0] = S_IOERR
                return 1
            if size > LARGE and self.faults is None:
                try:
                    self._sliced(self.image.read, into, offset)
                except OSError as err:
                    return self._failed(status, "read", offset, err)
                status[0] = S_OK
                return size + 1
            try:
                if not self.image.direct and self.image.read_cached(into, offset, size):
                    status[0] = S_OK
                    return size + 1
            except OSError as err:
                return self._failed(status, "read", offset, err)
            return self._later(index, chain, status, "read", offset, size, size + 1,
                               lambda: self.image.read(into, offset))  # fmt: skip
        if kind == T_OUT:
            return self._out(index, chain, status, sector, out)
        if kind == T_FLUSH:
            return self._later(index, chain, status, "flush", 0, 0, 1, self.image.flush)
        if kind == T_GET_ID:
            written = min(size, ID_BYTES)
            chain.write(self.serial[:written])
            status[0] = S_OK
            return written + 1
        if kind in (T_DISCARD, T_WRITE_ZEROES) and self.has(RANGE_FEATURES[kind]):
            return self._ranges(index, chain, status, kind, out)
        status[0] = S_UNSUPP
        return 1

    def _header(self, chain: Chain) -> tuple[int, int, list[memoryview]]:
        """Header and data where the header does not have a buffer of its own."""
        need, head, out = _HEADER.size, b"", []
        for view in chain.readable:
            part = min(need, len(view))
            head += view[:part]
            need -= part
            if part < len(view):
                out.append(view[part:])
        if need:
            raise QueueError("a block request shorter than its header")
        kind, _, sector = _HEADER.unpack(head)
        return kind, sector, out

    def _in_range(self, sector: int, size: int) -> bool:
        """Whether `size` bytes from `sector` on are whole sectors of this disk."""
        return not size % SECTOR and sector + size // SECTOR <= self.capacity and size > 0

    def _out(
        self, index: int, chain: Chain, status: memoryview, sector: int, out: list[memoryview]
    ) -> int | None:
        size = 0
        for view in out:
            size += len(view)
        image = self.image
        if image.readonly or not self._in_range(sector, size) or size > REQUEST_MAX:
            status[0] = S_IOERR
            return 1
        offset = sector * SECTOR
        large = size > LARGE and self.faults is None
        if large or (self._writeback and not image.direct):
            try:
                if large:
                    self._sliced(image.write, out, offset)
                else:
                    image.write(out, offset)
                if not self._writeback:
                    image.flush()
                status[0] = S_OK
                return 1
            except OSError as err:
                if not self._is_full(err):
                    return self._failed(status, "write", offset, err)

        def write() -> None:
            image.write(out, offset)
            if not self._writeback:
                image.flush()

        return self._later(index, chain, status, "write", offset, size, 1, write)

    def _sliced(
        self,
        carry_out: Callable[[Sequence[memoryview], int], None],
        views: list[memoryview],
        offset: int,
    ) -> None:
        """Read or write a large request. Raises Interrupted: it is to be carried out again."""
        for part, size in slices(views, SLICE):
            if self.quiet:
                raise Interrupted
            carry_out(part, offset)
            offset += size

    def _ranges(
        self, index: int, chain: Chain, status: memoryview, kind: int, out: list[memoryview]
    ) -> int | None:
        """Discard and write zeroes (5.2.6.1)."""
        size = sum(map(len, out))
        if not size or size % _RANGE.size or size > RANGES * _RANGE.size:
            status[0] = S_IOERR
            return 1
        data = b"".join(out)
        ranges = []
        for sector, count, flags in _RANGE.iter_unpack(data):
            if flags & ~1 or (flags and kind == T_DISCARD):
                status[0] = S_UNSUPP
                return 1
            if count > RANGE_MAX or not self._in_range(sector, count * SECTOR):
                status[0] = S_IOERR
                return 1
            ranges.append((sector * SECTOR, count * SECTOR, bool(flags)))
        image = self.image

        def carry_out(offset: int, size: int, unmap: bool) -> None:
            if kind == T_DISCARD:
                try:
                    image.discard(offset, size)
                except OSError as err:
                    if err.errno != errno.EOPNOTSUPP:  # a discard is advice
                        raise
            else:
                image.write_zeroes(offset, size, unmap=unmap)

        def work() -> None:
            for each in ranges:
                carry_out(*each)
            if kind == T_WRITE_ZEROES and not self._writeback:
                image.flush()

        name, total = "discard" if kind == T_DISCARD else "write zeroes", 0
        for _, size, _ in ranges:
            total += size
        if total > LARGE and self.faults is None:
            try:
                for offset, size, unmap in ranges:
                    end = offset + size
                    while offset < end:  # at multiples: a format's blocks stay whole
                        if self.quiet:
                            raise Interrupted
                        part = min(RANGE_SLICE - offset % RANGE_SLICE, end - offset)
                        carry_out(offset, part, unmap)
                        offset += part
                if kind == T_WRITE_ZEROES and not self._writeback:
                    image.flush()
                status[0] = S_OK
                return 1
            except OSError as err:
                if not self._is_full(err):
                    return self._failed(status, name, ranges[0][0], err)
        return self._later(index, chain, status, name, ranges[0][0], total, 1, work)

    def _failed(self, status: memoryview, what: str, offset: int, err: OSError) -> int:
        if getattr(err, "injected", False):
            status[0] = S_UNSUPP if err.errno == errno.EOPNOTSUPP else S_IOERR
            return 1
        status[0] = S_IOERR
        self.complain(f"{self.image.path}: {what} at byte {offset}: {err.strerror or err}")
        return 1

    # --- workers ------------------------------------------------------------------------------

    def _later(
        self,
        index: int,
        chain: Chain,
        status: memoryview,
        what: str,
        offset: int,
        size: int,
        written: int,
        work: Callable[[], None],
    ) -> int | None:
        """Have a worker do it and give the chain back; None, as `request` answers then.

        `size`: bytes of data.

        Raises Interrupted: they have enough to do; the queue is looked at again later.
        """
        queue = self.slots[index].queue
        assert queue is not None
        size += BUFFER_COST * (len(chain.readable) + len(chain.writable))
        hold = None
        if self.faults is not None:
            work, hold = self.faults.plan(what, offset, chain, work)

        def job() -> None:
            nonlocal size
            try:
                work()
                status[0] = S_OK
                count = written
            except OSError as err:
                if self._is_full(err):
                    self._park(index, job, f"{what}: {err.strerror}")
                    return
                count = self._failed(status, what, offset, err)
            finally:
                self._done(size)
                size = 0  # a job that was parked is begun once more
            self.finish(index, queue, chain, count)

        with self._pending_lock:
            if self._backlog and self._backlog + size > BACKLOG and hold is None:
                self._stalled |= 1 << index
                raise Interrupted
            self._backlog += size
            self._put([job], hold)
        return None

    def _done(self, size: int) -> None:
        """A worker has done a request that counted for `size` bytes."""
        with self._pending_lock:
            self._backlog -= size
            if not self._stalled or self._backlog > BACKLOG // 2:
                return
            stalled, self._stalled = self._stalled, 0
        for index in range(len(self.slots)):
            if stalled >> index & 1:
                self.wake(index)

    def _put(
        self,
        jobs: list[Callable[[], None]],
        hold: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Give jobs to the workers, or to `hold`, for `enqueue` later; under `_pending_lock`."""
        for job in jobs:
            if not self._pending:
                self._idle.acquire()
            self._pending += 1
            if len(self._workers) < min(self._pending, WORKERS):
                self._start_worker()
            (hold or self._jobs.put)(job)

    def enqueue(self, job: Callable[[], None]) -> None:
        """A job that was held goes on; from any thread."""
        self._jobs.put(job)

    def _start_worker(self) -> None:
        import threading

        thread = threading.Thread(target=self._work, name=f"{self.name}-io", daemon=True)
        self._workers.append(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                if not self._closing:
                    job()
            except BaseException as err:
                self.on_bug(err)
            finally:
                with self._pending_lock:
                    self._pending -= 1
                    if not self._pending:
                        self._idle.release()

    # --- no space left ------------------------------------------------------------------------

    def _is_full(self, err: OSError) -> bool:
        return self.stop_when_full and err.errno in (errno.ENOSPC, errno.EDQUOT)

    def _park(self, index: int, job: Callable[[], None], why: str) -> None:
        with self._pending_lock:
            self._parked.append((index, job))
        self.on_stop(f"{self.name}: {self.image.path}: {why}")

    def resumed(self) -> None:
        with self.control, self._pending_lock:  # no reset is under way: it would not wait for them
            parked, self._parked = self._parked, []
            self._put([job for _, job in parked])

    def give_back(self) -> None:
        if self._parked:
            raise StateError(f"{self.name}: {len(self._parked)} writes wait for space on the host")

    # --- growth -------------------------------------------------------------------------------

    def resize(self, size: int | None = None) -> int:
        """Have the disk grow to `size` bytes, or to what its image has become meanwhile, and tell
        the guest; the new size in bytes. From any thread.

        Raises:
            UsageError: a smaller size, or one that is not whole blocks, or that cannot be had.
            StateError: a checkpoint or clones share the disk.
            HostError: no space for it.
        """
        from vmm.block import growth

        self.hold()
        try:
            image = self.storage
            wanted = image.found() if size is None else size
            block = int.from_bytes(self.config[BLK_SIZE : BLK_SIZE + 4], "little")
            if size is None:
                wanted -= wanted % block
            growth.check(self.name, wanted, image.size, block)
            image.grow(wanted)
            self.capacity = image.size // SECTOR
            if self._kernel is not None:
                self._kernel.resized()
            grown = self.config[:8] != self.capacity.to_bytes(8, "little")
            self.config[:8] = self.capacity.to_bytes(8, "little")
        except OSError as err:
            raise HostError(f"{self.name}: {self.image.path}: {err.strerror or err}") from err
        finally:
            self.release()
        if grown:
            self.config_changed()
        return self.capacity * SECTOR

    CONFIG_STATE = ((WRITEBACK, WRITEBACK + 1),)

    def restore(self, state: dict[str, object]) -> None:
        config = state["config"]
        if not isinstance(config, bytes) or config[:8] != self.config[:8]:
            raise ShapeError(f"state of {self.name}: its disk did not have {self.capacity} sectors")
        super().restore(state)

    # --- life ---------------------------------------------------------------------------------

    def drain(self) -> None:
        if self.faults is not None:
            self.faults.hurry()
        with self._idle:
            pass

    def started(self) -> None:
        if not self.has(F_FLUSH):
            self.config[WRITEBACK] = 0  # 5.2.5.2: who cannot flush gets write-through
        self._writeback = bool(self.config[WRITEBACK])
        if self._kernel is None:
            from vmm.virtio import blk_kernel

            self._kernel = blk_kernel.make(self)

    def stopped(self) -> None:
        self._parked.clear()
        self.config[WRITEBACK] = 1

    def queue_stopped(self, index: int) -> None:
        self._parked = [each for each in self._parked if each[0] != index]

    def config_written(self, offset: int, data: bytes) -> None:
        if offset == WRITEBACK and len(data) == 1 and self.has(F_CONFIG_WCE):
            self.config[WRITEBACK] = data[0] & 1
            self._writeback = bool(data[0] & 1)

    def halt(self) -> None:
        """Take no more requests, for good; on return none is under way."""
        with self.control:
            self._silence()

    def ended(self, until: float | None) -> bool:
        self._closing = True
        if not self._workers:
            return True
        import time

        if self.faults is not None:
            self.faults.hurry()
        for _ in self._workers:
            self._jobs.put(None)
        ended = True
        for thread in self._workers:
            thread.join(None if until is None else max(until - time.monotonic(), 0))
            if thread.is_alive():
                from vmm import held_up

                ended &= held_up.join(thread)
        return ended

    def close(self) -> None:
        """End the workers and close the image."""
        if self._throttle is not None:
            self._throttle.alarm.close()
        self._closing = True
        self._silence()
        for _ in self._workers:
            self._jobs.put(None)
        for thread in self._workers:
            thread.join()
        self._workers = []
        self.image.close()


def slices(views: Sequence[memoryview], size: int) -> Iterator[tuple[list[memoryview], int]]:
    """`views` in pieces of `size` bytes, the last one of what is left; and the bytes of each."""
    piece: list[memoryview] = []
    room = size
    for view in views:
        at = 0
        while at < len(view):
            part = view[at : at + room]
            piece.append(part)
            at += len(part)
            room -= len(part)
            if not room:
                yield piece, size
                piece, room = [], size
    if piece:
        yield piece, size - room


def _payload(chain: Chain) -> int:
    """Bytes of data in a request: all but header and status."""
    size = chain.readable_size() + chain.writable_size() - _HEADER.size - 1
    return min(max(size, 0), REQUEST_MAX)
