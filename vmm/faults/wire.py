"""Frames as they are on a wire: offloaded ones cut into segments, every checksum in its place.

What crosses a virtio network device may be up to 64 KiB, with its checksum left to whoever puts it
on a wire (virtio 1.2, section 5.1.6.2). A fault that flips a bit must come after that: a checksum
made over the damage would hide it.
"""

from __future__ import annotations

import struct

from vmm.virtio import net_spec as n

GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 1, 4, 5, 0x80
VLAN_TAGS = (0x8100, 0x88A8)
ETH_IPV4, ETH_IPV6 = 0x0800, 0x86DD
TCP, UDP = 6, 17
FIN_PSH, CWR = 0x09, 0x80
SEGMENTS_MAX = 8 << 20
"""Bytes of all segments of a frame. Real ones are little longer than the frame, 64 KiB; a guest may
ask for segments of one byte each, with half of the frame for a header: 1 GiB."""
_PLAIN = bytes(n.HEADER_SIZE)


def on_wire(packet: bytes) -> list[bytes]:
    """`packet`, virtio-net header first, as packets that leave nothing to be done.

    One that cannot be made sense of comes back as it is: what a guest sends may be anything.
    """
    flags, kind, _, gso_size, start, offset, _ = n.HEADER.unpack_from(packet)
    try:
        if kind & ~GSO_ECN in (GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4) and gso_size:
            return segments(packet[n.HEADER_SIZE :], kind & ~GSO_ECN, gso_size, start)
        if kind == n.HDR_GSO_NONE and flags & n.HDR_F_NEEDS_CSUM:
            frame = bytearray(packet[n.HEADER_SIZE :])
            if start + offset + 2 > len(frame):
                return [packet]
            # The field holds the sum of the pseudo-header.
            struct.pack_into(">H", frame, start + offset, checksum(frame[start:]) or 0xFFFF)
            return [_PLAIN + frame]
        if kind == n.HDR_GSO_NONE:
            return [_PLAIN + packet[n.HEADER_SIZE :]]
    except (struct.error, IndexError, ValueError):
        pass
    return [packet]


def segments(frame: bytes, kind: int, size: int, l4: int) -> list[bytes]:
    """`frame`'s payload in packets of `size` bytes; `l4` is where its TCP or UDP header begins.

    Raises ValueError, struct.error or IndexError where it is not what `kind` says.
    """
    l3 = 14
    (ethertype,) = struct.unpack_from(">H", frame, 12)
    while ethertype in VLAN_TAGS:
        (ethertype,) = struct.unpack_from(">H", frame, l3 + 2)
        l3 += 4
    v4 = ethertype == ETH_IPV4
    if not (v4 or ethertype == ETH_IPV6) or not l3 + 20 <= l4 < len(frame):
        raise ValueError("not an IP packet")
    protocol = UDP if kind == GSO_UDP_L4 else TCP
    head = l4 + (8 if protocol == UDP else (frame[l4 + 12] >> 4) * 4)
    if head > len(frame) or head < l4 + 8:
        raise ValueError("no room for its header")
    made = []
    starts = range(head, len(frame), size) or range(head, head + 1)
    if len(starts) * (head + size) > SEGMENTS_MAX:
        raise ValueError("segments that are nearly all header")
    for number, at in enumerate(starts):
        part = bytearray(frame[:head] + frame[at : at + size])
        if v4:
            (ident,) = struct.unpack_from(">H", frame, l3 + 4)
            struct.pack_into(">HH", part, l3 + 2, len(part) - l3, (ident + number) & 0xFFFF)
            struct.pack_into(">H", part, l3 + 10, 0)
            header = part[l3 : l3 + (part[l3] & 15) * 4]
            struct.pack_into(">H", part, l3 + 10, checksum(header))
            addresses = part[l3 + 12 : l3 + 20]
        else:
            struct.pack_into(">H", part, l3 + 4, len(part) - l3 - 40)
            addresses = part[l3 + 8 : l3 + 40]
        if protocol == UDP:
            struct.pack_into(">H", part, l4 + 4, len(part) - l4)
            field = l4 + 6
        else:
            (sequence,) = struct.unpack_from(">I", frame, l4 + 4)
            struct.pack_into(">I", part, l4 + 4, (sequence + at - head) & 0xFFFFFFFF)
            if at != starts[-1]:
                part[l4 + 13] &= ~FIN_PSH
            if number:
                part[l4 + 13] &= ~CWR
            field = l4 + 16
        struct.pack_into(">H", part, field, 0)
        pseudo = addresses + struct.pack(">II", len(part) - l4, protocol)
        struct.pack_into(">H", part, field, checksum(pseudo + part[l4:]) or 0xFFFF)
        made.append(_PLAIN + part)
    return made


def checksum(data: bytes | bytearray) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data = data + b"\0"
    # A number in base 2**16 is congruent to the sum of its digits, modulo 2**16 - 1.
    total = int.from_bytes(data, "big")
    return ~(total % 0xFFFF or (0xFFFF if total else 0)) & 0xFFFF
