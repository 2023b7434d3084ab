"""The socket device as a person says it: `--vsock cid=N[,path=PREFIX]`."""

from __future__ import annotations

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.virtio.vsock import Vsock

CID_MIN, CID_MAX = 3, 0xFFFFFFFE


class VsockConfig:
    """A guest's socket device, checked before anything is opened.

    Args:
        cid: the guest's address, 3 to 4294967294; the host is 2.
        path: the UNIX socket host programs connect to; with `_PORT` after it, those the guest
            reaches. Empty: only this process reaches the guest, and is reached.
    """

    __slots__ = ("cid", "path")

    def __init__(self, cid: int, path: str = "") -> None:
        self.cid = cid
        self.path = str(path)
        if not CID_MIN <= cid <= CID_MAX:
            raise UsageError(
                f"--vsock cid={cid} is not from {CID_MIN} to {CID_MAX} (0 to 2 are reserved)"
            )
        if self.path:
            from vmm.virtio.vsock_host import check_path

            check_path(self.path)

    def __repr__(self) -> str:
        return f"VsockConfig({self.cid}, {self.path!r})"

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, VsockConfig)
        return same and (self.cid, self.path) == (other.cid, other.path)  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def parse(cls, text: str) -> VsockConfig:
        """From the command line. A comma in the path is written twice."""
        words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
        values: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if key not in ("cid", "path") or not equals:
                raise UsageError(f"--vsock {text}: {word!r} is not cid= or path=")
            if not value:
                raise UsageError(f"--vsock {text}: nothing after {key}=")
            values[key] = value
        cid = values.get("cid", "")
        if not (cid.isascii() and cid.isdecimal() and len(cid) <= 10):
            raise UsageError(
                f"--vsock {text}: cid={cid} is not a number; say for example "
                "cid=3,path=/tmp/vm.vsock"
            )
        return cls(int(cid), values.get("path", ""))

    def open(self) -> Vsock:
        """The device, listening. Raises UsageError."""
        from vmm.virtio.vsock import Vsock
        from vmm.virtio.vsock_host import VsockHost

        return Vsock(self.cid, VsockHost(self.path or None))
