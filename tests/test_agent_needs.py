"""vmm/agent/needs.py: what a kernel lacks for what was asked is said before anything boots."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import boot_files, build_tree
from vmm import MachineConfig
from vmm.agent import archive
from vmm.errors import UsageError
from vmm.testing.kernels import Kernel
from vmm.testing.tiny import TinyKernel


def refused(kernel: Path, **options: object) -> str:
    config = MachineConfig(str(kernel), **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as raised:
        archive.build(config)
    line = str(raised.value)
    assert "\n" not in line
    return line


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test has found is not another's."""
    from vmm.agent import cache

    directory = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(cache, "directory", lambda: directory)


def test_a_kernel_without_its_modules(cloud_kernel: Kernel, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    shutil.copy(cloud_kernel.vmlinuz, kernel)
    line = refused(kernel, root=str(tmp_path), nets=["user"], rng=True)
    for symbol, what in (
        ("CONFIG_VIRTIO_MMIO", "virtio over MMIO"), ("CONFIG_VIRTIO_VSOCKETS", "vmm exec"),
        ("CONFIG_VIRTIO_NET", "--net"), ("CONFIG_HW_RANDOM_VIRTIO", "--rng"),
        ("CONFIG_OVERLAY_FS", f"--root {tmp_path}"), ("CONFIG_VIRTIO_FS", f"--root {tmp_path}"),
    ):  # fmt: skip
        assert f"{symbol} (for {what})" in line
    assert f"give its lib/modules/{cloud_kernel.release} with --modules" in line
    # With an initrd the drivers are its own matter; the agent's are not.
    (tmp_path / "initrd").write_bytes(b"070701" + bytes(506))
    line = refused(kernel, initrds=[str(tmp_path / "initrd")], nets=["user"], agent=True)
    assert "CONFIG_VIRTIO_VSOCKETS" in line and "CONFIG_VIRTIO_NET" not in line
    assert archive.build(
        MachineConfig(str(kernel), root=str(tmp_path), modules=str(cloud_kernel.modules))
    )


@pytest.mark.timeout(60, func_only=True)
def test_a_kernel_that_lacks_symbols(tiny_kernel: TinyKernel, tmp_path: Path) -> None:
    """Its configuration is beside it; without, the image says so too."""
    line = refused(tiny_kernel.vmlinux, root=str(tmp_path), rng=True)
    assert line.startswith(f"kernel {tiny_kernel.vmlinux} lacks CONFIG_VIRTIO_VSOCKETS (for vmm ex")
    for symbol in ("CONFIG_HW_RANDOM_VIRTIO", "CONFIG_VIRTIO_FS", "CONFIG_OVERLAY_FS"):
        assert symbol in line
    assert "CONFIG_VIRTIO_MMIO" not in line  # built in
    assert f"says {tiny_kernel.config}" in line
    alone = tmp_path / "bzImage"
    shutil.copy(tiny_kernel.bzimage, alone)
    line = refused(alone, root=str(tmp_path))
    assert "does not have CONFIG_VIRTIO_VSOCKETS (for vmm exec)" in line
    assert "CONFIG_VIRTIO_MMIO" not in line


def test_a_kernel_with_virtio_on_pci_alone(cloud_kernel: Kernel, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(boot_files.elf())
    names = ("VIRTIO_PCI", "VIRTIO_VSOCKETS", "VIRTIO_FS", "OVERLAY_FS")
    (tmp_path / "config").write_text("".join(f"CONFIG_{name}=y\n" for name in names))
    line = refused(tmp_path / "vmlinux", root=str(tmp_path))
    assert "lacks CONFIG_VIRTIO_MMIO (for virtio over MMIO)" in line
    assert line.endswith("it has CONFIG_VIRTIO_PCI: --transport pci")
    options = {"root": str(tmp_path), "transport": "pci"}
    assert archive.build(MachineConfig(str(tmp_path / "vmlinux"), **options))  # type: ignore[arg-type]
    (tmp_path / "config").write_text("CONFIG_X86_64=y\n")
    line = refused(tmp_path / "vmlinux", transport="pci", root=str(tmp_path))
    assert "lacks CONFIG_VIRTIO_PCI (for --transport pci)" in line


def test_another_kernels_modules(cloud_kernel: Kernel, full_kernel: Kernel, tmp_path: Path) -> None:
    line = refused(full_kernel.vmlinuz, root=str(tmp_path), modules=str(cloud_kernel.modules))
    assert f"these modules are of kernel {cloud_kernel.release}, and the kernel is " in line
    assert line.endswith(f"{full_kernel.release}; give lib/modules/{full_kernel.release}")
    above = cloud_kernel.modules.parent
    config = MachineConfig(str(full_kernel.vmlinuz), agent=True, modules=above)
    with pytest.raises(UsageError, match=rf"give one: .*/{cloud_kernel.release}$"):
        config.check_host()


def copy_tree(kernel: Kernel, to: Path, pack: str = "") -> Path:
    """The modules that an `exec` needs, each packed as distributions have them."""
    from vmm.initramfs import ModuleTree

    tree = to / kernel.release
    names = ["virtio_mmio", "vmw_vsock_virtio_transport", "virtiofs", "overlay", "virtio_net"]
    for module in ModuleTree(kernel.modules).closure(names):
        target = tree / module.inside
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(module.read())
        if pack == ".zst":
            subprocess.run(["zstd", "-q", "--rm", str(target)], check=True)
        elif pack:
            data = gzip.compress(module.read()) if pack == ".gz" else lzma.compress(module.read())
            target.with_name(target.name + pack).write_bytes(data)
            target.unlink()
    shutil.copy(kernel.modules / "modules.builtin", tree)
    return tree


@pytest.mark.parametrize("pack", ["", ".xz", ".gz", ".zst"])
def test_packed_modules(cloud_kernel: Kernel, tmp_path: Path, pack: str) -> None:
    if pack == ".zst" and shutil.which("zstd") is None:
        pytest.skip("no zstd here to pack with")
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), root=str(tmp_path), nets=["user"],
        modules=str(copy_tree(cloud_kernel, tmp_path, pack)),
    )  # fmt: skip
    plain = MachineConfig(str(cloud_kernel.vmlinuz), root=str(tmp_path), nets=["user"])
    assert archive.drivers(config, config.root_parts) == archive.drivers(plain, plain.root_parts)


def test_trees_that_are_not_whole(cloud_kernel: Kernel, tmp_path: Path) -> None:
    tree = copy_tree(cloud_kernel, tmp_path)
    next(tree.rglob("failover.ko")).unlink()
    options = {"root": str(tmp_path), "modules": str(tree)}
    line = refused(cloud_kernel.vmlinuz, nets=["user"], **options)
    assert "needs failover, which is not in" in line and line.endswith("is the tree whole?")
    next(tree.rglob("virtiofs.ko")).unlink()
    line = refused(cloud_kernel.vmlinuz, **options)
    assert "CONFIG_VIRTIO_FS (for --root" in line and "nor among its modules" in line
    next(tree.rglob("overlay.ko")).write_bytes(b"")
    tree = copy_tree(cloud_kernel, tmp_path / "b")
    next(tree.rglob("overlay.ko")).write_bytes(b"")
    assert "overlay.ko" in refused(cloud_kernel.vmlinuz, root=str(tmp_path), modules=str(tree))


@pytest.mark.parametrize("order", [".o", ".ko"])
def test_a_build_tree(cloud_kernel: Kernel, tmp_path: Path, order: str) -> None:
    top = build_tree.make(tmp_path / "linux", cloud_kernel, order=order)
    config = MachineConfig(str(top / "arch/x86/boot/bzImage"), root=str(tmp_path))
    plain = MachineConfig(str(cloud_kernel.vmlinuz), root=str(tmp_path))
    wanted = archive.drivers(plain, plain.root_parts)
    assert archive.drivers(config, config.root_parts) == wanted != []
    given = MachineConfig(str(cloud_kernel.vmlinuz), root=str(tmp_path), modules=str(top))
    assert archive.drivers(given, given.root_parts) == wanted
    # Built anew with a driver built in: what was kept is looked at again.
    names = (top / "modules.order").read_text().split()
    (top / "modules.order").write_text("\n".join(n for n in names if "/virtiofs." not in n))
    with (top / "modules.builtin").open("a") as file:
        file.write("kernel/fs/fuse/virtiofs.ko\n")
    assert len(archive.drivers(config, config.root_parts)) < len(wanted)


def test_a_build_tree_whose_modules_are_not_built(cloud_kernel: Kernel, tmp_path: Path) -> None:
    top = build_tree.make(tmp_path / "linux", cloud_kernel, modules=False)
    line = refused(top / "arch/x86/boot/bzImage", root=str(tmp_path))
    assert line.endswith(f"which is not built yet; run make modules in {top}")
    (top / "modules.order").unlink()  # `make bzImage` alone
    line = refused(top / "arch/x86/boot/bzImage", root=str(tmp_path))
    assert "does not have CONFIG_VIRTIO_MMIO" in line
