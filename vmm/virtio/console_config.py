"""A console port as a person says it: `--port name=N,socket=PATH` or `name=N,file=PATH`."""

from __future__ import annotations

from vmm import config_types as types
from vmm.errors import UsageError
from vmm.units import put_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.virtio.console_ports import Port

NAME_MAX = 64
PORTS_MAX = 16
EXAMPLE = "say for example --port name=log,socket=/tmp/vm.log"


class PortConfig:
    """A named port, checked before anything is opened.

    Args:
        name: what the guest finds in /dev/virtio-ports (udev) and /sys/class/virtio-ports/*/name.
        socket: a UNIX socket to listen on, or
        file: what the guest's output goes into.
    """

    __slots__ = ("file", "name", "socket")

    @types.known_keywords
    def __init__(self, name: str, *, socket: str = "", file: str = "") -> None:
        kinds = {"name": types.TEXT, "socket": types.PATH, "file": types.PATH}
        types.check(locals(), kinds, f"--port name={name}: ")
        self.name = name
        self.socket = str(socket)
        self.file = str(file)
        good = name.isascii() and name.isprintable() and not set(name) & set("/, ")
        if not good or not 0 < len(name) <= NAME_MAX:
            raise UsageError(
                f"--port name={name}: a name is 1 to {NAME_MAX} ASCII characters, no blank, "
                f"comma or slash; {EXAMPLE}"
            )
        if bool(self.socket) == bool(self.file):
            raise UsageError(f"--port name={name}: give it either socket= or file=; {EXAMPLE}")

    def __repr__(self) -> str:
        return f"PortConfig({self.name!r}, socket={self.socket!r}, file={self.file!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PortConfig):
            return NotImplemented
        return all(getattr(self, key) == getattr(other, key) for key in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def parse(cls, text: str) -> PortConfig:
        """From the command line. A comma in a path is written twice."""
        values: dict[str, str] = {}
        for word in text.replace(",,", "\0").split(","):
            key, equals, value = word.replace("\0", ",").partition("=")
            if key not in cls.__slots__ or not equals:
                raise UsageError(f"--port {text}: {key!r} is not name=, socket= or file=")
            put_once(values, key, value, f"--port {text}")
        return cls(
            values.get("name", ""), socket=values.get("socket", ""), file=values.get("file", "")
        )

    def open(self, number: int) -> Port:
        """The port, listening. Raises UsageError."""
        from vmm.virtio.console_ports import FilePort, SocketPort

        if self.socket:
            return SocketPort(number, self.name, self.socket)
        return FilePort(number, self.name, self.file)


def check(ports: list[PortConfig]) -> tuple[PortConfig, ...]:
    """`ports`, where a machine can have them together."""
    names = [port.name for port in ports]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--port name={name} is given twice; each port needs its own name")
    if len(ports) > PORTS_MAX:
        raise UsageError(f"--port is given {len(ports)} times; {PORTS_MAX} ports are the most")
    return tuple(ports)
