"""vmm/testing/kernels.py, with packages made by dpkg-deb and with Debian's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.errors import BootError, HostError, UsageError
from vmm.testing.kernels import Kernel, cache_directory, debian_kernel


def make_deb(directory: Path, release: str, version: str, content: str = "kernel") -> None:
    """Put a kernel package with one file of each kind into `directory`."""
    tree = directory / ".tree"
    control = f"Package: linux-image-{release}\nVersion: {version}\nArchitecture: amd64\n"
    control += "Maintainer: Nobody <nobody@example.org>\nDescription: for a test\n"
    for path, text in {
        "DEBIAN/control": control,
        f"boot/vmlinuz-{release}": content,
        f"lib/modules/{release}/modules.builtin": "",
    }.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    target = directory / f"linux-image-{release}_{version}_amd64.deb"
    subprocess.run(["dpkg-deb", "-b", tree, target], check=True, capture_output=True)
    subprocess.run(["rm", "-r", tree], check=True)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache's directory of kernels."""
    monkeypatch.setenv("VMM_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    return tmp_path / "kernels"


def test_a_package_is_unpacked_once_and_found_again(kernels: Path) -> None:
    make_deb(kernels, "6.1.0-9-cloud-amd64", "6.1.27-1")
    kernel = debian_kernel("cloud-amd64")
    assert kernel.release == "6.1.0-9-cloud-amd64"
    assert kernel.name == "linux-image-6.1.0-9-cloud-amd64_6.1.27-1_amd64"
    assert kernel.directory == kernels / kernel.name
    assert kernel.vmlinuz.read_text() == "kernel"
    assert kernel.modules == kernel.directory / "lib/modules/6.1.0-9-cloud-amd64"
    assert os.listdir(kernels) == [kernel.name]
    assert debian_kernel("cloud-amd64", download=False) == kernel


def test_the_newest_of_the_flavour_is_taken(kernels: Path) -> None:
    for release, version in (
        ("6.1.0-9-amd64", "6.1.27-1"),
        ("6.1.0-10-amd64", "6.1.38-1"),
        ("6.1.0-11-cloud-amd64", "6.1.40-1"),
    ):
        make_deb(kernels, release, version)
    assert debian_kernel("amd64").release == "6.1.0-10-amd64"
    assert debian_kernel("cloud-amd64").release == "6.1.0-11-cloud-amd64"


def test_releases_without_an_abi_number_are_known(kernels: Path) -> None:
    make_deb(kernels, "6.12.48+deb13-cloud-amd64", "6.12.48-1")
    assert debian_kernel("cloud-amd64").release == "6.12.48+deb13-cloud-amd64"


def test_a_damaged_cache_entry_is_named(kernels: Path) -> None:
    make_deb(kernels, "6.1.0-9-amd64", "6.1.27-1")
    debian_kernel("amd64").vmlinuz.unlink()
    with pytest.raises(BootError, match=r"vmlinuz-6\.1\.0-9-amd64 is missing; remove"):
        debian_kernel("amd64")


def test_a_damaged_package_leaves_nothing(kernels: Path) -> None:
    (kernels / "linux-image-6.1.0-9-amd64_6.1.27-1_amd64.deb").write_text("not a package")
    with pytest.raises(HostError, match="dpkg"):
        debian_kernel("amd64")
    assert [path for path in kernels.iterdir() if path.is_dir()] == []


def test_without_a_download_the_command_to_fetch_it_is_told(kernels: Path) -> None:
    with pytest.raises(HostError, match=r"python\S* -m vmm\.testing\.kernels cloud-amd64"):
        debian_kernel("cloud-amd64", download=False)


def test_without_apt_a_person_is_told_what_to_do(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match=r"no apt-get here .* put Debian's linux-image-"):
        debian_kernel("amd64")


def test_an_unknown_flavour_is_refused_by_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmm.testing.kernels", "rt"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "kernels: kernel flavour 'rt': choose from cloud-amd64, amd64\n"
    with pytest.raises(UsageError):
        debian_kernel("rt")


def test_the_cache_is_where_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("VMM_CACHE", raising=False)
    assert cache_directory() == Path("/x/vmm")
    monkeypatch.setenv("VMM_CACHE", "/y")
    assert cache_directory() == Path("/y")


def test_debians_kernels_have_an_elf_kernel_inside(
    cloud_kernel: Kernel, full_kernel: Kernel
) -> None:
    for kernel in (cloud_kernel, full_kernel):
        head = kernel.vmlinux().read_bytes()[:20]
        assert head[:5] == b"\x7fELF\x02"
        assert head[18] == 0x3E  # EM_X86_64
