"""vmm.boot.load and extract_vmlinux: every way to start a kernel, and what is refused."""

from __future__ import annotations

import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.boot_files import CODE, LINUX_NOTE, MIB, bzimage, elf, pack, pvh_note
from vmm import layout
from vmm.boot import BootState, extract_vmlinux, load
from vmm.config import MachineConfig
from vmm.errors import BootError, UsageError
from vmm.layout import GIB
from vmm.machine import Machine
from vmm.memory import GuestMemory
from vmm.testing.kernels import Kernel

LINUX = elf(notes=LINUX_NOTE + pvh_note(MIB + 1))
PVH = elf(notes=pvh_note(MIB + 1))
PVH_32 = elf(notes=pvh_note(MIB), bits=32)
PLAIN = elf()
VIRTUAL = elf(entry=0xFFFFFFFF80000000, notes=pvh_note(MIB))


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def start(path: Path, data: bytes, mode: str = "auto", **options: object) -> BootState:
    with GuestMemory(64 * MIB) as memory:
        return load(memory, write(path, data), [], "", mode=mode, **options)  # type: ignore[arg-type]


# --- which protocol -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "mode", "kind", "rip"),
    [
        (LINUX, "auto", "long64", MIB),
        (LINUX, "pvh", "pvh32", MIB + 1),
        (PVH, "auto", "pvh32", MIB + 1),
        (PVH, "elf64", "long64", MIB),
        (PVH_32, "auto", "pvh32", MIB),
        (PLAIN, "auto", "long64", MIB),
        (VIRTUAL, "auto", "pvh32", MIB),
        (bzimage(pack(LINUX, "gzip")), "auto", "long64", MIB),
        (bzimage(pack(LINUX, "gzip")), "elf64", "long64", MIB),
        (bzimage(pack(LINUX, "gzip")), "pvh", "pvh32", MIB + 1),
        (bzimage(pack(LINUX, "gzip")), "bzimage", "long64", 0x1000200),
        (bzimage(pack(PVH_32, "gzip"), xloadflags=0), "auto", "pvh32", MIB),
        (bzimage(LINUX), "auto", "long64", MIB),
        (bzimage(b"packed in a way of 2035"), "auto", "long64", 0x1000200),
        (bzimage(pack(LINUX, "gzip"), payload_offset=0), "auto", "long64", 0x1000200),
        (bzimage(pref_address=0), "auto", "long64", MIB + 0x200),
    ],
)
def test_modes(tmp_path: Path, data: bytes, mode: str, kind: str, rip: int) -> None:
    state = start(tmp_path / "k", data, mode)
    assert (state.kind, state.rip, state.rsp) == (kind, rip, layout.BOOT_STACK)
    if kind == "long64":
        assert (state.rsi, state.rbx, state.cr3) == (layout.ZERO_PAGE, 0, layout.PML4)
    else:
        assert (state.rsi, state.rbx, state.cr3) == (0, layout.PVH_START_INFO, 0)
    assert f"starts at {rip:#x}" in state.description[-1]


def test_host_decompress_is_a_wish_for_auto(tmp_path: Path) -> None:
    data = bzimage(pack(LINUX, "gzip"))
    assert start(tmp_path / "k", data, host_decompress=False).rip == 0x1000200
    assert start(tmp_path / "k", data, host_decompress=True).rip == MIB
    with pytest.raises(BootError, match="unknown compression"):
        start(tmp_path / "k", bzimage(b"packed in a way of 2035"), host_decompress=True)


@pytest.mark.parametrize(
    ("data", "mode", "message"),
    [
        (PLAIN, "bzimage", "--boot bzimage: kernel .* is an ELF file; use elf64 or pvh"),
        (PLAIN, "pvh", "--boot pvh: .* has no PVH note"),
        (PVH_32, "elf64", "--boot elf64: .* has no 64-bit entry at a loaded address"),
        (elf(bits=32), "auto", "is a 32-bit ELF file without a PVH note"),
        (elf(entry=MIB - 1), "auto", "neither a 64-bit entry at a loaded address nor a PVH note"),
        (elf(notes=pvh_note(5)), "auto", "its PVH note names 0x5, where it loads nothing"),
        (bzimage(xloadflags=0), "bzimage", "is a 32-bit kernel: it has no 64-bit entry"),
        (
            bzimage(version=0x020B),
            "bzimage",
            r"is older than Linux 3.8, or no Linux \(ipxe.lkrn\): it has no 64-bit entry",
        ),
        (bzimage(pref_address=1 << 63), "bzimage", "where there is never any"),
        (bzimage(pref_address=layout.HOLE_START), "bzimage", "where there is never any"),
        (bzimage(init_size=0xFFFFFFFF), "auto", "where there is never any"),
        (bzimage(b"\x1f\x8b broken"), "auto", "its gzip data are broken"),
        (PLAIN, "fast", "--boot 'fast' is not one of auto, bzimage, elf64, pvh"),
    ],
)
def test_refuses(tmp_path: Path, data: bytes, mode: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        start(tmp_path / "k", data, mode)
    assert "\n" not in str(caught.value)


# --- what is in memory --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["elf64", "pvh", "bzimage"])
def test_kernel_initrd_and_command_line_are_where_it_says(tmp_path: Path, mode: str) -> None:
    kernel = write(tmp_path / "k", bzimage(pack(LINUX, "gzip"), initrd_addr_max=0x1FFFFFF))
    initrds = [write(tmp_path / "1", b"\0\1\2st"), write(tmp_path / "2", b"\0\1cond")]
    with GuestMemory(64 * MIB) as memory:
        state = load(memory, kernel, initrds, "quiet ünïcode", mode=mode, rsdp=0xE1230)
        assert memory.read(state.rip - (mode == "pvh"), len(CODE)) == CODE
        if mode == "pvh":
            info = struct.unpack("<IIIIQQQQII", memory.read(state.rbx, 56))
            cmdline, rsdp = info[5:7]
            gpa, size = struct.unpack("<QQ", memory.read(info[4], 16))
        else:
            gpa, size = struct.unpack("<II", memory.read(state.rsi + 0x218, 8))
            cmdline = memory.read_u32(state.rsi + 0x228)
            rsdp = memory.read_u64(state.rsi + 0x70)
            assert memory.read(state.rsi + 0x202, 4) == b"HdrS"
        assert rsdp == 0xE1230
        assert memory.read(cmdline, 16) == "quiet ünïcode".encode() + b"\0"
        assert (gpa, size) == (32 * MIB - 4096, 16)
        assert memory.read(gpa, size) == b"\0\1\2st\0\0\0\0\1cond\0\0"
        assert f"initrd, 16 bytes at {gpa:#x}" in state.description


def test_the_initrd_keeps_out_of_init_size(tmp_path: Path) -> None:
    kernel = write(tmp_path / "k", bzimage(pack(LINUX, "gzip"), init_size=30 * MIB))
    initrd = write(tmp_path / "i", bytes(2 * MIB))
    for mode, least in (("bzimage", 48), ("elf64", 33)):
        with GuestMemory(20 * MIB) as memory, pytest.raises(BootError) as caught:
            load(memory, kernel, [initrd], "", mode=mode)
        assert str(caught.value).endswith(f"at least --memory {least}M")
        with GuestMemory(least * MIB) as memory:
            load(memory, kernel, [initrd], "", mode=mode)


def test_nothing_is_written_if_it_does_not_fit(tmp_path: Path) -> None:
    kernel = write(tmp_path / "k", elf([(MIB, CODE, 40 * MIB)]))
    with GuestMemory(16 * MIB) as memory:
        with pytest.raises(BootError, match="at least --memory 41M"):
            load(memory, kernel, [], "")
        assert memory.read(0, 16 * MIB) == bytes(16 * MIB)


@pytest.mark.parametrize("size", [4096, 256 * 1024, MIB])
def test_tiny_memory(tmp_path: Path, size: int) -> None:
    kernel = write(tmp_path / "k", PLAIN)
    with GuestMemory(size) as memory, pytest.raises(BootError, match="at least --memory 2M"):
        load(memory, kernel, [], "")


# --- the command line ---------------------------------------------------------------------------


def test_command_line_limits(tmp_path: Path) -> None:
    kernel = write(tmp_path / "k", bzimage(cmdline_size=100))
    with GuestMemory(64 * MIB) as memory:
        load(memory, kernel, [], "x" * 100, mode="bzimage")
        assert memory.read(layout.CMDLINE, 101) == b"x" * 100 + b"\0"
        with pytest.raises(BootError, match=r"--append: .* 101 bytes, this kernel takes 100"):
            load(memory, kernel, [], "x" * 101, mode="bzimage")
        with pytest.raises(BootError, match="has 102 bytes"):
            load(memory, kernel, [], "ü" * 51, mode="bzimage")
    unlimited = write(tmp_path / "u", bzimage(cmdline_size=0xFFFFFFFF))
    message = f"takes {layout.CMDLINE_MAX - 1}"
    with GuestMemory(64 * MIB) as memory, pytest.raises(BootError, match=message):
        load(memory, unlimited, [], "x" * layout.CMDLINE_MAX, mode="bzimage")
    plain = write(tmp_path / "p", PLAIN)
    with GuestMemory(64 * MIB) as memory:
        load(memory, plain, [], "x" * 2047)
        with pytest.raises(BootError, match="takes 2047"):
            load(memory, plain, [], "x" * 2048)


def test_command_line_bytes(tmp_path: Path) -> None:
    kernel = write(tmp_path / "k", PLAIN)
    with GuestMemory(16 * MIB) as memory:
        load(memory, kernel, [], os.fsdecode(b"latin1=\xe9"))
        assert memory.read(layout.CMDLINE, 9) == b"latin1=\xe9\0"
        with pytest.raises(BootError, match="has a NUL"):
            load(memory, kernel, [], "a\0b")
        with pytest.raises(BootError, match="no way to write character 2 as UTF-8"):
            load(memory, kernel, [], "a\ud800")


# --- hostile files ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "bzimage", "elf64", "pvh"])
def test_fuzzed_setup_headers_raise_boot_errors_only(tmp_path: Path, mode: str) -> None:
    rng = random.Random(mode)
    whole = bzimage(pack(LINUX, "gzip"))
    path, initrd = tmp_path / "k", write(tmp_path / "i", b"\0\1itrd")
    outcomes = {"loaded": 0, "refused": 0}
    before = os.listdir("/proc/self/fd")
    for _ in range(700):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(0x1F1, 0x270)] = rng.choice((0, 0xFF, 0x80, rng.randrange(256)))
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        with GuestMemory(64 * MIB) as memory:
            try:
                state = load(memory, str(path), [initrd], "quiet", mode=mode)
                assert memory.contains(state.rip)
                outcomes["loaded"] += 1
            except UsageError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("data", [LINUX, bzimage(pack(LINUX, "gzip"))], ids=["elf", "bzimage"])
def test_every_truncation_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "k"
    needed = len(data.rstrip(b"\0")) - 16  # less than that and something is missing
    for size in [*range(0, needed, 37), needed]:
        path.write_bytes(data[:size])
        for mode in ("auto", "bzimage"):
            with GuestMemory(32 * MIB) as memory, pytest.raises(BootError) as caught:
                load(memory, str(path), [], "", mode=mode)
            assert str(path) in str(caught.value)


# --- Debian's kernels ---------------------------------------------------------------------------


def test_debians_bzimage_and_its_vmlinux_load_the_same(
    tmp_path: Path, cloud_kernel: Kernel
) -> None:
    vmlinux = write(tmp_path / "vmlinux", extract_vmlinux(str(cloud_kernel.vmlinuz)))
    assert extract_vmlinux(vmlinux) == Path(vmlinux).read_bytes()
    for mode in ("elf64", "pvh"):
        with GuestMemory(128 * MIB) as one, GuestMemory(128 * MIB) as other:
            state = load(one, str(cloud_kernel.vmlinuz), [], "quiet", mode=mode)
            same = load(other, vmlinux, [], "quiet", mode=mode)
            assert (state.kind, state.rip) == (same.kind, same.rip)
            assert one.read(MIB, 127 * MIB) == other.read(MIB, 127 * MIB)


@pytest.mark.parametrize("mode", ["auto", "bzimage", "pvh"])
def test_the_least_memory_for_debians_kernel(
    tmp_path: Path, cloud_kernel: Kernel, mode: str
) -> None:
    initrd = write(tmp_path / "i", bytes(10 * MIB + 1))
    with GuestMemory(8 * MIB) as memory, pytest.raises(BootError) as caught:
        load(memory, str(cloud_kernel.vmlinuz), [initrd], "", mode=mode)
    named = re.search(r"at least --memory ([0-9]+)M$", str(caught.value))
    assert named
    with GuestMemory(int(named[1]) * MIB) as memory:
        load(memory, str(cloud_kernel.vmlinuz), [initrd], "", mode=mode)
    with GuestMemory((int(named[1]) - 1) * MIB) as memory, pytest.raises(BootError):
        load(memory, str(cloud_kernel.vmlinuz), [initrd], "", mode=mode)


# --- on KVM -------------------------------------------------------------------------------------


@pytest.mark.needs_kvm
@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (PLAIN, "elf64"),
        (PVH_32, "pvh"),
        (elf(notes=pvh_note(MIB)), "pvh"),
        (bzimage(pack(PLAIN, "gzip")), "auto"),
        (bzimage(), "bzimage"),
    ],
    ids=["elf64", "pvh of 32 bits", "pvh of 64 bits", "payload", "bzimage"],
)
def test_small_kernels_run(tmp_path: Path, data: bytes, mode: str) -> None:
    kernel = write(tmp_path / "k", data)
    with Machine(MachineConfig(kernel, memory=64 * MIB, boot=mode, timeout=60)) as machine:
        machine.start()
        assert machine.wait().status == 42


@pytest.mark.needs_linux_kvm
@pytest.mark.parametrize("memory", [128 * MIB, 5 * GIB])
@pytest.mark.parametrize("mode", ["auto", "bzimage", "pvh"])
def test_debians_kernel_boots_to_init(
    tmp_path: Path,
    cloud_kernel: Kernel,
    make_initrd: Callable[..., Path],
    mode: str,
    memory: int,
) -> None:
    # Unpacked in order: the second's /init replaces the first's.
    first = make_initrd("", files={"first": "found the first initrd\n"})
    second = make_initrd("cat /first /proc/cmdline; grep MemTotal /proc/meminfo")
    config = MachineConfig(
        str(cloud_kernel.vmlinuz),
        initrds=[str(first), str(second)],
        append="quiet test=ünïcode",
        memory=memory,
        boot=mode,
        timeout=300,
    )
    with Machine(config) as machine:
        machine.start()
        end = machine.wait()
        text = machine.console.text()
    assert end.kind == "poweroff", text
    assert "found the first initrd" in text
    assert "test=ünïcode" in text
    total = re.search(r"MemTotal: *([0-9]+) kB", text)
    assert total and 0.6 * memory < int(total[1]) * 1024 < memory


# --- bombs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2"])
def test_a_vmlinux_has_a_limit(tmp_path: Path, kind: str) -> None:
    """A kernel with 100 MiB of zeroes after it, as one file of some KiB."""
    packed = pack(LINUX + bytes(100 * MIB), kind)
    path = write(tmp_path / "k", bzimage(packed))
    with pytest.raises(BootError, match=f"^kernel {path} unpacks to more than 37748736 bytes$"):
        extract_vmlinux(path)  # the 4 MiB that its header says it takes, and 32 MiB
    path = write(tmp_path / "k", bzimage(packed, init_size=100 * MIB))
    with pytest.raises(BootError, match=f"^kernel {path} unpacks to more than 33554432 bytes$"):
        extract_vmlinux(path, 32 * MIB)
    assert len(extract_vmlinux(path)) == len(LINUX) + 100 * MIB
    with GuestMemory(128 * MIB) as memory:
        load(memory, path, [], "")  # takes what its segments are, and leaves the rest packed
    elf_file = write(tmp_path / "elf", LINUX)
    with pytest.raises(BootError, match=r"^kernel .*elf has \d+ bytes, more than 100$"):
        extract_vmlinux(elf_file, 100)


def test_a_payload_that_no_kernel_has(tmp_path: Path) -> None:
    """3 GiB, by the header of a sparse file: none of it is read."""
    data = bytearray(bzimage(b"\x1f\x8b", payload_length=3 << 30))
    struct.pack_into("<I", data, 0x1F4, (4 << 30) // 16 - 1)
    path = Path(write(tmp_path / "k", bytes(data)))
    with open(path, "r+b") as file:
        file.truncate(5 << 30)
    with pytest.raises(BootError, match=f"its payload of {3 << 30} bytes is no kernel"):
        extract_vmlinux(str(path))
