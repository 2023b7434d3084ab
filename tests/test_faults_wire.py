"""vmm.faults.wire: segments and checksums, checked by a second implementation in the tests."""

from __future__ import annotations

import random
import struct

import pytest

from tests.support import netns
from vmm.faults import wire
from vmm.virtio import net_spec as n

MACS = b"\x02\0\0\0\0\x01" + b"\x02\0\0\0\0\x02"
V4 = netns.address("10.0.0.1") + netns.address("10.0.0.2")
V6 = bytes(range(32))


def header(kind: int, size: int, start: int, offset: int, flags: int = 1) -> bytes:
    return n.HEADER.pack(flags, kind, 0, size, start, offset, 0)


def packet(v4: bool, protocol: int, payload: bytes, vlan: bool = False) -> tuple[bytes, int]:
    """A frame whose transport checksum holds the pseudo-header's sum; where that header begins."""
    if protocol == wire.TCP:
        transport = struct.pack(">HHIIBBHHH", 1, 2, 1000, 7, 8 << 4, 0x99, 500, 0, 0) + b"\x01" * 12
    else:
        transport = struct.pack(">HHHH", 1, 2, 8 + len(payload), 0)
    transport += payload
    addresses = V4 if v4 else V6
    sum_ = ~netns.checksum(addresses + struct.pack(">II", len(transport), protocol)) & 0xFFFF
    at = 16 if protocol == wire.TCP else 6
    transport = transport[:at] + struct.pack(">H", sum_) + transport[at + 2 :]
    if v4:
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(transport), 0xFFFF, 0, 64, protocol, 0) + V4
        ip = ip[:10] + struct.pack(">H", netns.checksum(ip)) + ip[12:]
    else:
        ip = struct.pack(">IHBB", 6 << 28, len(transport), protocol, 64) + V6
    ethernet = MACS + (b"\x81\0\0\5" if vlan else b"") + struct.pack(">H", 0x800 if v4 else 0x86DD)
    return ethernet + ip + transport, len(ethernet) + len(ip)


def check(frame: bytes, l4: int, v4: bool, protocol: int) -> bytes:
    """Verify lengths and checksums of a frame; its payload."""
    l3 = l4 - (20 if v4 else 40)
    addresses = frame[l3 + 12 : l3 + 20] if v4 else frame[l3 + 8 : l3 + 40]
    if v4:
        assert netns.checksum(frame[l3:l4]) == 0
        assert struct.unpack_from(">H", frame, l3 + 2)[0] == len(frame) - l3
    else:
        assert struct.unpack_from(">H", frame, l3 + 4)[0] == len(frame) - l4
    rest = frame[l4:]
    assert netns.checksum(addresses + struct.pack(">II", len(rest), protocol) + rest) == 0
    if protocol == wire.UDP:
        assert struct.unpack_from(">H", rest, 4)[0] == len(rest)
    return rest[32 if protocol == wire.TCP else 8 :]


@pytest.mark.parametrize("vlan", [False, True])
@pytest.mark.parametrize("size", [1, 1000, 1448, 1449, 10000])
@pytest.mark.parametrize(
    ("kind", "v4", "protocol"),
    [
        (wire.GSO_TCPV4, True, wire.TCP),
        (wire.GSO_TCPV4 | wire.GSO_ECN, True, wire.TCP),
        (wire.GSO_TCPV6, False, wire.TCP),
        (wire.GSO_UDP_L4, True, wire.UDP),
        (wire.GSO_UDP_L4, False, wire.UDP),
    ],
)
def test_segments(kind: int, v4: bool, protocol: int, size: int, vlan: bool) -> None:
    payload = random.Random(size).randbytes(size)
    frame, l4 = packet(v4, protocol, payload, vlan)
    found = wire.on_wire(header(kind, 1448, l4, 16 if protocol == wire.TCP else 6) + frame)
    assert len(found) == -(-size // 1448)
    whole = b""
    for number, each in enumerate(found):
        assert each[: n.HEADER_SIZE] == bytes(n.HEADER_SIZE)
        each = each[n.HEADER_SIZE :]
        part = check(each, l4, v4, protocol)
        if protocol == wire.TCP:
            assert struct.unpack_from(">I", each, l4 + 4)[0] == 1000 + len(whole)
            last, first = number == len(found) - 1, number == 0
            assert each[l4 + 13] == 0x10 | 0x80 * first | 0x09 * last
        if v4:
            assert struct.unpack_from(">H", each, l4 - 16)[0] == (0xFFFF + number) & 0xFFFF
        whole += part
    assert whole == payload


@pytest.mark.parametrize("protocol", [wire.TCP, wire.UDP])
@pytest.mark.parametrize("v4", [False, True])
def test_a_checksum_that_is_left_to_do(v4: bool, protocol: int) -> None:
    frame, l4 = packet(v4, protocol, b"hello")
    [found] = wire.on_wire(header(0, 0, l4, 16 if protocol == wire.TCP else 6) + frame)
    assert found[: n.HEADER_SIZE] == bytes(n.HEADER_SIZE)
    assert check(found[n.HEADER_SIZE :], l4, v4, protocol) == b"hello"


def test_what_is_to_be_believed_is_so_no_longer() -> None:
    """DATA_VALID, as passt's frames have: the guest must look at the checksum itself."""
    frame, _ = packet(True, wire.TCP, b"hello")
    assert wire.on_wire(header(0, 0, 0, 0, flags=2) + frame) == [bytes(n.HEADER_SIZE) + frame]


@pytest.mark.parametrize("seed", range(20))
def test_anything_a_guest_sends(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        frame, l4 = packet(chance.random() < 0.5, chance.choice((6, 17)), chance.randbytes(100))
        data = bytearray(frame)
        for _ in range(chance.randint(0, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        del data[chance.choice((len(data), chance.randint(14, len(data)))) :]
        kind = chance.choice((0, 1, 3, 4, 5, 0x81, 0xFF))
        start = chance.choice((l4, chance.randrange(1 << 16)))
        offset = chance.choice((16, 6, chance.randrange(1 << 16)))
        size = chance.choice((0, 1, 10, 1448, 65535))
        found = wire.on_wire(header(kind, size, start, offset, chance.randrange(4)) + bytes(data))
        assert 1 <= len(found) <= 200
        assert all(len(each) <= len(data) + n.HEADER_SIZE for each in found)


@pytest.mark.parametrize("l4", [100, 10_000, 32_000, 60_000])
@pytest.mark.parametrize("size", [1, 2, 40])
def test_headers_that_are_most_of_a_frame(l4: int, size: int) -> None:
    """The packets of a frame take no more memory than a few frames, whatever it asks for."""
    frame = bytearray(n.FRAME_MAX)
    frame[12:14] = b"\x08\0"
    packet = n.HEADER.pack(1, wire.GSO_UDP_L4, 0, size, l4, 6, 0) + frame
    made = wire.on_wire(packet)
    assert sum(map(len, made)) <= wire.SEGMENTS_MAX + len(made) * n.HEADER_SIZE


def test_the_checksum_is_that_of_others() -> None:
    chance = random.Random(1)
    for size in (0, 1, 2, 3, 20, 1501, 65535):
        for data in (bytes(size), b"\xff" * size, chance.randbytes(size)):
            assert wire.checksum(data) == netns.checksum(data)
