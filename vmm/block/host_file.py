"""Opening an image file of any format, with a line for each way in which that fails."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from vmm.block import probe
from vmm.errors import HostError, UsageError

BLKGETSIZE64 = 0x80081272


class HostFile:
    """An open image file, of the format a person gave.

    Args:
        path: a regular file or a block device.
        readonly: opened for reading only.
        direct: opened with O_DIRECT.
        format: what the person says it is; empty: raw, and a file that has another format's mark
            is refused.
        follow: `path` may be a symbolic link.

    Attributes:
        fd: the descriptor; its owner closes it.
        size: bytes of the file, not of the disk in it.
        is_device: it is a block device.

    Raises:
        UsageError: it cannot be opened, is no file, or is not of that format.
        HostError: this host uses the device, or cannot read it.
    """

    def __init__(
        self,
        path: str,
        *,
        readonly: bool,
        direct: bool = False,
        format: str,
        follow: bool = True,
    ) -> None:
        self.path = path
        self._follow = follow
        self._readonly = readonly
        self._direct = direct
        self._format = format
        try:
            self.fd = os.open(path, self._flags())
        except OSError as err:
            raise self._cannot_open(err) from err
        try:
            info = os.fstat(self.fd)
            self.is_device = stat.S_ISBLK(info.st_mode)
            if stat.S_ISDIR(info.st_mode):
                raise UsageError(f"--drive {path} is a directory, not a disk image")
            if not self.is_device and not stat.S_ISREG(info.st_mode):
                raise UsageError(f"--drive {path} is neither a file nor a block device")
            self.size = info.st_size
            if self.is_device:
                answer = fcntl.ioctl(self.fd, BLKGETSIZE64, bytes(8))
                self.size = int.from_bytes(answer, "little")
            if format != "raw":
                self._check_format()
        except OSError as err:
            os.close(self.fd)
            raise HostError(f"--drive {path}: {err.strerror}") from err
        except BaseException:
            os.close(self.fd)
            raise

    def _flags(self) -> int:
        flags = os.O_CLOEXEC | os.O_NONBLOCK  # so that a FIFO does not hold us up
        flags |= os.O_RDONLY if self._readonly else os.O_RDWR
        if self._direct:
            flags |= os.O_DIRECT
        if not self._follow:
            flags |= os.O_NOFOLLOW
        if not self._readonly and stat.S_ISBLK(os.stat(self.path).st_mode):
            flags |= os.O_EXCL  # Linux: not while it is mounted
        return flags

    def _cannot_open(self, err: OSError) -> Exception:
        path, readonly = self.path, self._readonly
        if err.errno == errno.ENOENT:
            return UsageError(f"--drive {path}: {self._missing()}")
        if err.errno == errno.EISDIR:
            return UsageError(f"--drive {path} is a directory, not a disk image")
        if err.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not readonly:
            reason = os.strerror(err.errno)
            if os.path.isdir(path):
                return UsageError(f"--drive {path} is a directory, not a disk image")
            if os.access(path, os.R_OK):
                return UsageError(f"--drive {path}: {reason}; try {self._words('readonly')}")
            return UsageError(f"--drive {path}: {reason}; this user may not even read it")
        if err.errno == errno.EBUSY:
            return HostError(
                f"--drive {path}: this host uses the device; unmount it, or say "
                f"{self._words('readonly')}"
            )
        if err.errno == errno.EINVAL and self._direct:
            return UsageError(
                f"--drive {path}: cache=none (O_DIRECT) is not possible there; leave it out"
            )
        if err.errno == errno.ENXIO:
            return UsageError(f"--drive {path} is neither a file nor a block device")
        return UsageError(f"--drive {path}: {os.strerror(err.errno or errno.EIO)}")

    def _missing(self) -> str:
        """What to do about a file that is not there."""
        path = os.path.realpath(self.path)
        directory = os.path.dirname(path)
        if path.startswith("/dev/"):
            return "no such device; lsblk lists those there are"
        if not os.path.isdir(directory):
            return f"no such file, and no directory {directory}"
        import shlex

        name = shlex.quote(path if self.path.startswith("-") else self.path)
        ending = path.rpartition(".")[2].lower()
        made = self._format or {"vhd": "vpc"}.get(ending, ending)
        if made not in probe.FORMATS or made == "raw":
            return f"no such file; make one: truncate -s 1G {name}"
        return f"no such file; make one: qemu-img create -f {made} {name} 1G"

    def _words(self, more: str) -> str:
        """The option's value, with `more`."""
        given = f",format={self._format}" if self._format else ""
        return f"{self.path.replace(',', ',,')}{given},{more}"

    def _check_format(self) -> None:
        path, given = self.path, self._format
        found = probe.detect(self.fd, self.size)
        if found == (given or "raw"):
            return
        if found not in probe.FORMATS:
            raise UsageError(
                f"--drive {path} is a {found} image, which no format= is for; make a raw one of "
                f"it: qemu-img convert -O raw OLD NEW"
            )
        say = path.replace(",", ",,")
        if given and found == "raw":
            raise UsageError(
                f"--drive {path}: format={given}, but there is no {given} image in it: as a raw "
                f"disk it is --drive {say},format=raw"
            )
        if given:
            raise UsageError(
                f"--drive {path}: format={given}, but this is a {found} image; say "
                f"{say},format={found}"
            )
        raise UsageError(
            f"--drive {path}: this looks like a {found} image; say {say},format={found} (or "
            "format=raw, if it only looks so)"
        )
