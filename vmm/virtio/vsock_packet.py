"""Packets of the socket device (virtio 1.2, section 5.10.6): the header and its numbers."""

from __future__ import annotations

import struct

HEADER = struct.Struct("<QQIIIHHIII")
"""src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt."""
HEADER_SIZE = 44

CID_HOST = 2
CID_MIN, CID_MAX = 3, 0xFFFFFFFE
"""What a guest may be called: 0 to 2 and the last are reserved (5.10.4)."""
PORT_MAX = 0xFFFFFFFF

F_STREAM = 0
F_SEQPACKET = 1
TYPE_STREAM = 1

OP_REQUEST = 1
OP_RESPONSE = 2
OP_RST = 3
OP_SHUTDOWN = 4
OP_RW = 5
OP_CREDIT_UPDATE = 6
OP_CREDIT_REQUEST = 7

SHUTDOWN_RCV = 1
"""Who sent this receives no more."""
SHUTDOWN_SEND = 2
"""Who sent this sends no more."""
SHUTDOWN_BOTH = 3

EVENT_TRANSPORT_RESET = 0
