"""Numbers of the network device (virtio 1.2, section 5.1), under its own names."""

from __future__ import annotations

import struct

from vmm.virtio.spec import bits

# --- feature bits (5.1.3) -------------------------------------------------------------------------
F_CSUM = 0
F_GUEST_CSUM = 1
F_CTRL_GUEST_OFFLOADS = 2
F_MTU = 3
F_MAC = 5
F_GUEST_TSO4 = 7
F_GUEST_TSO6 = 8
F_GUEST_ECN = 9
F_HOST_TSO4 = 11
F_HOST_TSO6 = 12
F_HOST_ECN = 13
F_MRG_RXBUF = 15
F_STATUS = 16
F_CTRL_VQ = 17
F_CTRL_RX = 18
F_CTRL_VLAN = 19
F_CTRL_RX_EXTRA = 20
F_GUEST_ANNOUNCE = 21
F_MQ = 22
F_CTRL_MAC_ADDR = 23
F_GUEST_USO4 = 54
F_GUEST_USO6 = 55
F_HOST_USO = 56

GUEST_OFFLOADS = bits(
    F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_USO4, F_GUEST_USO6
)
"""What the driver can take; CTRL_GUEST_OFFLOADS changes these, by the same bits."""
GUEST_GSO = GUEST_OFFLOADS & ~bits(F_GUEST_CSUM)
HOST_OFFLOADS = bits(F_CSUM, F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN, F_HOST_USO)

# --- struct virtio_net_hdr (5.1.6) ----------------------------------------------------------------
HEADER = struct.Struct("<BBHHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers."""
HEADER_SIZE = 12
NUM_BUFFERS = 10
HDR_F_NEEDS_CSUM = 1
HDR_F_DATA_VALID = 2
HDR_GSO_NONE = 0
HDR_GSO_UDP_L4 = 5

# --- configuration space (5.1.4) ------------------------------------------------------------------
CONFIG = struct.Struct("<6sHHH")
"""mac, status, max_virtqueue_pairs, mtu."""
CONFIG_STATUS = 6
S_LINK_UP = 1
S_ANNOUNCE = 2
PAIRS_MAX = 8
"""Of ours; the specification has 0x8000."""

# --- control queue (5.1.6.5) ----------------------------------------------------------------------
CTRL_OK = 0
CTRL_ERR = 1
CTRL_RX = 0
CTRL_RX_PROMISC, CTRL_RX_ALLMULTI, CTRL_RX_ALLUNI = 0, 1, 2
CTRL_RX_NOMULTI, CTRL_RX_NOUNI, CTRL_RX_NOBCAST = 3, 4, 5
CTRL_MAC = 1
CTRL_MAC_TABLE_SET, CTRL_MAC_ADDR_SET = 0, 1
CTRL_VLAN = 2
CTRL_VLAN_ADD, CTRL_VLAN_DEL = 0, 1
CTRL_ANNOUNCE = 3
CTRL_ANNOUNCE_ACK = 0
CTRL_MQ = 4
CTRL_MQ_VQ_PAIRS_SET = 0
CTRL_GUEST_OFFLOADS = 5
CTRL_GUEST_OFFLOADS_SET = 0

# --- frames ---------------------------------------------------------------------------------------
FRAME_MIN = 14
FRAME_MAX = 65535 + 18
"""Bytes: an IP packet, an Ethernet header and a VLAN tag; what GSO hands over at once."""
MTU_DEFAULT = 1500
MTU_MIN, MTU_MAX = 68, 65521
