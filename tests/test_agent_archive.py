"""The agent's initrd and what goes into it: its program, modules, and what init.c is told."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import boot_files
from vmm import MachineConfig
from vmm.agent import archive, binary, modules
from vmm.errors import HostError, UsageError
from vmm.testing.kernels import Kernel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and sources."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("VMM_CACHE", str(directory))
    monkeypatch.setattr(binary, "HERE", str(copy_sources(tmp_path)))
    return directory / "agent"


def copy_sources(tmp_path: Path) -> Path:
    """The agent's sources, without what was shipped."""
    to = tmp_path / "sources"
    to.mkdir()
    for path in Path(binary.__file__).parent.glob("*.[ch]"):
        shutil.copy(path, to)
    return to


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    (tmp_path / "kernel").write_bytes(boot_files.elf())
    return str(tmp_path / "kernel")


def unpack(data: bytes, to: Path) -> Path:
    to.mkdir()
    subprocess.run(["cpio", "-idm", "--quiet"], input=data, cwd=to, check=True)
    return to


def told(config: MachineConfig, to: Path) -> list[str]:
    """The lines for init.c."""
    return (unpack(archive.build(config), to) / ".vmm" / "config").read_text().splitlines()


# --- the program ----------------------------------------------------------------------------------


def test_the_program_is_compiled_once(cache: Path) -> None:
    path = binary.program()
    assert Path(path).parent == cache
    assert Path(path).stat().st_size < 64 << 10
    headers = subprocess.run(
        ["readelf", "-lW", path], capture_output=True, text=True, check=True
    ).stdout
    assert "INTERP" not in headers and "DYNAMIC" not in headers
    before = Path(path).stat()
    assert binary.program() == path
    assert Path(path).stat().st_mtime_ns == before.st_mtime_ns
    assert [item.name for item in cache.iterdir()] == [Path(path).name]


def test_other_sources_are_another_program(cache: Path) -> None:
    first = binary.fingerprint()
    with Path(binary.HERE, "agent.h").open("a") as file:
        file.write("\n/* changed */\n")
    assert binary.fingerprint() != first


def test_a_shipped_program(cache: Path) -> None:
    (Path(binary.HERE) / "vmm-agent-0123").write_text("a former one")
    binary.ship()
    binary.ship()
    shipped = [path.name for path in Path(binary.HERE).glob("vmm-agent-*")]
    assert shipped == [f"vmm-agent-{binary.fingerprint()}"]
    assert binary.program() == str(Path(binary.HERE) / shipped[0])
    assert not cache.exists()


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match="no C compiler for the guest's agent; apt-get install gcc"):
        binary.program()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with Path(binary.HERE, "main.c").open("a") as file:
        file.write("\nno C at all\n")
    with pytest.raises(HostError, match=r"cannot compile the guest's agent: .*error"):
        binary.program()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(HostError, match="set CC"):
        binary.program()
    assert list(cache.iterdir()) == []


# --- the archive ----------------------------------------------------------------------------------


def test_what_init_is_told(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def lines(name: str, **options: object) -> list[str]:
        return told(MachineConfig(kernel, **options), tmp_path / name)  # type: ignore[arg-type]

    assert lines("a", agent=True) == ["init /init"]
    assert lines("b", agent=True, append="rdinit=/x rdinit=/bin/y") == ["init /bin/y"]
    assert lines("c", agent=True, append="quiet -- rdinit=/x") == ["init /init"]
    (tmp_path / "dir").mkdir()
    assert lines("d", root=str(tmp_path / "dir")) == [
        "root virtiofs vmm-root", "overlay", "hostname vmm",
    ]  # fmt: skip
    with monkeypatch.context() as ordinary:
        ordinary.setattr(os, "geteuid", lambda: 1000)
        assert lines("u", root=str(tmp_path / "dir"))[1:3] == ["overlay", "nosuid"]
    image = tmp_path / "image"
    image.write_bytes(b"hsqs" + bytes((1 << 17) - 4))
    assert lines("e", root=str(image), append="init=/sbin/init") == [
        "root vmm-root squashfs", "overlay", "hostname vmm", "init /sbin/init",
    ]  # fmt: skip
    image.write_bytes(b"XFSB" + bytes((1 << 17) - 4))
    assert lines("f", root=str(image), append="hostname=box") == [
        "root vmm-root xfs", "hostname box",
    ]  # fmt: skip
    assert (tmp_path / "a" / ".vmm" / "init").stat().st_mode & 0o777 == 0o755


def test_the_command_line(kernel: str) -> None:
    config = MachineConfig(kernel, agent=True, append="quiet rdinit=/x -- single")
    assert config.cmdline.endswith("quiet rdinit=/x rdinit=/.vmm/init -- single")
    config = MachineConfig(kernel, agent=True, default_append=False)
    assert config.cmdline == "rdinit=/.vmm/init"
    assert "rdinit" not in MachineConfig(kernel).cmdline


def test_configurations_that_cannot_be(kernel: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="agent: it goes in with a kernel, and there is none"):
        MachineConfig(agent=True)
    with pytest.raises(UsageError, match="--append: init 'x' is not a path that begins with /"):
        MachineConfig(kernel, agent=True, append="rdinit=x")
    with pytest.raises(UsageError, match=r"--modules .* has no directory 'kernel'"):
        MachineConfig(kernel, agent=True, modules=str(tmp_path)).check_host()
    with pytest.raises(UsageError, match="--no-acpi: the agent's device over MMIO is found"):
        MachineConfig(kernel, agent=True, acpi=False)
    MachineConfig(kernel, agent=True, acpi=False, transport="pci")
    with pytest.raises(UsageError, match="--root /no/such: No such file or directory"):
        MachineConfig(kernel, root="/no/such").check_host()


def test_a_configuration_in_a_file(kernel: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    file = tmp_path / "machine.toml"
    file.write_text('kernel = "kernel"\nroot = "root"\n')
    config = MachineConfig.load(str(file))
    assert (config.root, config.agent) == (str(tmp_path / "root"), True)
    assert (config.backing, config.default_backing) == ("", "memfd")
    assert MachineConfig.from_dict(config.to_dict()) == config


# --- modules --------------------------------------------------------------------------------------


def test_where_modules_are(tmp_path: Path) -> None:
    def make(path: str) -> str:
        where = tmp_path / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.touch()
        return str(where)

    package = tmp_path / "package" / "lib" / "modules" / "6.1"
    (package / "kernel").mkdir(parents=True)
    assert modules.find_tree(make("package/boot/vmlinuz-6.1")) == str(package)
    assert modules.find_tree(make("package/boot/vmlinuz-6.2")) is None
    assert modules.find_tree(make("package/vmlinux")) == str(package)  # the only one there is
    assert modules.find_tree(make("package/lib/modules/6.1/vmlinuz")) == str(package)
    (tmp_path / "link").symlink_to(make("package/boot/vmlinuz-6.1"))
    assert modules.find_tree(str(tmp_path / "link")) == str(package)
    (package.parent / "6.2" / "kernel").mkdir(parents=True)
    assert modules.find_tree(str(tmp_path / "package/vmlinux")) is None
    assert modules.find_tree(make("elsewhere/vmlinuz-6.1")) is None
    usr = tmp_path / "usr-merged" / "usr" / "lib" / "modules" / "6.3"
    (usr / "kernel").mkdir(parents=True)
    assert modules.find_tree(make("usr-merged/boot/vmlinuz-6.3")) == str(usr)


def test_debians_modules(cloud_kernel: Kernel, tmp_path: Path) -> None:
    config = MachineConfig(str(cloud_kernel.vmlinuz), agent=True)
    lines = told(config, tmp_path / "mmio")
    assert lines[-1] == "init /init"
    assert all(line.startswith("module /.vmm/modules/") for line in lines[:-1])
    names = [module_name(tmp_path / "mmio" / line.split()[1][1:]) for line in lines[:-1]]
    assert names.index("vsock") < names.index("vmw_vsock_virtio_transport")
    assert "virtio_mmio" in names
    config = MachineConfig(str(cloud_kernel.vmlinuz), root=str(tmp_path), transport="pci")
    lines = told(config, tmp_path / "pci")
    names = [
        module_name(tmp_path / "pci" / line.split()[1][1:])
        for line in lines
        if line.startswith("module")
    ]
    assert {"virtio_pci", "virtiofs", "overlay", "fuse"} <= set(names)
    assert "virtio_mmio" not in names


def module_name(path: Path) -> str:
    done = subprocess.run(
        ["/sbin/modinfo", "-F", "name", str(path)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_modules_are_found_once(
    cloud_kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    tree = tmp_path / "tree" / cloud_kernel.release
    virtio = cloud_kernel.modules / "kernel" / "drivers" / "virtio"
    shutil.copytree(virtio, tree / "kernel" / "drivers" / "virtio")
    shutil.copy(cloud_kernel.modules / "modules.builtin", tree)
    first = modules.collect(str(tree), ["virtio_mmio"], ["no_such_module"])
    assert [item.name[:8] for item in cache.iterdir()] == ["modules-"]
    from vmm.initramfs import modules as trees

    scans: list[object] = []
    scan = trees.ModuleTree._scan
    monkeypatch.setattr(trees.ModuleTree, "_scan", lambda self: scans.append(1) or scan(self))
    assert modules.collect(str(tree), ["virtio_mmio"], ["no_such_module"]) == first
    assert scans == []
    changed = next(tree.rglob("virtio_mmio.ko*"))
    data = changed.read_bytes()
    changed.write_bytes(data)  # as an upgrade in place would
    assert modules.collect(str(tree), ["virtio_mmio"], ["no_such_module"]) == first
    assert scans == [1]
    next(cache.iterdir()).write_bytes(b"found\n\xff not what was kept")
    assert modules.collect(str(tree), ["virtio_mmio"], ["no_such_module"]) == first
    with pytest.raises(UsageError, match=r"the agent needs vsock, which kernel 6\.1.* has neither"):
        modules.collect(str(tree), ["virtio_mmio", "vsock"])
