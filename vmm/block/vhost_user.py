"""`--vhost-user-blk SOCKET[,queues=N][,readonly]`: a disk somebody else's process serves.

Such as a qemu-storage-daemon's export, or SPDK's. It listens on the socket; we only connect.
"""

from __future__ import annotations

from vmm import config_types as types
from vmm.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.virtio.vhost_user import VhostUserDevice

QUEUES_MAX = 16


class VhostUserBlk:
    """One such disk, checked before anything is opened.

    Args:
        socket: the UNIX socket the back end listens on.
        queues: request queues, 1 to 16; the back end must have that many.
        readonly: refuse a back end that lets the guest write.
    """

    __slots__ = ("queues", "readonly", "socket")

    @types.known_keywords
    def __init__(self, socket: str, *, queues: int = 1, readonly: bool = False) -> None:
        kinds = {"socket": types.PATH, "queues": types.WHOLE, "readonly": types.FLAG}
        types.check(locals(), kinds, f"--vhost-user-blk {socket}: ")
        self.socket = str(socket)
        self.queues = queues
        self.readonly = readonly
        if not self.socket:
            raise UsageError("--vhost-user-blk: no socket; say --vhost-user-blk /run/disk.sock")
        from vmm.virtio.unix import check_path

        check_path(self.what, self.socket)
        if not 1 <= queues <= QUEUES_MAX:
            raise UsageError(f"{self.what}: queues={queues} is not from 1 to {QUEUES_MAX}")

    def __repr__(self) -> str:
        return f"VhostUserBlk({self.socket!r}, queues={self.queues}, readonly={self.readonly})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VhostUserBlk) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def what(self) -> str:
        """The option, as far as it says which disk this is."""
        return f"--vhost-user-blk {self.socket}"

    @classmethod
    def parse(cls, text: str) -> VhostUserBlk:
        """From the command line. A comma in the path is written twice."""
        words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
        queues, readonly = "1", False
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if key == "readonly" and value in ("", "on", "off"):
                readonly = value != "off"
            elif key == "queues" and equals:
                queues = value
            else:
                raise UsageError(f"--vhost-user-blk {text}: {word!r} is not queues=N or readonly")
        if not (queues.isascii() and queues.isdecimal() and len(queues) < 4):
            raise UsageError(
                f"--vhost-user-blk {text}: queues={queues} is not from 1 to {QUEUES_MAX}"
            )
        return cls(words[0], queues=int(queues), readonly=readonly)

    def open(self, number: int) -> VhostUserDevice:
        """The device, connected. Raises UsageError, HostError."""
        from vmm.block.storage_daemon import ExternalDisk
        from vmm.virtio.blk import F_RO
        from vmm.virtio.vhost_user import dial

        connection = dial(self.socket, self.what)
        try:
            disk = ExternalDisk(
                f"vhost-user-blk{number}",
                connection,
                self.queues,
                redial=lambda: dial(self.socket, self.what),
                readonly=self.readonly,
            )
            if self.readonly and not disk.features >> F_RO & 1:
                raise UsageError(
                    f"{self.what}: readonly, but the back end serves it writable; start that one "
                    "read-only (qemu-storage-daemon: --export ...,writable=off)"
                )
        except HostError as err:
            connection.close()
            raise HostError(f"{self.what}: {err}") from err
        except BaseException:
            connection.close()
            raise
        return disk
