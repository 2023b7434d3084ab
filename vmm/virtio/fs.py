"""Host directories in the guest (virtio-fs, 1.2 section 5.11), served by virtiofsd.

In the guest: `mount -t virtiofs TAG /mnt`.
"""

from __future__ import annotations

import errno
import os
import struct

from vmm.errors import HostError, UsageError
from vmm.virtio import spec
from vmm.virtio.vhost_user import Listener, VhostUserDevice
from vmm.virtio.vhost_user_wire import BackEndGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vmm.child import Child
    from vmm.virtio.queue import Chain
    from vmm.virtio.vhost_user_wire import Connection

TAG_BYTES = 36
QUEUE_SIZE = 1024
VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
_CONFIG = struct.Struct("<36sI")
_IN = struct.Struct("<IIQ")
"""struct fuse_in_header's beginning: len, opcode, unique."""
_OUT = struct.Struct("<IiQ")
"""struct fuse_out_header: len, error, unique."""


class Share:
    """`--fs DIR,tag=TAG[,readonly]`: a directory, checked before anything is started.

    With `readonly` nothing in it changes, whatever the guest does: virtiofsd is told so, where it
    has an option for it, or serves a read-only mount of its own (see vmm.virtio.fs_readonly).
    """

    __slots__ = ("path", "readonly", "tag")

    def __init__(self, path: str, *, tag: str, readonly: bool = False) -> None:
        self.path = str(path)
        self.tag = tag
        self.readonly = readonly
        if not tag:
            raise UsageError(f"--fs {path}: no tag; say --fs {path},tag=NAME")
        if len(tag.encode()) > TAG_BYTES:
            raise UsageError(f"--fs {path}: tag={tag} is longer than {TAG_BYTES} bytes")
        if not os.path.isdir(self.path):
            raise UsageError(f"--fs {path}: no such directory")

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"Share({values})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Share) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the command line. A comma in the path is written twice."""
        words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
        tag, readonly = "", False
        for word in words[1:]:
            key, _, value = word.partition("=")
            if key == "readonly" and value in ("", "on", "off"):
                readonly = value != "off"
            elif key == "tag":
                tag = value
            else:
                raise UsageError(f"--fs {text}: {word!r} is not tag=NAME or readonly")
        return cls(words[0], tag=tag, readonly=readonly)

    def open(self) -> VirtioFs:
        """The device, with its virtiofsd running. Raises HostError."""
        from vmm.child import Child, find

        program = find("virtiofsd", "virtiofsd (or qemu-system-common)", *VIRTIOFSD)
        path = os.path.abspath(self.path)  # the one in C changes its directory first
        listener = Listener()
        try:
            fd = listener.sock.fileno()
            if program == VIRTIOFSD[1]:  # the one in C that came with QEMU up to 7.2
                source = path.replace("\\", "\\\\").replace(",", "\\,")
                options = ["-o", f"source={source}", "-o", "log_level=err", f"--fd={fd}"]
            else:
                options = ["--shared-dir", path, "--log-level", "error", f"--fd={fd}"]
            command = [program, *options]
            if self.readonly:
                command = self._readonly(command)
            child = Child(command, pass_fds=[fd])
        except BaseException:
            listener.close()
            raise
        connection = None
        try:
            connection = listener.connect("virtiofsd")
            return VirtioFs(self.tag, connection, child)
        except BaseException as err:
            if connection is not None:
                connection.close()
            said = child.said()
            child.close()
            if isinstance(err, BackEndGone):
                raise HostError(f"--fs {self.path}: virtiofsd: {said or err}") from err
            raise

    def _readonly(self, command: list[str]) -> list[str]:
        """A command that serves it read-only."""
        program = command[0]
        if program != VIRTIOFSD[1] and "--readonly" in _help(program):
            return [*command, "--readonly"]
        import sys

        from vmm.virtio import fs_readonly

        return [sys.executable, "-I", fs_readonly.__file__, os.path.realpath(self.path), *command]


def _help(program: str) -> str:
    import subprocess

    done = subprocess.run(
        [program, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


class VirtioFs(VhostUserDevice):
    """A shared directory: one high-priority queue, one for requests."""

    ID = spec.ID_FS

    def __init__(self, tag: str, connection: Connection, child: Child) -> None:
        super().__init__(f"fs-{tag}", connection, (QUEUE_SIZE, QUEUE_SIZE), child=child)
        self.config[:] = _CONFIG.pack(tag.encode(), 1)

    def fail(self, chain: Chain) -> int:
        request = b"".join(bytes(view[: _IN.size]) for view in chain.readable[:2])
        if not chain.writable or len(request) < _IN.size:  # FUSE_FORGET has no answer
            return 0
        unique = _IN.unpack_from(request)[2]
        return chain.write(_OUT.pack(_OUT.size, -errno.EIO, unique))
