"""vmm/testing/initrds.py: what is in an initrd, by cpio(1) and sh(1)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmm.testing import initrds
from vmm.testing.kernels import Kernel


def unpack(archive: bytes, into: Path) -> None:
    subprocess.run(["cpio", "-id", "--quiet", "--no-preserve-owner", "init", "lib*", "etc*"],
                   input=archive, cwd=into, check=True)  # fmt: skip


def test_init_inserts_modules_in_order_with_parameters(full_kernel: Kernel, tmp_path: Path) -> None:
    ram = initrds.build(
        "echo hello",
        kernel=full_kernel,
        modules=["kvm-amd"],
        parameters={"kvm-amd": "nested=0"},
        files={"etc/motd": "hi\n", "etc/passwd": Path("/etc/passwd")},
    )
    unpack(ram.bytes(), tmp_path)
    script = (tmp_path / "init").read_text()
    lines = [line.partition(" || ") for line in script.splitlines()]
    inserted = [rest.split() for _, _, rest in lines if rest.startswith("insmod")]
    assert lines[-3][0] == "[ -d /sys/module/kvm_amd ]"  # the last one, if it is not there yet
    names = [Path(words[1]).stem for words in inserted]
    assert names.index("kvm") < names.index("kvm-amd")
    assert inserted[names.index("kvm-amd")][2] == "nested=0"
    assert all((tmp_path / words[1].lstrip("/")).is_file() for words in inserted)
    assert script.splitlines()[-2:] == ["echo hello", "poweroff -f"]
    subprocess.run(["sh", "-n", tmp_path / "init"], check=True)
    assert (tmp_path / "etc/motd").read_text() == "hi\n"
    assert (tmp_path / "etc/passwd").read_bytes() == Path("/etc/passwd").read_bytes()


def test_modules_without_a_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="need a kernel"):
        initrds.build("", modules=["virtio_net"])


def test_busybox_is_statically_linked() -> None:
    """A dynamic one has an interpreter (PT_INTERP) that the initrd would lack."""
    assert b"/ld-linux" not in Path(initrds.busybox()).read_bytes()[:4096]
