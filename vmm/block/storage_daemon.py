"""Image formats other than raw: qemu-storage-daemon opens the image and serves the disk.

It is the code QEMU itself has for qcow2 and the others, in a process of its own (vhost-user-blk).
"""

from __future__ import annotations

import socket

from vmm.block import lock
from vmm.errors import HostError, StateError
from vmm.virtio import spec
from vmm.virtio.blk import S_IOERR
from vmm.virtio.queue import QueueError
from vmm.virtio.vhost_user import Listener, VhostUserDevice
from vmm.virtio.vhost_user_wire import BackEndGone, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.block.drive import Drive
    from vmm.block.remote_limit import RemoteLimit
    from vmm.child import Child
    from vmm.virtio.queue import Chain

CONFIG_BYTES = 60
"""struct virtio_blk_config up to write zeroes (virtio 1.2, section 5.2.4)."""
NUM_QUEUES = 34
"""Offset of `num_queues` in it."""
QUEUE_SIZE = 128
GROUP = "limit"
"""The id of the throttle group."""
FREE_WITHIN = 2.0
"""Seconds to wait for an image in use: a killed monitor's daemon is about to let it go."""


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
    ) -> None:
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

    def adapt(self, config: bytearray) -> None:
        config[NUM_QUEUES : NUM_QUEUES + 2] = len(self.QUEUES).to_bytes(2, "little")

    def fail(self, chain: Chain) -> int:
        if not chain.writable:
            raise QueueError("a block request without room for its status")
        chain.writable[-1][-1] = S_IOERR
        return 1


def command(drive: Drive, fd: int, monitor: int = -1) -> list[str]:
    """The daemon's arguments; `fd` is the socket it is to listen on, `monitor` one for QMP."""
    path = drive.path.replace(",", ",,")
    readonly = "on" if drive.readonly else "off"
    cache = "cache.direct=" + ("on" if drive.cache == "none" else "off")
    no_flush = "cache.no-flush=" + ("on" if drive.cache == "unsafe" else "off")
    common = f"read-only={readonly},{cache},{no_flush}"
    node, limits = "disk", []
    if drive.rate:
        rate, node = drive.rate, "limited"
        group = {"bps-total": rate.bps, "bps-total-max": rate.burst,
                 "iops-total": rate.ops, "iops-total-max": rate.ops_burst}  # fmt: skip
        given = "".join(f",limits.{name}={value}" for name, value in group.items() if value)
        limits = [
            "--object", f"throttle-group,id={GROUP}{given}",
            "--blockdev", f"driver=throttle,node-name=limited,throttle-group={GROUP},file=disk",
        ]  # fmt: skip
    if monitor >= 0:
        limits += ["--chardev", f"socket,id=qmp,fd={monitor}", "--monitor", "chardev=qmp"]
    return [
        "--blockdev", f"driver=file,node-name=file,filename={path},{common},discard=unmap",
        "--blockdev", f"driver={drive.format},node-name=disk,file=file,{common},discard=unmap",
        *limits,
        "--export",
        f"type=vhost-user-blk,id=export,node-name={node},addr.type=fd,addr.str={fd},"
        f"writable={'off' if drive.readonly else 'on'},num-queues={drive.queues}",
    ]  # fmt: skip


def open_disk(drive: Drive, name: str) -> ExternalDisk:
    """Start a daemon on the drive's image. Raises HostError with what it says."""
    from vmm.child import Child, find

    program = find("qemu-storage-daemon", "qemu-system-common")
    lock.wait_free(drive.path, write=not drive.readonly, within=FREE_WITHIN)
    listener = Listener()
    ours = theirs = None
    try:
        fds = [listener.sock.fileno()]
        if drive.rate:
            ours, theirs = socket.socketpair()
            fds.append(theirs.fileno())
        child = Child([program, *command(drive, *fds)], pass_fds=fds)
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
            raise HostError(f"--drive {drive.path}: {said or err}") from err
        raise
