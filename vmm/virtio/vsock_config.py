"""The socket device as a person says it: `--vsock cid=N[,path=PREFIX]` or `cid=N,vhost`."""

from __future__ import annotations

from vmm import config_types as types
from vmm.errors import UsageError
from vmm.units import put_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.virtio.vhost_vsock import VhostVsock
    from vmm.virtio.vsock import Vsock

CID_MIN, CID_MAX = 3, 0xFFFFFFFE


class VsockConfig:
    """A guest's socket device, checked before anything is opened.

    Args:
        cid: the guest's address, 3 to 4294967294; the host is 2.
        path: the UNIX socket host programs connect to; with `_PORT` after it, those the guest
            reaches. Empty: only this process reaches the guest, and is reached.
        vhost: the host's kernel serves it (vhost-vsock): programs use AF_VSOCK, there is no path.
    """

    __slots__ = ("cid", "path", "vhost")

    @types.known_keywords
    def __init__(self, cid: int, path: str = "", *, vhost: bool = False) -> None:
        kinds = {"cid": types.WHOLE, "path": types.PATH, "vhost": types.FLAG}
        types.check(locals(), kinds, "--vsock: ")
        self.cid = cid
        self.path = str(path)
        self.vhost = vhost
        if not CID_MIN <= cid <= CID_MAX:
            raise UsageError(
                f"--vsock cid={cid} is not from {CID_MIN} to {CID_MAX} (0 to 2 are reserved)"
            )
        if vhost and self.path:
            raise UsageError(
                f"--vsock cid={cid}: path={path} is not for vhost: programs connect to the cid "
                "with AF_VSOCK"
            )
        if self.path:
            from vmm.virtio.vsock_host import check_path

            check_path(self.path)

    def __repr__(self) -> str:
        return f"VsockConfig({self.cid}, {self.path!r}, vhost={self.vhost})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VsockConfig) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def parse(cls, text: str) -> VsockConfig:
        """From the command line. A comma in the path is written twice."""
        words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
        values: dict[str, str] = {}
        vhost = False
        for word in words:
            key, equals, value = word.partition("=")
            if key == "vhost" and value in ("", "on", "off"):
                vhost = value != "off"
                continue
            if key not in ("cid", "path") or not equals:
                raise UsageError(f"--vsock {text}: {word!r} is not cid=, path= or vhost")
            if not value:
                raise UsageError(f"--vsock {text}: nothing after {key}=")
            put_once(values, key, value, f"--vsock {text}")
        cid = values.get("cid", "")
        if not (cid.isascii() and cid.isdecimal() and len(cid) <= 10):
            raise UsageError(
                f"--vsock {text}: cid={cid} is not a number; say for example "
                "cid=3,path=/tmp/vm.vsock"
            )
        return cls(int(cid), values.get("path", ""), vhost=vhost)

    def open(self) -> Vsock | VhostVsock:
        """The device, listening. Raises UsageError, HostError."""
        if self.vhost:
            return self._open_vhost()
        from vmm.virtio.vsock import Vsock
        from vmm.virtio.vsock_host import VsockHost

        return Vsock(self.cid, VsockHost(self.path or None))

    def _open_vhost(self) -> VhostVsock:
        from vmm.virtio.vhost import Vhost
        from vmm.virtio.vhost_vsock import DEVICE, VhostVsock

        option = f"--vsock cid={self.cid},vhost"
        vhost = Vhost(DEVICE, option)
        try:
            vhost.set_cid(self.cid, option)
        except BaseException:
            vhost.close()
            raise
        return VhostVsock(self.cid, vhost)
