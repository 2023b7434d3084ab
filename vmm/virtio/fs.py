"""Host directories in the guest (virtio-fs, 1.2 section 5.11), served by virtiofsd.

In the guest: `mount -t virtiofs TAG /mnt`.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from vmm import config_types as types
from vmm.errors import HostError, UsageError
from vmm.units import put_once
from vmm.virtio import spec
from vmm.virtio.vhost_user import Listener, VhostUserDevice
from vmm.virtio.vhost_user_wire import BackEndGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from vmm.child import Child
    from vmm.sandbox.helper import Confinement
    from vmm.virtio.queue import Chain
    from vmm.virtio.vhost_user_wire import Connection

TAG_BYTES = 36
QUEUE_SIZE = 1024
ROOT_TAG = "vmm-root"
"""The tag of the directory that is `--root`."""
PACKAGE = "virtiofsd (Debian 12: qemu-system-common)"
VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
FLAGS = ("readonly", "suid", "dev")
CAPABILITIES = (
    0, 1, 3, 4,  # CHOWN, DAC_OVERRIDE, FOWNER, FSETID
    6, 7, 8,  # SETGID, SETUID; SETPCAP, to give up others
    18, 21,  # SYS_CHROOT, SYS_ADMIN, until the mounts are made
    27, 31,  # MKNOD, SETFCAP
)  # fmt: skip
_CONFIG = struct.Struct("<36sI")
_IN = struct.Struct("<IIQ")
"""struct fuse_in_header's beginning: len, opcode, unique."""
_OUT = struct.Struct("<IiQ")
"""struct fuse_out_header: len, error, unique."""


class Share:
    """`--fs DIR,tag=TAG[,readonly][,suid][,dev]`: a directory, checked before anything is started.

    With `readonly` nothing in it changes, whatever the guest does: virtiofsd serves a read-only
    mount of its own (see vmm.virtio.fs_sandbox), which it cannot make writable.

    Files that the guest makes are on the host like any others, and the guest's root acts with this
    process's rights: set-user-ID and set-group-ID bits, with which another user of the host would
    get those rights, are set with `suid` alone, device nodes made with `dev` alone.
    """

    __slots__ = ("dev", "path", "readonly", "suid", "tag")

    @types.known_keywords
    def __init__(
        self,
        path: str,
        *,
        tag: str,
        readonly: bool = False,
        suid: bool = False,
        dev: bool = False,
    ) -> None:
        kinds = {"path": types.PATH, "tag": types.TEXT, **dict.fromkeys(FLAGS, types.FLAG)}
        types.check(locals(), kinds, f"--fs {path}: ")
        self.path = str(path)
        self.tag = tag
        self.readonly = readonly
        self.suid = suid
        self.dev = dev
        if not self.path:
            raise UsageError(f"--fs: no directory; say --fs DIR,tag={tag or 'NAME'}")
        if not tag:
            if self.path.startswith("tag="):
                raise UsageError(f"--fs {path}: no directory; say --fs DIR,{path}")
            raise UsageError(f"--fs {path}: no tag; say --fs {path},tag=NAME")
        if len(os.fsencode(tag)) > TAG_BYTES:
            raise UsageError(f"--fs {path}: tag={tag} is longer than {TAG_BYTES} bytes")

    def check_host(self) -> None:
        """UsageError: the directory is not there."""
        if not os.path.isdir(self.path):
            raise UsageError(f"--fs {self.path}: {_no_directory(self.path)}")

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
        values: dict[str, str] = {}
        flags: dict[str, bool] = {}
        for word in words[1:]:
            key, _, value = word.partition("=")
            if key in FLAGS and value in ("", "on", "off"):
                flags[key] = value != "off"
            elif key == "tag":
                put_once(values, key, value, f"--fs {text}")
            else:
                raise UsageError(
                    f"--fs {text}: {word!r} is not tag=NAME, {', '.join(FLAGS[:-1])} or {FLAGS[-1]}"
                )
        return cls(words[0], tag=values.get("tag", ""), **flags)

    def open(self) -> VirtioFs:
        """The device, with its virtiofsd running. Raises HostError."""
        import sys

        from vmm.child import Child, find
        from vmm.virtio import fs_sandbox

        program = find("virtiofsd", PACKAGE, *VIRTIOFSD)
        kind = "c" if os.path.realpath(program) == VIRTIOFSD[1] else "rust"
        access = "ro" if self.readonly else "rw"
        access += ",suid" * self.suid + ",dev" * self.dev
        # Not abspath(), which a directory that has been removed under this process makes fail.
        path = os.path.join(".", self.path)
        listener = Listener()
        try:
            fd = listener.sock.fileno()
            script = [sys.executable, "-I", "-S", fs_sandbox.__file__]
            words = [*script, kind, access, path, program, str(fd)]
            less = fs_sandbox.without(access).values()
            child = Child(words, _confinement(less), pass_fds=[fd], name="virtiofsd")
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
            said = ""
            if isinstance(err, BackEndGone):
                said = err.reason(child)
            child.close()
            if isinstance(err, BackEndGone):
                raise HostError(f"{self._what}: virtiofsd: {said}") from err
            raise

    @property
    def _what(self) -> str:
        """The option this is of, for messages."""
        return f"{'--root' if self.tag == ROOT_TAG else '--fs'} {self.path}"


def _confinement(less: Iterable[int]) -> Confinement:
    """What virtiofsd needs, without the capabilities `less`: mounts of its own, in which it sees
    the shared directory and nothing else (vmm.virtio.fs_sandbox); of root's capabilities those that
    act on files, and those that it gives up once it is there."""
    from vmm.sandbox.helper import Confinement

    return Confinement(None, keep=set(CAPABILITIES) - set(less))


def _no_directory(path: str) -> str:
    """Why `path` cannot be shared, and what would work."""
    try:
        mode = os.stat(path).st_mode
    except OSError as err:
        return "no such directory" if err.errno == errno.ENOENT else str(err.strerror)
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return (
            "this is a file, and a share is a directory; give the directory it is in, or the file "
            f"as a disk: --drive {path}"
        )
    return "this is no directory"


class VirtioFs(VhostUserDevice):
    """A shared directory: one high-priority queue, one for requests."""

    ID = spec.ID_FS

    def __init__(self, tag: str, connection: Connection, child: Child) -> None:
        super().__init__(f"fs-{tag}", connection, (QUEUE_SIZE, QUEUE_SIZE), child=child)
        self.config[:] = _CONFIG.pack(os.fsencode(tag), 1)

    def fail(self, chain: Chain) -> int:
        request = b"".join(bytes(view[: _IN.size]) for view in chain.readable[:2])
        if not chain.writable or len(request) < _IN.size:  # FUSE_FORGET has no answer
            return 0
        unique = _IN.unpack_from(request)[2]
        return chain.write(_OUT.pack(_OUT.size, -errno.EIO, unique))
