"""`--net tap[=NAME]` and `--net bridge=BR`: a tap interface of the host's kernel.

An interface that exists is used as it is. One that does not is made, brought up, given its address
or put into the bridge, and goes away with us: the kernel removes it with its last descriptor.
"""

from __future__ import annotations

import errno
from typing import Any

from vmm.errors import HostError, UsageError
from vmm.net.port import Backend
from vmm.net.tun import DEVICE, TapPort

PATTERN = "vmm%d"
"""The names the kernel chooses from for a tap without one."""
NAME_MAX = 15
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
        mtu: of a new interface; 0: as it comes.
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
        if exists and (address or mtu):
            raise UsageError(f"{what}: {name} exists and is used as it is; leave address, mtu out")
        self._taps: list[TapPort] = []
        try:
            if exists:
                self.name = self._attach(name, queues, made=False)
            else:
                with _netlink(what) as ip:  # before there is anything to undo
                    index = _find_bridge(ip, bridge, what) if bridge else 0
                    self.name = self._attach(name or PATTERN, queues, made=True)
                    self._set_up(ip, index, address, mtu)
            self.features = self._taps[0].features()
            if queues > 1:
                self.set_pairs(1)
        except BaseException:
            self.close()
            raise
        self.peer = f"tap {self.name}"
        self.mtu = mtu
        self.ports += self._taps

    def _attach(self, name: str, queues: int, *, made: bool) -> str:
        """Open the queues; the interface's name."""
        for _ in range(queues):
            try:
                port = TapPort()
            except FileNotFoundError:
                raise HostError(f"{self._what}: no {DEVICE} here: modprobe tun") from None
            except OSError as err:
                raise HostError(f"{self._what}: {DEVICE}: {err.strerror}") from err
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
        if err.errno == errno.EPERM:
            return HostError(f"{self._what}: {_PERMISSION}")
        if err.errno == errno.EBUSY:
            return UsageError(f"{self._what}: {name} is in use by another process")
        if err.errno == errno.EINVAL and not made:
            many = f" with multi_queue, for queues={queues}" if queues > 1 else ""
            return UsageError(f"{self._what}: {name} exists and is no tap{many}")
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
        raise UsageError(f"{what}: no such bridge; make it: ip link add {name} type bridge")
    info = ip.link("get", index=found[0])[0].get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != "bridge":
        raise UsageError(f"{what}: {name} is no bridge")
    return int(found[0])
