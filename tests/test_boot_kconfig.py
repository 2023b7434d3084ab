"""vmm/boot/kconfig.py: what kernel files say of themselves."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from tests.support import boot_files, build_tree
from vmm.boot import kconfig
from vmm.boot.kconfig import KernelFile
from vmm.errors import UsageError
from vmm.testing.kernels import Kernel
from vmm.testing.tiny import TinyKernel


def test_debians(cloud_kernel: Kernel, tmp_path: Path) -> None:
    kernel = KernelFile(str(cloud_kernel.vmlinuz))
    assert kernel.release == cloud_kernel.release
    symbols, source = kernel.config()
    assert (symbols["CONFIG_VIRTIO_NET"], symbols["CONFIG_PACKET"]) == ("m", "y")
    assert "CONFIG_IKCONFIG" not in symbols
    assert source.endswith(f"/config-{cloud_kernel.release}")
    shutil.copy(cloud_kernel.vmlinuz, tmp_path / "vmlinuz")
    alone = KernelFile(str(tmp_path / "vmlinuz"))
    assert alone.config() == ({}, "")
    # All of these are modules in it.
    for name in ("virtio_net", "virtio-mmio", "vmw_vsock_virtio_transport", "overlay.redirect_dir"):
        assert alone.names(name) is False, name
    assert alone.names("ramfs") is True


@pytest.mark.timeout(60, func_only=True)
def test_the_tiny_kernels(tiny_kernel: TinyKernel, tmp_path: Path) -> None:
    for path in (tiny_kernel.vmlinux, tiny_kernel.bzimage):
        shutil.copy(path, tmp_path)
        kernel = KernelFile(str(tmp_path / path.name))
        assert kernel.release == tiny_kernel.version.partition("-")[0]
        assert kernel.names("virtio_net") and kernel.names("virtio-mmio")
        assert not kernel.names("virtiofs") and not kernel.names("vmw_vsock_virtio_transport")


def test_ikconfig(tmp_path: Path) -> None:
    text = b'# made\nCONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\nCONFIG_D="x"\nother=1\n'
    packed = b"IKCFG_ST" + gzip.compress(text) + b"IKCFG_ED"
    noise = b"looks for IKCFG_ST and IKCFG_ED\0"
    elf = tmp_path / "vmlinux"
    elf.write_bytes(boot_files.elf() + noise + packed + bytes(100))
    symbols, source = KernelFile(str(elf)).config()
    assert symbols == {"CONFIG_A": "y", "CONFIG_B": "m", "CONFIG_D": "x"}
    assert source == f"{elf} (IKCONFIG)"
    image = tmp_path / "bzImage"
    image.write_bytes(boot_files.bzimage(gzip.compress(elf.read_bytes())))
    assert KernelFile(str(image)).config()[0] == symbols
    # Cut short, damaged, or a bomb: none, and in bounds.
    for data in (packed[:-8], packed[:20] + b"IKCFG_ED", noise, b"IKCFG_ST" * 1000):
        assert kconfig.embedded(data) is None
    many = (b"IKCFG_ST" * 1000 + bytes(5 << 20)) * 3 + b"IKCFG_ED"  # each would be unpacked
    assert kconfig.embedded(many) is None
    bomb = b"IKCFG_ST" + gzip.compress(bytes(64 << 20)) + b"IKCFG_ED"
    assert kconfig.embedded(bomb) is None


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    for data in (b"", b"hello\n", bytes(9 << 20), b"\xff\xfe"):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(UsageError, match=r"--config .*/x is no kernel's \.config"):
            kconfig.read(str(tmp_path / "x"))
    with pytest.raises(UsageError, match="--config /no/such: No such file"):
        kconfig.read("/no/such")


def test_build_trees(cloud_kernel: Kernel, tmp_path: Path) -> None:
    top = build_tree.make(tmp_path / "linux", cloud_kernel)
    for name in ("arch/x86/boot/bzImage", "arch/x86_64/boot/bzImage"):
        assert kconfig.build_tree(str(top / name)) == str(top)
        assert kconfig.beside(str(top / name))[0] == str(top / ".config")
    (top / "vmlinux").write_bytes(boot_files.elf())
    assert kconfig.build_tree(str(top / "vmlinux")) == str(top)
    (tmp_path / "vmlinux").write_bytes(boot_files.elf())
    assert kconfig.build_tree(str(tmp_path / "vmlinux")) is None
    assert kconfig.build_tree(str(cloud_kernel.vmlinuz)) is None
