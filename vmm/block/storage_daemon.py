"""Image formats other than raw: qemu-storage-daemon opens the image.

It is the code QEMU itself has for qcow2 and the others, in a process of its own. That serves the
guest's queues (vhost-user-blk), or, where a drive wants what such a disk does not know, reads and
writes the image for a disk of this process (NBD).
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from vmm.block import layers
from vmm.errors import HostError, StateError, UsageError
from vmm.forked import drop_in_child
from vmm.virtio import spec
from vmm.virtio.blk import F_RO, S_IOERR, SECTOR
from vmm.virtio.queue import QueueError
from vmm.virtio.vhost_user import Listener, VhostUserDevice
from vmm.virtio.vhost_user_wire import SAYS_WITHIN, BackEndGone, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.block.drive import Drive
    from vmm.block.nbd import NbdImage
    from vmm.block.qmp import Qmp
    from vmm.block.remote_limit import RemoteLimit
    from vmm.child import Child
    from vmm.errors import VmmError
    from vmm.sandbox.helper import Confinement
    from vmm.virtio.queue import Chain

CONFIG_BYTES = 60
"""struct virtio_blk_config up to write zeroes (virtio 1.2, section 5.2.4)."""
NUM_QUEUES = 34
"""Offset of `num_queues` in it."""
QUEUE_SIZE = 128
GROUP = "limit"
"""The id of the throttle group."""
LIMITED = "limited"
"""The name of the node that keeps its limits."""
PROGRAM, PACKAGE = "qemu-storage-daemon", "qemu-system-common"


class ExternalDisk(VhostUserDevice):
    """A disk another process serves."""

    ID = spec.ID_BLOCK
    remote_limit: RemoteLimit | None = None
    monitor: Qmp | None = None
    """Of the daemon, if it is ours."""
    drive: Drive | None = None
    """What it serves then."""
    _grown = 0
    """Sectors that it was given: before QEMU 8 its configuration tells those it began with."""

    def __init__(
        self,
        name: str,
        connection: Connection,
        queues: int,
        *,
        child: Child | None = None,
        redial: Callable[[], Connection] | None = None,
        readonly: bool = False,
    ) -> None:
        self._readonly = readonly
        # qemu-storage-daemon (7.2) does not offer to keep a record of the requests it has taken,
        # and does when asked: the code is libvhost-user's. So it is known which ones to fail when
        # it has died.
        super().__init__(
            name,
            connection,
            (QUEUE_SIZE,) * queues,
            config=CONFIG_BYTES,
            child=child,
            redial=redial,
            inflight=child is not None,
        )

    @property
    def limit(self) -> RemoteLimit:
        """Bytes and requests a second, where the daemon was started with a limit: `change` it at
        any time. StateError where it was not."""
        if self.remote_limit is None:
            raise StateError(f"{self.name}: no limit to change; start with one, such as bps=100G")
        return self.remote_limit

    def resize(self, size: int | None = None) -> int:
        """Have the disk grow to `size` bytes, or look how many its back end gives it now, and tell
        the guest; the new size in bytes. From any thread.

        Raises:
            UsageError: a smaller size, or one that the format or the back end cannot have.
            HostError: the back end has ended.
        """
        if size is not None:
            if self.monitor is None or self.drive is None:
                raise UsageError(f"{self.name}: who serves this disk has it grow; then say no size")
            from vmm.block import growth

            growth.check(self.name, size, self._capacity(), SECTOR)
            _grow(self.monitor, self.drive, size)
            self._grown = size // SECTOR
        self.look_at_config()
        return self._capacity()

    def _capacity(self) -> int:
        return int.from_bytes(self.config[:8], "little") * SECTOR

    def close(self) -> None:
        super().close()
        if self.monitor is not None:
            self.monitor.close()

    def refuses(self, offered: int) -> str:
        writable = self._readonly and not offered >> F_RO & 1
        return "but serves the disk writable, and readonly was asked for" if writable else ""

    def differs(self, offered: int, config: bytes) -> str:
        words = []
        if offered >> F_RO & 1 and not self.features >> F_RO & 1:
            words.append("read-only now")
        before, now = (int.from_bytes(each[:8], "little") * 512 for each in (self.config, config))
        if now < before:
            words.append(f"with {now} bytes, not {before}")
        return " and ".join(words)

    def adapt(self, config: bytearray) -> None:
        sectors = max(int.from_bytes(config[:8], "little"), self._grown)
        config[:8] = sectors.to_bytes(8, "little")
        config[NUM_QUEUES : NUM_QUEUES + 2] = len(self.QUEUES).to_bytes(2, "little")

    def fail(self, chain: Chain) -> int:
        if not chain.writable:
            raise QueueError("a block request without room for its status")
        chain.writable[-1][-1] = S_IOERR
        return 1


def command(drive: Drive, monitor: int) -> tuple[list[str], Confinement]:
    """The daemon's arguments: what it opens, and the descriptor of a socket for its monitor; and
    what it needs for that. Raises UsageError, HostError."""
    import json

    more = []
    if drive.rate and drive.external:
        rate = drive.rate
        group = {"bps-total": rate.bps, "bps-total-max": rate.burst,
                 "iops-total": rate.ops, "iops-total-max": rate.ops_burst}  # fmt: skip
        given = "".join(f",limits.{name}={value}" for name, value in group.items() if value)
        more = [
            "--object", f"throttle-group,id={GROUP}{given}",
            "--blockdev", f"driver=throttle,node-name={LIMITED},throttle-group={GROUP},file=disk",
        ]  # fmt: skip
    from vmm.sandbox.helper import DEVICE, READ, SERVE, Confinement

    files: list[tuple[str, bool]] = []
    nodes = layers.nodes(drive, files)
    opened = [word for each in nodes for word in ("--blockdev", json.dumps(each))]
    rights: list[tuple[str | int, int]] = [
        (path, (SERVE if write else READ) | DEVICE) for path, write in files
    ]
    if any(node["driver"] == "host_device" for node in nodes):
        rights += [("/sys/dev/block", READ), ("/sys/devices", READ)]  # queue limits
    words = [*opened, *more, "--chardev", f"socket,id=qmp,fd={monitor}", "--monitor", "chardev=qmp"]
    return words, Confinement(rights)


def start(
    drive: Drive, connections: int, arguments: Callable[[int], list[str]]
) -> tuple[list[socket.socket], Child, Qmp]:
    """Start a daemon on the drive's image: our ends of so many connections to it, its process, its
    monitor. `arguments` are its further ones, for the descriptor that it listens on."""
    from vmm.block.qmp import Qmp
    from vmm.child import Child, find

    program = find(PROGRAM, PACKAGE)
    listener = Listener(connections)
    ours = theirs = None
    try:
        ours, theirs = socket.socketpair()
        drop_in_child(ours)
        fds = [listener.sock.fileno(), theirs.fileno()]
        words, confine = command(drive, fds[1])
        child = Child([program, *words, *arguments(fds[0])], confine, pass_fds=fds)
    except BaseException:
        listener.close()
        if ours is not None:
            ours.close()
        raise
    finally:
        if theirs is not None:
            theirs.close()
    return listener.take(), child, Qmp(ours)


def failed(drive: Drive, child: Child, err: BaseException) -> VmmError:
    """What to say where the daemon `child`, which is ended, did not come to serve an image."""
    name = "qemu-storage-daemon: "
    if isinstance(err, BackEndGone):
        said = err.reason(child)
    else:
        ended = not isinstance(err.__cause__, TimeoutError) and child.wait(SAYS_WITHIN)
        said = child.said() or (f"it {child.how()}" if ended else str(err))
    child.close()
    said = said.removeprefix(name)
    if said.startswith("--blockdev"):  # the image's fault: what could be told before, was
        reason = said.rpartition("}: ")[2]
        return UsageError(f"--drive {drive.path}: {name}{reason}")
    return HostError(f"--drive {drive.path}: {name}{said}")


def _top(drive: Drive) -> str:
    """The name of the node that is served."""
    return LIMITED if drive.rate and drive.external else layers.DISK


def _grow(monitor: Qmp, drive: Drive, size: int) -> None:
    """Have the image of `drive` grow. Raises UsageError, HostError."""
    try:
        monitor.ask("block_resize", **{"node-name": _top(drive), "size": size})
    except UsageError as err:
        raise UsageError(
            f"{drive.path}: this image (format={drive.format}) cannot grow to {size} bytes: {err}"
        ) from err


def open_disk(drive: Drive, name: str) -> ExternalDisk:
    """Start a daemon that serves the drive's image. Raises UsageError, HostError."""
    node = _top(drive)
    writable = "off" if drive.readonly else "on"
    (sock,), child, monitor = start(
        drive,
        1,
        lambda fd: [
            "--export",
            f"type=vhost-user-blk,id=export,node-name={node},addr.type=fd,addr.str={fd},"
            f"writable={writable},num-queues={drive.queues}",
        ],
    )
    connection = Connection(sock, PROGRAM)
    try:
        disk = ExternalDisk(name, connection, drive.queues, child=child)
    except BaseException as err:
        monitor.close()
        connection.close()
        if isinstance(err, BackEndGone):
            raise failed(drive, child, err) from err
        child.close()
        raise
    disk.monitor, disk.drive = monitor, drive
    if drive.rate:
        from vmm.block.remote_limit import RemoteLimit

        disk.remote_limit = RemoteLimit(monitor, GROUP, (drive.rate.bps, drive.rate.ops))
    return disk


def open_image(drive: Drive) -> NbdImage:
    """Start a daemon on the drive's image, which is only read under `snapshot`. Raises UsageError,
    HostError."""
    from vmm.block.nbd import NbdImage

    connections, child, _ = _serve(drive, None)
    later = drive
    with suppress(FileNotFoundError):  # this process's directory has been removed
        later = drive.from_directory(os.getcwd())  # the program may change to another
    try:
        return NbdImage(
            drive.path,
            connections,
            readonly=drive.readonly or drive.snapshot,
            flushes=drive.cache != "unsafe",
            child=child,
            again=lambda size: _serve(later, size),
        )
    except BaseException as err:
        if isinstance(err, HostError):
            raise failed(drive, child, err) from err
        child.close()
        raise


def _serve(drive: Drive, size: int | None) -> tuple[list[socket.socket], Child, UsageError | None]:
    """Start a daemon that reads and writes the drive's image, first enlarged to `size` bytes: our
    connections to it, its process, and what is said of a size that cannot be."""
    from vmm.block.nbd import CONNECTIONS, EXPORT

    writable = not drive.readonly and not drive.snapshot
    refused = None
    connections, child, monitor = start(
        drive,
        CONNECTIONS,
        lambda fd: [
            "--nbd-server",
            f"addr.type=fd,addr.str={fd},max-connections={CONNECTIONS}",
        ],
    )
    try:
        if size is not None:
            try:
                _grow(monitor, drive, size)
            except UsageError as err:
                refused = err
        monitor.ask(
            "block-export-add",
            **{"type": "nbd", "id": "export", "node-name": layers.DISK, "name": EXPORT,
               "writable": writable},
        )  # fmt: skip
    except BaseException as err:
        for connection in connections:
            connection.close()
        if isinstance(err, HostError):
            raise failed(drive, child, err) from err
        child.close()
        raise
    finally:
        monitor.close()
    return connections, child, refused
