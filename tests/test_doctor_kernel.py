"""vmm/doctor/kernel.py: `vmm doctor --kernel FILE` and `--config FILE`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import build_tree
from vmm.doctor.kernel import KernelReport, look_at_config, look_at_kernel, render
from vmm.testing.kernels import Kernel
from vmm.testing.tiny import TinyKernel


def states(report: KernelReport) -> dict[str, str]:
    return {row.symbol.removeprefix("CONFIG_"): row.state for row in report.rows}


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmm", "doctor", *words], capture_output=True, text=True, check=False
    )


def test_debians(cloud_kernel: Kernel, tmp_path: Path) -> None:
    report = look_at_kernel(str(cloud_kernel.vmlinuz))
    found = states(report)
    assert (found["VIRTIO_NET"], found["VIRTIO_FS"], found["PACKET"]) == ("m", "m", "y")
    assert report.release == cloud_kernel.release
    assert report.modules == str(cloud_kernel.modules) and not report.missing
    assert render(report).endswith("vmm exec --root DIR works with it\n")
    # Alone it may have them as modules or not at all.
    shutil.copy(cloud_kernel.vmlinuz, tmp_path / "vmlinuz")
    report = look_at_kernel(str(tmp_path / "vmlinuz"))
    assert (states(report)["VIRTIO_FS"], states(report)["PACKET"]) == ("?", "?")
    assert report.apart and not report.missing
    assert "or given with --modules" in " ".join(render(report).split())


@pytest.mark.timeout(60, func_only=True)
def test_what_is_missing(tiny_kernel: TinyKernel) -> None:
    lacks = ["CONFIG_VIRTIO_VSOCKETS", "CONFIG_VIRTIO_FS", "CONFIG_OVERLAY_FS"]
    for option, path in (("--kernel", tiny_kernel.bzimage), ("--config", tiny_kernel.config)):
        done = doctor(option, str(path), "--json")
        assert json.loads(done.stdout)["missing"] == lacks
        assert (done.returncode, done.stderr) == (1, "")
    text = render(look_at_config(str(tiny_kernel.config)))
    assert "build it with CONFIG_VIRTIO_VSOCKETS" in " ".join(text.split())
    assert max(map(len, text.splitlines()[3:])) <= 80


def test_symbols_one_by_one(tmp_path: Path) -> None:
    config = tmp_path / ".config"
    names = [
        *("VIRTIO_PCI", "VIRTIO_VSOCKETS", "VIRTIO_FS", "OVERLAY_FS", "BLK_DEV_INITRD", "TMPFS"),
        *("BINFMT_ELF", "DEVTMPFS", "PROC_FS"),
    ]
    config.write_text("".join(f"CONFIG_{name}=y\n" for name in names))
    assert look_at_config(str(config)).missing == []  # a bus is enough
    for name in names:
        config.write_text("".join(f"CONFIG_{other}=y\n" for other in names if other != name))
        wanted = "VIRTIO_MMIO" if name == "VIRTIO_PCI" else name
        assert look_at_config(str(config)).missing == [f"CONFIG_{wanted}"]


def test_a_build_tree(cloud_kernel: Kernel, tmp_path: Path) -> None:
    top = build_tree.make(tmp_path / "linux", cloud_kernel)
    report = look_at_kernel(str(top / "arch/x86/boot/bzImage"))
    assert (report.source, report.modules) == (str(top / ".config"), str(top))
    assert states(report)["VIRTIO_FS"] == "m"


def test_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello\n")
    for words, line in (
        (["--kernel", "/no/such"], "kernel /no/such: no such file"),
        (["--kernel", str(tmp_path)], "is a directory"),
        (["--kernel", str(tmp_path / "text")], "is no Linux that could be looked into"),
        (["--config", str(tmp_path / "text")], r"is no kernel's .config"),
        (["--config", "a", "--kernel", "b"], "--kernel and --config: give one"),
    ):
        done = doctor(*words)
        assert line in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert (done.returncode, done.stdout) == (2, "")
