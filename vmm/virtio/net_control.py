"""The network device's control queue (virtio 1.2, section 5.1.6.5)."""

from __future__ import annotations

from vmm.net.filter import VLANS
from vmm.virtio import net_spec as n

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.virtio.net import Nic
    from vmm.virtio.queue import Chain

COMMAND_MAX = 128 << 10
"""Bytes of the longest command; a table of addresses is all that is long."""


def answer(device: Nic, chain: Chain) -> int:
    """Carry out a command, write its ack: the bytes written."""
    ack = n.CTRL_ERR
    if 2 <= chain.readable_size() <= COMMAND_MAX and chain.writable:
        command = chain.read()
        if _run(device, command[0], command[1], command[2:]):
            ack = n.CTRL_OK
    return chain.write(bytes((ack,)))


def _run(device: Nic, kind: int, command: int, data: bytes) -> bool:
    if kind == n.CTRL_RX:
        return _mode(device, command, data)
    if kind == n.CTRL_MAC:
        return _mac(device, command, data)
    if kind == n.CTRL_VLAN:
        return _vlan(device, command, data)
    if kind == n.CTRL_ANNOUNCE:
        if command != n.CTRL_ANNOUNCE_ACK or not device.has(n.F_GUEST_ANNOUNCE):
            return False
        device.announced()
        return True
    if kind == n.CTRL_MQ:
        if command != n.CTRL_MQ_VQ_PAIRS_SET or not device.has(n.F_MQ) or len(data) != 2:
            return False
        return device.set_pairs(int.from_bytes(data, "little"))
    if kind == n.CTRL_GUEST_OFFLOADS:
        if command != n.CTRL_GUEST_OFFLOADS_SET or len(data) != 8:
            return False
        if not device.has(n.F_CTRL_GUEST_OFFLOADS):
            return False
        return device.set_offloads(int.from_bytes(data, "little"))
    return False


def _mode(device: Nic, command: int, data: bytes) -> bool:
    needed = n.F_CTRL_RX if command <= n.CTRL_RX_ALLMULTI else n.F_CTRL_RX_EXTRA
    if command > n.CTRL_RX_NOBCAST or len(data) != 1 or not device.has(needed):
        return False
    device.filter.set_mode(command, bool(data[0]))
    return True


def _mac(device: Nic, command: int, data: bytes) -> bool:
    if command == n.CTRL_MAC_ADDR_SET:
        if len(data) != 6 or data[0] & 1 or not device.has(n.F_CTRL_MAC_ADDR):
            return False
        device.set_mac(data)
        return True
    if command != n.CTRL_MAC_TABLE_SET or not device.has(n.F_CTRL_RX):
        return False
    tables: list[list[bytes]] = []
    for _ in range(2):  # unicast, then multicast
        entries = int.from_bytes(data[:4], "little")
        if len(data) < 4 + 6 * entries:
            return False
        tables.append([data[4 + 6 * at : 10 + 6 * at] for at in range(entries)])
        data = data[4 + 6 * entries :]
    if data or len(tables) != 2:
        return False
    device.filter.set_tables(*tables)
    return True


def _vlan(device: Nic, command: int, data: bytes) -> bool:
    if command > n.CTRL_VLAN_DEL or len(data) != 2 or not device.has(n.F_CTRL_VLAN):
        return False
    vlan = int.from_bytes(data, "little")
    if vlan >= VLANS:
        return False
    device.filter.set_vlan(vlan, command == n.CTRL_VLAN_ADD)
    return True
