"""vmm/kvm/vm.py: memory slots of both versions, read-only slots, and the dirty log."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator

import pytest

from tests.support.guests import DATA, Guest, Mmio
from vmm.errors import KvmError
from vmm.kvm import Kvm, constants
from vmm.kvm.ffi import address_of

pytestmark = pytest.mark.needs_kvm

GPA = 0x40000000
PAGE = 4096
PAGES = 100
SET = {1: "set_user_memory_region", 2: "set_user_memory_region2"}
LEVELS = ("long", "user")


@pytest.fixture
def slot() -> Iterator[mmap.mmap]:
    """Memory for a second slot: PAGES pages."""
    with mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        yield area


def set_region(version: int, guest: Guest, area: mmap.mmap, flags: int = 0, size: int = -1) -> None:
    """Slot 1 of `guest` at GPA."""
    if version == 2 and not guest.vm.check_extension(constants.CAP_USER_MEMORY2):
        pytest.skip("this kernel has no KVM_SET_USER_MEMORY_REGION2 (Linux 6.8)")
    size = len(area) if size < 0 else size
    getattr(guest.vm, SET[version])(1, GPA, size, address_of(area), flags)


@pytest.mark.parametrize("version", SET)
@pytest.mark.parametrize("mode", LEVELS)
def test_a_slot_is_memory_until_it_is_removed(mode: str, version: int, slot: mmap.mmap) -> None:
    source = (
        f"mov ${GPA + PAGE}, %edi; 1: mov (%rdi), %eax; inc %eax; mov %eax, 4(%rdi); done; jmp 1b"
    )
    with Guest(source, mode) as guest:
        set_region(version, guest, slot)
        slot[PAGE : PAGE + 4] = b"\x41\0\0\0"
        guest.done()
        assert slot[PAGE : PAGE + 8] == b"\x41\0\0\0\x42\0\0\0"
        set_region(version, guest, slot, size=0)
        assert guest.mmio() == Mmio(GPA + PAGE, 4, None)


@pytest.mark.parametrize("version", SET)
@pytest.mark.parametrize("mode", LEVELS)
def test_a_write_to_a_read_only_slot_is_mmio(mode: str, version: int, slot: mmap.mmap) -> None:
    source = f"mov ${GPA}, %edi; mov (%rdi), %eax; mov %eax, {DATA}; movl $7, (%rdi); done 9"
    with Guest(source, mode) as guest:
        set_region(version, guest, slot, constants.MEM_READONLY)
        slot[:4] = b"rom!"
        assert guest.mmio() == Mmio(GPA, 4, b"\x07\0\0\0")
        assert guest.done() == 9
        assert guest.memory.read(DATA, 4) == slot[:4] == b"rom!"


@pytest.mark.parametrize("version", SET)
def test_a_slot_can_be_moved(version: int, slot: mmap.mmap) -> None:
    with Guest(f"mov ${GPA + PAGES * PAGE}, %edi; movl $7, (%rdi); done 9", "long") as guest:
        set_region(version, guest, slot)
        move = getattr(guest.vm, SET[version])
        move(1, GPA + PAGES * PAGE, len(slot), address_of(slot))
        assert guest.done() == 9
        assert slot[:4] == b"\x07\0\0\0"


@pytest.mark.parametrize(
    ("gpa", "size", "number", "hint"),
    [
        (0x1000, 0x1000, errno.EEXIST, "overlaps another memory slot"),
        (GPA + 1, 0x1000, errno.EINVAL, "page-aligned"),
        (GPA, 0x1001, errno.EINVAL, "page-aligned"),
        (GPA, 1 << 63, errno.EINVAL, "page-aligned"),
    ],
)
def test_a_slot_that_is_refused(
    gpa: int, size: int, number: int, hint: str, slot: mmap.mmap
) -> None:
    with Guest("done") as guest, pytest.raises(KvmError, match=hint) as caught:
        guest.vm.set_user_memory_region(1, gpa, size, address_of(slot))
    assert (caught.value.ioctl, caught.value.errno) == ("KVM_SET_USER_MEMORY_REGION", number)


def test_unknown_flags_are_refused(slot: mmap.mmap) -> None:
    with Guest("done") as guest, pytest.raises(KvmError, match="EINVAL"):
        guest.vm.set_user_memory_region(1, GPA, PAGE, address_of(slot), 1 << 20)


# --- the dirty log --------------------------------------------------------------------------------

WRITER = f"""
    mov ${GPA}, %edi
1:  in $0x80, %eax          # how many bytes into the slot to write
    movb $1, (%rdi, %rax)
    jmp 1b
"""


def write_pages(guest: Guest, *pages: int) -> None:
    """Make the guest write to these pages of the slot, and come to its next IN."""
    for page in pages:
        guest.answer_io((page * PAGE + 5).to_bytes(4, "little"))
        guest.io()


def dirty(guest: Guest) -> set[int]:
    bitmap = guest.vm.get_dirty_log(1, PAGES)
    assert len(bitmap) == 16  # 100 bits in whole 64-bit words
    bits = int.from_bytes(bitmap, "little")
    return {page for page in range(len(bitmap) * 8) if bits >> page & 1}


@pytest.mark.parametrize("version", SET)
@pytest.mark.parametrize("mode", LEVELS)
def test_dirty_log(mode: str, version: int, slot: mmap.mmap) -> None:
    with Guest(WRITER, mode) as guest:
        set_region(version, guest, slot, constants.MEM_LOG_DIRTY_PAGES)
        guest.io()
        write_pages(guest, 3, 70, 99)
        assert dirty(guest) == {3, 70, 99}
        assert dirty(guest) == set()
        write_pages(guest, 70, 71)
        assert dirty(guest) == {70, 71}


@pytest.mark.parametrize("mode", LEVELS)
def test_dirty_log_that_starts_late_and_ends(mode: str, slot: mmap.mmap) -> None:
    with Guest(WRITER, mode) as guest:
        set_region(1, guest, slot)
        guest.io()
        write_pages(guest, 1, 2)
        with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG: .*ENOENT"):
            dirty(guest)
        set_region(1, guest, slot, constants.MEM_LOG_DIRTY_PAGES)
        write_pages(guest, 2)
        assert dirty(guest) == {2}
        set_region(1, guest, slot)
        write_pages(guest, 3)
        with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG: .*ENOENT"):
            dirty(guest)


@pytest.mark.parametrize("mode", LEVELS)
def test_manual_clear(mode: str, slot: mmap.mmap) -> None:
    """KVM_CLEAR_DIRTY_LOG: what is not cleared stays dirty, what is cleared is seen anew."""
    with Guest(WRITER, mode) as guest:
        protect = constants.CAP_MANUAL_DIRTY_LOG_PROTECT2
        assert guest.vm.check_extension(protect) & constants.DIRTY_LOG_MANUAL_PROTECT_ENABLE
        guest.vm.enable_cap(protect, constants.DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        set_region(1, guest, slot, constants.MEM_LOG_DIRTY_PAGES)
        guest.io()
        write_pages(guest, 3, 4, 70)
        assert dirty(guest) == {3, 4, 70}
        assert dirty(guest) == {3, 4, 70}
        guest.vm.clear_dirty_log(1, 0, 64, bytearray((1 << 3).to_bytes(8, "little")))
        assert dirty(guest) == {4, 70}
        guest.vm.clear_dirty_log(1, 64, 36, bytearray((1 << 6).to_bytes(8, "little")))
        assert dirty(guest) == {4}
        write_pages(guest, 3, 70, 71)
        assert dirty(guest) == {3, 4, 70, 71}
        guest.vm.clear_dirty_log(1, 0, PAGES, bytearray(b"\xff" * 16))
        assert dirty(guest) == set()


@pytest.mark.parametrize("mode", LEVELS)
def test_all_dirty_to_begin_with(mode: str, slot: mmap.mmap) -> None:
    both = constants.DIRTY_LOG_MANUAL_PROTECT_ENABLE | constants.DIRTY_LOG_INITIALLY_SET
    with Guest(WRITER, mode) as guest:
        protect = constants.CAP_MANUAL_DIRTY_LOG_PROTECT2
        if guest.vm.check_extension(protect) & both != both:
            pytest.skip("no KVM_DIRTY_LOG_INITIALLY_SET")
        guest.vm.enable_cap(protect, both)
        set_region(1, guest, slot, constants.MEM_LOG_DIRTY_PAGES)
        assert dirty(guest) >= set(range(PAGES))
        guest.vm.clear_dirty_log(1, 0, PAGES, bytearray(b"\xff" * 16))
        guest.io()
        write_pages(guest, 42)
        assert dirty(guest) & set(range(PAGES)) == {42}


def test_a_bitmap_that_is_too_short_is_refused_by_us() -> None:
    with Guest("done") as guest, pytest.raises(ValueError, match="8 bytes is too short for 65"):
        guest.vm.clear_dirty_log(0, 0, 65, bytearray(8))


@pytest.mark.parametrize(("first", "pages"), [(1, 64), (0, 63), (64, 128)])
def test_a_range_that_clear_refuses(first: int, pages: int, slot: mmap.mmap) -> None:
    with Guest("done") as guest:
        manual = constants.DIRTY_LOG_MANUAL_PROTECT_ENABLE
        guest.vm.enable_cap(constants.CAP_MANUAL_DIRTY_LOG_PROTECT2, manual)
        set_region(1, guest, slot, constants.MEM_LOG_DIRTY_PAGES)
        with pytest.raises(KvmError, match=r"KVM_CLEAR_DIRTY_LOG: .*EINVAL"):
            guest.vm.clear_dirty_log(1, first, pages, bytearray(16))


def test_a_slot_number_beyond_the_limit() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, pytest.raises(KvmError, match="EINVAL"):
        vm.set_user_memory_region(0xFFFF, 0, PAGE, 0)
