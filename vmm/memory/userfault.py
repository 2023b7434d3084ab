"""userfaultfd(2): page faults of registered memory, and pages to answer them with.

Loaded when used. Source: Documentation/admin-guide/mm/userfaultfd.rst, linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from vmm.errors import HostError
from vmm.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

SYS_USERFAULTFD = 323
DEVICE = "/dev/userfaultfd"
API = 0xAA
EVENT_PAGEFAULT = 0x12
REGISTER_MODE_MISSING = 1
_USERFAULTFD_IOC_NEW = 0xAA00
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_ZEROPAGE = 0xC020AA04
_API = struct.Struct("<QQQ")
_RANGE = struct.Struct("<QQ")
_REGISTER = struct.Struct("<QQQQ")
_COPY = struct.Struct("<QQQQq")
_ZEROPAGE = struct.Struct("<QQQq")
_MESSAGE = struct.Struct("<B7xQQQ")
"""struct uffd_msg: event; of a page fault flags, address."""


def open_userfault() -> int:
    """A new descriptor, non-blocking, for faults of the kernel's too (KVM's are).

    Raises:
        HostError: the host does not allow it.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(ctypes.c_long(SYS_USERFAULTFD), ctypes.c_long(flags)))
    if fd < 0:
        number = ctypes.get_errno()
        try:
            device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            raise HostError(
                f"userfaultfd: {os.strerror(number)}; it takes CAP_SYS_PTRACE, access to {DEVICE}, "
                "or: sysctl vm.unprivileged_userfaultfd=1"
            ) from None
        try:
            fd = fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
        finally:
            os.close(device)
    try:
        fcntl.ioctl(fd, _UFFDIO_API, _API.pack(API, 0, 0))
    except OSError as err:
        os.close(fd)
        raise HostError(f"userfaultfd: UFFDIO_API: {err.strerror}") from err
    return fd


def register(fd: int, address: int, size: int) -> None:
    """Have faults of pages that are missing in [address, address + size) wait for an answer."""
    fcntl.ioctl(fd, _UFFDIO_REGISTER, _REGISTER.pack(address, size, REGISTER_MODE_MISSING, 0))


def faults(fd: int) -> Iterator[int]:
    """Addresses of the faults that wait now."""
    try:
        data = os.read(fd, 64 * _MESSAGE.size)
    except BlockingIOError:
        return
    for event, _, address, _ in _MESSAGE.iter_unpack(data):
        if event == EVENT_PAGEFAULT:
            yield address


def fill(fd: int, address: int, data: bytes) -> None:
    """Put `data`, whole pages, at `address` of the process that registered; pages that are there
    already stay. Who waits for any of them goes on. Without memory there any more, nothing."""
    source = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    zero = not any(data)
    done = 0
    while done < len(data):
        at, left = address + done, len(data) - done
        if zero:
            request = bytearray(_ZEROPAGE.pack(at, left, 0, 0))
            number, call = _call(fd, _UFFDIO_ZEROPAGE, request)
        else:
            request = bytearray(_COPY.pack(at, source + done, left, 0, 0))
            number, call = _call(fd, _UFFDIO_COPY, request)
        if number in (errno.ENOENT, errno.ESRCH, errno.EFAULT):
            return
        if call > 0:
            done += call
        if number == errno.EEXIST:
            fcntl.ioctl(fd, _UFFDIO_WAKE, _RANGE.pack(address + done, PAGE_SIZE))
            done += PAGE_SIZE
        elif number not in (0, errno.EAGAIN):
            raise OSError(number, os.strerror(number))


def _call(fd: int, number: int, request: bytearray) -> tuple[int, int]:
    """(errno or 0, bytes done): both a part and a reason to stop are in the structure's end."""
    try:
        fcntl.ioctl(fd, number, request)
    except OSError as err:
        done = struct.unpack_from("<q", request, len(request) - 8)[0]
        if done > 0:
            return 0, done  # the reason comes again with the next call
        return err.errno or errno.EIO, 0
    return 0, int(struct.unpack_from("<q", request, len(request) - 8)[0])
