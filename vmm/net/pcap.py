"""`,pcap=FILE`: what passes a network card, as tcpdump and Wireshark read it (pcap(5)).

Frames are recorded as the guest has them: with segmentation offload they are up to 64 KiB long, and
those whose checksum was left to others do not have it yet.
"""

from __future__ import annotations

import os
import struct
import time
from _thread import allocate_lock

from vmm.errors import UsageError
from vmm.net.port import Port, collect
from vmm.virtio.net_spec import HEADER_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC_NANOSECONDS = 0xA1B23C4D
FILE_HEADER = struct.Struct("<IHHiIII")
"""magic, major, minor, zone, accuracy, snapshot length, link type."""
RECORD = struct.Struct("<IIII")
"""seconds, nanoseconds, bytes here, bytes of the frame."""
SNAP_LENGTH = 262144
ETHERNET = 1
BUFFER = 1 << 20


class Capture:
    """A capture file, written through a buffer. Safe for several threads.

    A reader finds all that has passed once the card is idle: see `flush`.
    """

    def __init__(self, path: str) -> None:
        try:
            # What passes on a network is for its user alone, as with dumpcap.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self._file = open(fd, "wb", BUFFER)  # noqa: SIM115 (closed by `close`)
        except OSError as err:
            raise UsageError(
                f"--net pcap={path}: {err.strerror}; give a file that can be written"
            ) from err
        self._lock = allocate_lock()
        self._path = path
        self.error = ""
        self._dirty = True
        self._file.write(FILE_HEADER.pack(MAGIC_NANOSECONDS, 2, 4, 0, 0, SNAP_LENGTH, ETHERNET))
        self.flush()

    def record(self, views: Sequence[memoryview], size: int) -> None:
        """Write one frame: `size` bytes of `views`, of which the first 12 are left out."""
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        with self._lock:
            if self._file.closed:
                return
            try:
                self._dirty = True
                left = size - HEADER_SIZE
                self._file.write(RECORD.pack(seconds, nanoseconds, left, left))
                skip = HEADER_SIZE
                for view in views:
                    part = view[skip : skip + left]
                    skip = max(skip - len(view), 0)
                    left -= len(part)
                    self._file.write(part)
                    if not left:
                        break
            except OSError as err:  # the disk is full: the guest goes on
                self._fail(err)

    def flush(self) -> None:
        """Put what was recorded into the file: after a batch of frames, and when there are no more
        for now. At most BUFFER bytes wait for it."""
        if not self._dirty:
            return
        with self._lock:
            self._dirty = False
            if self._file.closed:
                return
            try:
                self._file.flush()
            except OSError as err:
                self._fail(err)

    def _fail(self, err: OSError) -> None:
        from contextlib import suppress

        self.error = f"--net pcap={self._path}: {err.strerror}; the capture ends here"
        with suppress(OSError):
            self._file.close()

    def close(self) -> None:
        """Write what is left; harmless twice."""
        with self._lock:
            try:
                self._file.close()
            except OSError as err:
                self._fail(err)


class FifoCapture(Capture):
    """A capture that another program reads from a FIFO (`wireshark -k -i FIFO`).

    Neither the machine's start nor a frame waits for the reader: what does not fit into the pipe
    is left out, frame by frame.
    """

    def __init__(self, path: str) -> None:
        from vmm.fifo import Records

        try:
            self._records = Records(path)
        except OSError as err:
            raise UsageError(
                f"--net pcap={path}: {err.strerror}; give a FIFO that can be opened"
            ) from err
        self._lock = allocate_lock()
        self._path = path
        self.error = ""
        self._records.send(FILE_HEADER.pack(MAGIC_NANOSECONDS, 2, 4, 0, 0, SNAP_LENGTH, ETHERNET))

    def record(self, views: Sequence[memoryview], size: int) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        frame = bytes(collect(views, size)[HEADER_SIZE:])
        record = RECORD.pack(seconds, nanoseconds, len(frame), len(frame)) + frame
        with self._lock:
            if not self.error:
                try:
                    self._records.send(record)
                except OSError as err:
                    self.error = f"--net pcap={self._path}: {err.strerror}; the capture ends here"

    def flush(self) -> None:
        with self._lock:
            if not self.error:
                try:
                    self._records.flush()
                except OSError as err:
                    self.error = f"--net pcap={self._path}: {err.strerror}; the capture ends here"

    def close(self) -> None:
        self.flush()
        with self._lock:
            if self._records.dropped and not self.error:
                self.error = (
                    f"--net pcap={self._path}: its reader was slow or away; "
                    f"{self._records.dropped} frames are not in it"
                )
            self._records.close()


def open_capture(path: str) -> Capture:
    """The capture that writes to `path`, a file or a FIFO. UsageError where it cannot be."""
    from vmm.fifo import is_fifo

    return FifoCapture(path) if is_fifo(path) else Capture(path)


class CapturePort(Port):
    """`port`, with what passes recorded."""

    def __init__(self, port: Port, capture: Capture) -> None:
        self._port = port
        self._capture = capture

    @property
    def fd(self) -> int:  # type: ignore[override]
        return self._port.fd

    @property
    def blocked(self) -> bool:  # type: ignore[override]
        return self._port.blocked

    @property
    def dropped(self) -> int:
        return self._port.dropped

    @dropped.setter
    def dropped(self, count: int) -> None:
        self._port.dropped = count

    def read(self, views: list[memoryview]) -> int:
        size = self._port.read(views)
        if size > HEADER_SIZE:
            self._capture.record(views, size)
        else:
            self._capture.flush()
        return size

    def write(self, views: Sequence[memoryview]) -> bool:
        self._capture.record(views, sum(map(len, views)))
        return self._port.write(views)

    def flush(self) -> bool:
        self._capture.flush()
        return self._port.flush()

    def resume(self) -> None:
        self._port.resume()
