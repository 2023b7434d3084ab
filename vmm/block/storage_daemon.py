"""Image formats other than raw: qemu-storage-daemon opens the image.

It is the code QEMU itself has for qcow2 and the others, in a process of its own. That serves the
guest's queues (vhost-user-blk), or, where a drive wants what such a disk does not know, reads and
writes the image for a disk of this process (NBD).
"""

from __future__ import annotations

import socket

from vmm.block import layers
from vmm.errors import HostError, StateError, UsageError
from vmm.forked import drop_in_child
from vmm.virtio import spec
from vmm.virtio.blk import F_RO, S_IOERR
from vmm.virtio.queue import QueueError
from vmm.virtio.vhost_user import Listener, VhostUserDevice
from vmm.virtio.vhost_user_wire import BackEndGone, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.block.drive import Drive
    from vmm.block.nbd import NbdImage
    from vmm.block.remote_limit import RemoteLimit
    from vmm.child import Child
    from vmm.errors import VmmError
    from vmm.virtio.queue import Chain

CONFIG_BYTES = 60
"""struct virtio_blk_config up to write zeroes (virtio 1.2, section 5.2.4)."""
NUM_QUEUES = 34
"""Offset of `num_queues` in it."""
QUEUE_SIZE = 128
GROUP = "limit"
"""The id of the throttle group."""
PROGRAM, PACKAGE = "qemu-storage-daemon", "qemu-system-common"


class ExternalDisk(VhostUserDevice):
    """A disk another process serves."""

    ID = spec.ID_BLOCK
    remote_limit: RemoteLimit | None = None

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

    def close(self) -> None:
        super().close()
        if self.remote_limit is not None:
            self.remote_limit.close()

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
        config[NUM_QUEUES : NUM_QUEUES + 2] = len(self.QUEUES).to_bytes(2, "little")

    def fail(self, chain: Chain) -> int:
        if not chain.writable:
            raise QueueError("a block request without room for its status")
        chain.writable[-1][-1] = S_IOERR
        return 1


def command(drive: Drive, export: str, monitor: int = -1) -> list[str]:
    """The daemon's arguments: what it opens, `export` (how it serves it, of node `{node}`), and the
    descriptor of a socket for its monitor. Raises UsageError, HostError."""
    import json

    node, more = layers.DISK, []
    if drive.rate and drive.external:
        rate, node = drive.rate, "limited"
        group = {"bps-total": rate.bps, "bps-total-max": rate.burst,
                 "iops-total": rate.ops, "iops-total-max": rate.ops_burst}  # fmt: skip
        given = "".join(f",limits.{name}={value}" for name, value in group.items() if value)
        more = [
            "--object", f"throttle-group,id={GROUP}{given}",
            "--blockdev", f"driver=throttle,node-name=limited,throttle-group={GROUP},file=disk",
        ]  # fmt: skip
    if monitor >= 0:
        more += ["--chardev", f"socket,id=qmp,fd={monitor}", "--monitor", "chardev=qmp"]
    opened = [word for each in layers.nodes(drive) for word in ("--blockdev", json.dumps(each))]
    return [*opened, *more, "--export", export.format(node=node)]


def failed(drive: Drive, said: str, err: BaseException) -> VmmError:
    """What to say where the daemon did not come to serve an image: `said` by it, or `err`."""
    name = "qemu-storage-daemon: "
    said = said.removeprefix(name)
    if said.startswith("--blockdev"):  # the image's fault: what could be told before, was
        reason = said.rpartition("}: ")[2]
        return UsageError(f"--drive {drive.path}: {name}{reason}")
    return HostError(f"--drive {drive.path}: {name}{said}" if said else f"{err}")


def open_disk(drive: Drive, name: str) -> ExternalDisk:
    """Start a daemon on the drive's image. Raises HostError with what it says."""
    from vmm.child import Child, find

    program = find(PROGRAM, PACKAGE)
    listener = Listener()
    ours = theirs = None
    try:
        fds = [listener.sock.fileno()]
        if drive.rate:
            ours, theirs = socket.socketpair()
            drop_in_child(ours)
            fds.append(theirs.fileno())
        export = (
            f"type=vhost-user-blk,id=export,node-name={{node}},addr.type=fd,addr.str={fds[0]},"
            f"writable={'off' if drive.readonly else 'on'},num-queues={drive.queues}"
        )
        child = Child([program, *command(drive, export, *fds[1:])], pass_fds=fds)
    except BaseException:
        listener.close()
        if ours is not None:
            ours.close()
        raise
    finally:
        if theirs is not None:
            theirs.close()
    connection = None
    try:
        connection = listener.connect("qemu-storage-daemon")
        disk = ExternalDisk(name, connection, drive.queues, child=child)
        if ours is not None and drive.rate:
            from vmm.block.remote_limit import RemoteLimit

            disk.remote_limit = RemoteLimit(ours, GROUP, (drive.rate.bps, drive.rate.ops))
        return disk
    except BaseException as err:
        if ours is not None:
            ours.close()
        if connection is not None:
            connection.close()
        said = child.said()
        child.close()
        if isinstance(err, BackEndGone):
            raise failed(drive, said, err) from err
        raise


def open_image(drive: Drive) -> NbdImage:
    """Start a daemon on the drive's image, which is only read under `snapshot`. Raises UsageError,
    HostError."""
    from vmm.block.nbd import CONNECTIONS, EXPORT, NbdImage
    from vmm.child import Child, find

    program = find(PROGRAM, PACKAGE)
    readonly = drive.readonly or drive.snapshot
    listener = Listener(CONNECTIONS)
    try:
        fd = listener.sock.fileno()
        export = (
            f"type=nbd,id=export,node-name={{node}},name={EXPORT},"
            f"writable={'off' if readonly else 'on'}"
        )
        words = command(drive, export)
        server = f"addr.type=fd,addr.str={fd},max-connections={CONNECTIONS}"
        child = Child([program, "--nbd-server", server, *words], pass_fds=[fd])
    except BaseException:
        listener.close()
        raise
    try:
        return NbdImage(
            drive.path,
            listener.take(),
            readonly=readonly,
            flushes=drive.cache != "unsafe",
            child=child,
        )
    except BaseException as err:
        said = child.said()
        child.close()
        if isinstance(err, HostError):
            raise failed(drive, said, err) from err
        raise
