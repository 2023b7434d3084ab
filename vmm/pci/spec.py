"""Numbers of PCI Local Bus 3.0 and PCI Express Base 4.0, under their own names."""

from __future__ import annotations

# --- type 0 configuration space (PCI 3.0, section 6.1) --------------------------------------------
VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_CODE = 0x09
CACHE_LINE_SIZE = 0x0C
HEADER_TYPE = 0x0E
BAR0 = 0x10
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
CAPABILITIES_POINTER = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
HEADER_SIZE = 0x40
CONFIG_SIZE = 0x100
"""What PCI has; the rest is PCI Express's."""
EXTENDED_CONFIG_SIZE = 0x1000
BARS = 6

# --- command and status (6.2.2, 6.2.3) ------------------------------------------------------------
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_INTX_DISABLE = 1 << 10
STATUS_CAPABILITIES = 1 << 4

# --- memory BARs (6.2.5.1) ------------------------------------------------------------------------
BAR_64 = 2 << 1
BAR_FLAGS = 0xF

# --- capabilities (appendix H) --------------------------------------------------------------------
CAP_VENDOR = 0x09
CAP_EXPRESS = 0x10
CAP_MSIX = 0x11

# --- MSI-X (6.8.2); offsets from the capability's start -------------------------------------------
MSIX_CONTROL = 2
MSIX_ENABLE = 1 << 15
MSIX_FUNCTION_MASK = 1 << 14
MSIX_ENTRY = 16
"""Bytes of a table entry: message address (8), data (4), vector control (4)."""
MSIX_VECTOR_MASK = 1 << 0
MSIX_VECTORS_MAX = 2048
MSI_ADDRESS = 0xFEE00000
"""Interrupt messages are writes to this MiB (Intel SDM 3A, section 11.11.1)."""
MSI_ADDRESS_MASK = 0xFFF00000

# --- PCI Express capability (7.5.3); offsets likewise ---------------------------------------------
EXPRESS_VERSION = 2
EXPRESS_ROOT_ENDPOINT = 9
"""Root complex integrated endpoint: a device on bus 0, without a link."""
EXPRESS_DEVICE_CAPABILITIES = 4
EXPRESS_DEVICE_CONTROL = 8
EXPRESS_SIZE = 60
DEVCAP_ROLE_BASED_ERRORS = 1 << 15
DEVCAP_FLR = 1 << 28
DEVCTL_FLR = 1 << 15
"""Initiate function level reset; reads 0."""
DEVCTL_WRITABLE = 0x78FF
"""Error reporting, ordering, payload and read request sizes, tags; not what we lack."""

# --- classes (appendix D), 24 bits ----------------------------------------------------------------
CLASS_HOST_BRIDGE = 0x060000
CLASS_NETWORK = 0x020000
CLASS_MASS_STORAGE = 0x018000
CLASS_COMMUNICATION = 0x078000
CLASS_OTHER = 0xFF0000
