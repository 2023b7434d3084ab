"""Numbers of the virtio specification (OASIS, version 1.2), under its own names."""

from __future__ import annotations

# --- device types (section 5) -------------------------------------------------------------------
ID_NET = 1
ID_BLOCK = 2
ID_CONSOLE = 3
ID_ENTROPY = 4
ID_BALLOON = 5
ID_VSOCK = 19
ID_FS = 26

# --- device status (2.1) --------------------------------------------------------------------------
ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
DEVICE_NEEDS_RESET = 64
FAILED = 128

# --- feature bits of no device in particular (6) --------------------------------------------------
F_INDIRECT_DESC = 28
F_EVENT_IDX = 29
F_VERSION_1 = 32
F_ACCESS_PLATFORM = 33
F_RING_PACKED = 34
F_IN_ORDER = 35
F_NOTIFICATION_DATA = 38
F_RING_RESET = 40

# --- virtqueues (2.7, 2.8) ----------------------------------------------------------------------
DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
PACKED_DESC_F_AVAIL = 1 << 7
PACKED_DESC_F_USED = 1 << 15
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1
RING_EVENT_FLAGS_ENABLE = 0
RING_EVENT_FLAGS_DISABLE = 1
RING_EVENT_FLAGS_DESC = 2
QUEUE_SIZE_MAX = 32768


def bits(*numbers: int) -> int:
    """A feature mask."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask
