"""What a copy of a machine has for its own, so that it does not stand in the original's way."""

from __future__ import annotations

from _thread import allocate_lock

from vmm.config import MachineConfig
from vmm.errors import StateError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.net.config import Net
    from vmm.virtio.vsock_config import VsockConfig

_lock = allocate_lock()
_last_cid = 0


def own_config(config: MachineConfig, number: int) -> MachineConfig:
    """The configuration of copy `number` (from 1) of a machine.

    Made-up MAC addresses, the next free CID (of this process), and `.NUMBER` after each file and
    socket it makes. On a terminal there is room for one machine: the copy's console is only kept.

    Raises:
        StateError: there can be only one of something; the line says what to do.
    """
    own: MachineConfig = object.__new__(MachineConfig)
    for name in MachineConfig.__slots__:
        setattr(own, name, getattr(config, name))
    if config.shares:
        raise StateError(
            f"clone: --fs {config.shares[0].path} is served by another process, whose state "
            "cannot be copied"
        )
    if config.vhost_user_blks:
        raise StateError(
            f"clone: {config.vhost_user_blks[0].what} is served by another process, whose state "
            "cannot be copied"
        )
    own.nets = tuple(_net(net, number) for net in config.nets)
    own.vsock = _vsock(config.vsock, number) if config.vsock is not None else None
    if config.ports:
        from vmm.virtio.console_config import PortConfig

        own.ports = tuple(
            PortConfig(
                port.name,
                socket=port.socket and f"{port.socket}.{number}",
                file=port.file and f"{port.file}.{number}",
            )
            for port in config.ports
        )
    where = config.console_where
    if where.startswith("file:"):
        where = f"{where}.{number}"
    elif where == "auto":
        where = "none"
    own.console = f"hvc,{where}" if config.hvc else where
    return own


def _net(net: Net, number: int) -> Net:
    from vmm.net.config import RX, TX, Net

    if net.kind == "tap" and net.name:
        raise StateError(
            f"clone: {net.what}: a tap is one machine's; without a name each gets its own, and "
            "bridge= puts them all on one network"
        )
    if net.forward:
        raise StateError(
            f"clone: {net.what},forward={net.forward[0]}: a port of the host is one machine's; "
            "leave it out"
        )
    return Net(
        net.kind,
        net.name,
        pcap=net.pcap and f"{net.pcap}.{number}",
        mtu=net.mtu,
        address=net.address,
        queues=net.queues,
        vhost=net.vhost,
        ip=net.ip,
        gateway=net.gateway,
        dns=net.dns,
        host_loopback=net.host_loopback,
        **{key.replace("-", "_"): getattr(net, key.replace("-", "_")) for key in RX + TX},
    )


def _vsock(vsock: VsockConfig, number: int) -> VsockConfig:
    from vmm.virtio.vsock_config import VsockConfig

    try:
        path = vsock.path and f"{vsock.path}.{number}"
        return VsockConfig(free_cid(vsock.cid), path, vhost=vsock.vhost)
    except UsageError as err:
        raise StateError(f"clone: {err}") from err


def free_cid(cid: int) -> int:
    """The next CID that no copy in this process has had, above `cid`, the original's."""
    global _last_cid
    with _lock:
        _last_cid = max(_last_cid, cid) + 1
        return _last_cid
