"""What of a guest's frames a passt of ours would deliver to services on the host's loopback.

passt opens a socket of the host's for each flow of the guest's, to the address in the guest's
packet. An address of the loopback in it reaches the host's own services: passt refuses those since
2024 alone. So the frames with one are dropped before passt gets them. The gateway's address, which
passt maps to the host's loopback unless it is started with --no-map-gw, is such an address too
where that option cannot be used: where the host's name server is on the loopback, the guest asks it
at the gateway's address, and nothing else there is let through.
"""

from __future__ import annotations

from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = 14 + 40
"""Bytes of a frame that are looked at: the Ethernet and IPv6 headers, or IPv4's and the ports."""
RESOLV_CONF = "/etc/resolv.conf"
ROUTES, ROUTES6 = "/proc/net/route", "/proc/net/ipv6_route"
RESOLV_MAX = 1 << 20
"""Bytes read of RESOLV_CONF and of the routes, at most."""
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"
_MAPPED = bytes(10) + b"\xff\xff"
"""Before an IPv4 address in IPv6's form (RFC 4291, section 2.5.5.2): a socket of either family
takes it."""
_ICMP, _UDP, _ICMPV6 = 1, 17, 58
_DNS = 53


class Guard:
    """Decides which frames go no further.

    Args:
        gateways: addresses, of 4 and 16 bytes, that passt maps to the host's loopback; echoes
            and the like pass to those, DNS over UDP to those of 4.
    """

    __slots__ = ("_gateways",)

    def __init__(self, gateways: frozenset[bytes] = frozenset()) -> None:
        self._gateways = gateways

    def refuses(self, head: bytes) -> bool:
        """Whether the frame that begins with `head` (HEAD bytes, fewer of a shorter frame) is to
        such an address."""
        kind = head[12:14]
        if kind == _IPV4:
            to = head[30:34]
            if to[:1] in (b"\x7f", b"\0"):  # 0.0.0.0 is this host to connect(2)
                return True
            return to in self._gateways and head[23] != _ICMP and not _is_dns(head)
        if kind == _IPV6:
            to = head[38:54]
            # ::, ::1, and what has an IPv4 address in it
            if to[:12] in (bytes(12), _MAPPED):
                return True
            return to in self._gateways and head[20] != _ICMPV6
        return False


def _is_dns(head: bytes) -> bool:
    """Whether an IPv4 frame is a whole datagram to the port of name servers."""
    ihl = (head[14] & 15) * 4
    fragment = int.from_bytes(head[20:22], "big") & 0x3FFF
    port = head[14 + ihl + 2 : 14 + ihl + 4]
    return head[23] == _UDP and ihl == 20 and not fragment and int.from_bytes(port, "big") == _DNS


def local_resolver() -> bool:
    """Whether all name servers of this host are on its loopback, as systemd-resolved is."""
    found = []
    for line in _lines(RESOLV_CONF):
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            found.append(words[1].startswith("127.") or words[1] == "::1")
    return bool(found) and all(found)


def gateways() -> frozenset[bytes]:
    """The gateways of this network namespace's default routes, in network order."""
    found = set()
    for line in _lines(ROUTES):  # Iface Destination Gateway Flags ..., in the host's order
        words = line.split()
        if len(words) > 2 and words[1] == "00000000":
            found.add(bytes.fromhex(words[2])[::-1])
    for line in _lines(ROUTES6):  # destination, its bits, source, its bits, next hop, ...
        words = line.split()
        if len(words) > 4 and words[1] == "00":
            found.add(bytes.fromhex(words[4]))
    return frozenset(each for each in found if any(each))


def _lines(path: str) -> Iterator[str]:
    with suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        yield from file.read(RESOLV_MAX).splitlines()
