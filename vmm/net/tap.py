"""`--net tap[=NAME]` and `--net bridge=BR`: a tap interface of the host's kernel.

An interface that exists is used as it is. One that does not is made, brought up, given its address
or put into the bridge, and goes away with us: the kernel removes it with its last descriptor.

The guest is told the interface's MTU. A bridge takes the smallest MTU of its ports, so an interface
that is put into one is given the bridge's: the other users of the bridge keep theirs.
"""

from __future__ import annotations

import errno
import struct
from typing import Any

from vmm.errors import HostError, UsageError
from vmm.net.port import Backend
from vmm.net.tun import DEVICE, TapPort
from vmm.virtio.net_spec import MTU_MAX

PATTERN = "vmm%d"
"""The names the kernel chooses from for a tap without one."""
NAME_MAX = 15
SIOCGIFFLAGS, SIOCGIFMTU = 0x8913, 0x8921
IFF_UP = 1
_INTEGER, _FLAGS = struct.Struct("16xi20x"), struct.Struct("16xH22x")
"""struct ifreq: its ifr_mtu, its ifr_flags."""
_PERMISSION = (
    "no permission (CAP_NET_ADMIN); use --net user, or have root make a tap of yours: "
    "ip tuntap add NAME mode tap user $USER"
)


class TapBackend(Backend):
    """A tap interface.

    Args:
        name: its name; empty: one the kernel chooses.
        bridge: put a new interface into this bridge.
        address: `A.B.C.D/BITS` for the host's side of a new interface.
        mtu: of a new interface, or of the guest alone where that is in a bridge; 0: as it comes.
        queues: how many.
        what: the option, for messages.

    Raises:
        UsageError, HostError: it cannot be had; one line says why.
    """

    def __init__(
        self,
        name: str = "",
        *,
        bridge: str = "",
        address: str = "",
        mtu: int = 0,
        queues: int = 1,
        what: str = "--net tap",
    ) -> None:
        super().__init__()
        self._what = what
        exists = bool(name) and interface(name)
        if exists and address:
            raise UsageError(f"{what}: {name} exists and is used as it is; leave address out")
        if exists and mtu > (has := interface_mtu(name)):
            raise UsageError(
                f"{what}: mtu={mtu} is more than the {has} of {name}; leave it out, or have root "
                f"say: ip link set {name} mtu {mtu}"
            )
        self._bridge = bridge
        self._taps: list[TapPort] = []
        try:
            if exists:
                self.name = self._attach(name, queues, made=False)
            else:
                with _netlink(what) as ip:  # before there is anything to undo
                    index = _find_bridge(ip, bridge, what) if bridge else 0
                    theirs = self._bridge_mtu(mtu) if bridge else 0
                    self.name = self._attach(name or PATTERN, queues, made=True)
                    self._set_up(ip, index, address, theirs or mtu)
            self.features = self._taps[0].features()
            if queues > 1:
                self.set_pairs(1)
            self.mtu = mtu or min(interface_mtu(self.name), MTU_MAX)
        except BaseException:
            self.close()
            raise
        self.peer = f"tap {self.name}"
        self.ports += self._taps

    def _bridge_mtu(self, mtu: int) -> int:
        """The bridge's MTU, as far as a tap can have it. Raises UsageError where `mtu` is more."""
        has = interface_mtu(self._bridge)
        if mtu > has:
            raise UsageError(
                f"{self._what}: mtu={mtu} is more than the bridge's {has}; leave it out, or have "
                f"root say: ip link set {self._bridge} mtu {mtu}"
            )
        return min(has, MTU_MAX)

    def trouble(self) -> str:
        for name in (self.name, self._bridge):
            if name and not is_up(name):
                return f"{name} is down and no frame passes; have root say: ip link set {name} up"
        return ""

    def _attach(self, name: str, queues: int, *, made: bool) -> str:
        """Open the queues; the interface's name."""
        for _ in range(queues):
            try:
                port = TapPort()
            except OSError as err:
                from vmm.kvm.access import device_mend

                mend = device_mend(DEVICE, "tun", err.errno or 0)
                raise HostError(f"{self._what}: {DEVICE}: {err.strerror}; {mend}") from err
            self._taps.append(port)
            try:
                name = self._attach_one(port, name, queues, made)
            except OSError as err:
                raise self._refused(err, name, queues, made) from err
        return name

    def _attach_one(self, port: TapPort, name: str, queues: int, made: bool) -> str:
        try:
            return port.attach(name, multi=queues > 1)
        except OSError as err:
            if err.errno != errno.EINVAL or made or queues > 1:
                raise
            return port.attach(name, multi=True)  # it was made with multi_queue

    def _refused(self, err: OSError, name: str, queues: int, made: bool) -> Exception:
        if err.errno == errno.EPERM and not made:
            return HostError(
                f"{self._what}: {name} is not this user's; use --net user, or have root make a tap "
                "of yours: ip tuntap add NAME mode tap user $USER"
            )
        if err.errno == errno.EPERM:
            return HostError(f"{self._what}: {_PERMISSION}")
        if err.errno == errno.EBUSY:
            return UsageError(f"{self._what}: {name} is in use by another process")
        if err.errno == errno.EINVAL and not made:
            many = f" with multi_queue, for queues={queues}" if queues > 1 else ""
            return UsageError(
                f"{self._what}: {name} exists and is no tap{many}; have root make one: "
                f"ip tuntap add NAME mode tap{' multi_queue' if many else ''} user $USER"
            )
        return HostError(f"{self._what}: {name}: {err.strerror}")

    def _set_up(self, ip: Any, bridge: int, address: str, mtu: int) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        index = ip.link_lookup(ifname=self.name)[0]
        try:
            if mtu:
                ip.link("set", index=index, mtu=mtu)
            if address:
                host, _, length = address.partition("/")
                ip.addr("add", index=index, address=host, prefixlen=int(length))
            if bridge:
                ip.link("set", index=index, master=bridge)
            ip.link("set", index=index, state="up")
        except NetlinkError as err:
            reason = err.args[1] if len(err.args) > 1 else err
            raise HostError(f"{self._what}: setting up {self.name}: {reason}") from err

    def set_offloads(self, offloads: int) -> None:
        self._taps[0].set_offloads(offloads)

    def set_pairs(self, pairs: int) -> None:
        if len(self._taps) > 1:
            for number, tap in enumerate(self._taps):
                wanted = number < pairs
                if wanted != tap.attached:
                    tap.set_attached(wanted)

    def close(self) -> None:
        for tap in self._taps:
            tap.close()


def interface(name: str) -> bool:
    """Whether this network namespace has an interface `name`."""
    from _socket import if_nametoindex

    try:
        if_nametoindex(name)
    except OSError:
        return False
    return True


def interface_mtu(name: str) -> int:
    """Bytes of the largest packet on interface `name`. Raises OSError."""
    return int(_INTEGER.unpack(_ask(SIOCGIFMTU, name))[0])


def is_up(name: str) -> bool:
    """Whether interface `name` is up. Also where it has gone: that is told elsewhere."""
    try:
        return bool(_FLAGS.unpack(_ask(SIOCGIFFLAGS, name))[0] & IFF_UP)
    except OSError:
        return True


def _ask(request: int, name: str) -> bytes:
    """What an ioctl of a socket (netdevice(7)) says of an interface."""
    import fcntl
    from _socket import AF_INET, SOCK_DGRAM, socket

    sock = socket(AF_INET, SOCK_DGRAM)
    try:
        return fcntl.ioctl(sock.fileno(), request, name.encode().ljust(40, b"\0"))
    finally:
        sock.close()


def _netlink(what: str) -> Any:
    """A netlink socket that can configure interfaces."""
    try:
        from pyroute2 import IPRoute
    except ImportError:
        raise HostError(
            f"{what}: needs pyroute2 to make a tap: pip install 'vmm-kvm[net]' "
            "(or name a tap that exists: --net tap=NAME)"
        ) from None
    return IPRoute()


def _find_bridge(ip: Any, name: str, what: str) -> int:
    """The index of bridge `name`."""
    found = ip.link_lookup(ifname=name)
    if not found:
        raise UsageError(
            f"{what}: no such bridge; make it: ip link add {name} type bridge && "
            f"ip link set {name} up"
        )
    info = ip.link("get", index=found[0])[0].get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != "bridge":
        raise UsageError(f"{what}: {name} is no bridge")
    return int(found[0])
