"""vmm/initramfs/modules.py, on Debian's module trees, checked by depmod(8) and cpio(1)."""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.errors import UsageError
from vmm.initramfs import Initramfs, ModuleTree, modules
from vmm.testing.kernels import Kernel

NAMES = [
    "virtio_mmio",
    "virtio-net",
    "virtio_blk",
    "9p",
    "ext4",
    "kvm-amd",
    "vmw_vsock_virtio_transport",
]


@pytest.fixture(scope="module")
def tree(full_kernel: Kernel) -> ModuleTree:
    return ModuleTree(full_kernel.modules)


def test_dependencies_are_those_depmod_finds(
    tree: ModuleTree, full_kernel: Kernel, tmp_path: Path
) -> None:
    base = tmp_path / "lib" / "modules"
    base.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(full_kernel.modules), str(base)], check=True)
    subprocess.run(["depmod", "-b", str(tmp_path), full_kernel.release], check=True)
    depmod = {}
    for line in (base / full_kernel.release / "modules.dep").read_text().splitlines():
        module, _, needs = line.partition(":")
        depmod[_name(module)] = {_name(need) for need in needs.split()}
    for name in NAMES:
        key = name.replace("-", "_")
        hard = {module.name for module in tree.closure([name])} - {key}
        soft = set()
        for module in tree.closure([name]):
            for line in module.info("softdep"):
                for wish in re.findall(r"[\w-]+(?![\w:-])", line):
                    found = tree._modules.get(wish.replace("-", "_"))
                    if found is not None:
                        soft |= {m.name for m in tree.closure([found.name])}
        assert depmod[key] <= hard, name
        assert hard - depmod[key] <= soft, name


def _name(path: str) -> str:
    return os.path.basename(path).removesuffix(".ko").replace("-", "_")


def test_every_module_comes_after_what_it_depends_on(tree: ModuleTree) -> None:
    order = tree.closure(NAMES)
    seen: set[str] = set()
    for module in order:
        for name in ",".join(module.info("depends")).split(","):
            assert not name or name.replace("-", "_") in seen, (module.name, name)
        seen.add(module.name)
    assert len(seen) == len(order)


def test_archive_holds_the_modules_in_load_order(tree: ModuleTree, tmp_path: Path) -> None:
    ram = Initramfs()
    order = ram.modules(tree.path, ["9pnet_virtio", "9p"])
    listed = subprocess.run(
        ["cpio", "-t", "--quiet"], input=ram.bytes(), capture_output=True, check=True
    ).stdout.decode()
    assert [f"/{name}" for name in listed.split() if name.endswith(".ko")] == order
    assert order[-1].endswith("/kernel/fs/9p/9p.ko")
    assert order[0].startswith(f"/lib/modules/{tree.version}/kernel/")
    subprocess.run(["cpio", "-id", "--quiet"], input=ram.bytes(), cwd=tmp_path, check=True)
    for path in order:
        original = Path(tree.path) / path.split(f"{tree.version}/", 1)[1]
        assert (tmp_path / path[1:]).read_bytes() == original.read_bytes()


def test_a_module_asked_for_twice_is_stored_once(tree: ModuleTree) -> None:
    ram = Initramfs()
    assert ram.modules(tree, ["virtio_ring"]) == ram.modules(tree, ["virtio_ring"])


def test_builtin_modules_are_skipped(tree: ModuleTree) -> None:
    builtin = (Path(tree.path) / "modules.builtin").read_text().split()
    assert builtin
    assert Initramfs().modules(tree, [_name(builtin[0])]) == []


def test_an_unknown_module_is_named_with_close_ones(tree: ModuleTree) -> None:
    with pytest.raises(UsageError, match=r"no module 'virtio_nett'; did you mean .*virtio_net"):
        tree.closure(["virtio_nett"])


def test_compressed_modules_are_stored_unpacked(tree: ModuleTree, tmp_path: Path) -> None:
    packed = tmp_path / "6.1.0-packed"
    for module in tree.closure(["virtio_net"]):
        target = packed / f"{module.inside}.xz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(lzma.compress(module.read(), lzma.FORMAT_XZ, lzma.CHECK_CRC32))
    shutil.copy(Path(tree.path) / "modules.builtin", packed)
    ram = Initramfs()
    order = ram.modules(packed, ["virtio_net"])
    assert [_name(path) for path in order] == [m.name for m in tree.closure(["virtio_net"])]
    assert all(path.endswith(".ko") for path in order)
    virtio_net = tree.find("virtio_net")
    assert virtio_net is not None
    assert virtio_net.read() in ram.bytes()


def test_a_damaged_module_is_named(tmp_path: Path) -> None:
    where = tmp_path / "6.1.0-broken" / "kernel"
    where.mkdir(parents=True)
    (where / "short.ko").write_bytes(b"\x7fELF\x02\x01")
    (where / "text.ko").write_bytes(b"hello" * 100)
    (where / "bad.ko.xz").write_bytes(b"hello" * 100)
    tree = ModuleTree(where.parent)
    for name in ("short", "text", "bad"):
        with pytest.raises(UsageError, match=name):
            tree.closure([name])


@pytest.mark.parametrize("field", ["Q", "I", "H"])
@pytest.mark.parametrize("at", range(0, 64, 2))
def test_a_header_with_any_number(tmp_path: Path, at: int, field: str) -> None:
    """As large as it can be, wherever it stands: the ELF header of a module with a section."""
    module = bytearray(elf_with_section())
    struct.pack_into(f"<{field}", module, at, (1 << 8 * struct.calcsize(field)) - 1)
    where = tmp_path / "6.1.0-broken" / "kernel"
    where.mkdir(parents=True)
    (where / "m.ko").write_bytes(module)
    with contextlib.suppress(UsageError):
        ModuleTree(where.parent).closure(["m"])


def elf_with_section() -> bytes:
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 1, 0)
    section = struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, 128, 10, 0, 0, 1, 0)
    return head + section + b".modinfo\0" + bytes(80)


def test_a_directory_that_is_no_module_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory 'kernel'"):
        ModuleTree(tmp_path)


@pytest.mark.parametrize("suffix", ["xz", "gz", "zst", "zst by the program"])
def test_a_module_that_unpacks_to_too_much(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB of zeroes, where a module may have 1 MiB."""
    pack = {"xz": "xz", "gz": "gzip"}.get(suffix, "zstd")
    if shutil.which(pack) is None:
        pytest.skip(f"no {pack} here to pack with")
    if suffix == "zst":
        pytest.importorskip("zstandard")
    elif suffix.startswith("zst"):
        monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr(modules, "_SIZE_MAX", 1 << 20)
    path = tmp_path / f"bomb.ko.{suffix.split()[0]}"
    path.write_bytes(
        subprocess.run([pack, "-c"], input=bytes(64 << 20), capture_output=True, check=True).stdout
    )
    with pytest.raises(UsageError, match=r"kernel module .*bomb\.ko\.\w+: its .* unpack to "):
        modules.Module("bomb", str(path), "bomb.ko").read()
    large = tmp_path / "large.ko"
    large.write_bytes(bytes(2 << 20))
    with pytest.raises(UsageError, match="its data unpack to over 1 MiB"):
        modules.Module("large", str(large), "large.ko").read()
