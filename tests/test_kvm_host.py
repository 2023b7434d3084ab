"""vmm/kvm/host.py: back end, nesting and flags, from trees like /sys/module and /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import host as support
from vmm.kvm.host import Host

CPUINFO = """\
processor	: 0
vendor_id	: {vendor}
model name	: A processor
flags		: fpu {flags} lm

processor	: 1
flags		: vmx svm hypervisor
"""


def make(tmp_path: Path, modules: dict[str, bool], vendor: str = "", flags: str = "") -> Host:
    """A host with these modules; True for one that was loaded, False for one built in."""
    for name, loaded in modules.items():
        (tmp_path / "module" / name).mkdir(parents=True)
        if loaded:
            (tmp_path / "module" / name / "initstate").write_text("live\n")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO.format(vendor=vendor, flags=flags))
    return Host(str(tmp_path / "module"), str(cpuinfo))


@pytest.mark.parametrize(
    ("modules", "flags", "backend"),
    [
        ({}, "vmx", ""),
        ({"kvm_intel": True}, "vmx", "kvm_intel"),
        ({"kvm_amd": True}, "svm", "kvm_amd"),
        ({"kvm_pvm": False}, "", "kvm_pvm"),
        ({"kvm_intel": False, "kvm_amd": False}, "svm", "kvm_amd"),
        ({"kvm_intel": False, "kvm_amd": False}, "vmx", "kvm_intel"),
        ({"kvm_intel": False, "kvm_amd": False, "kvm_pvm": True}, "svm", "kvm_pvm"),
        ({"kvm_intel": False, "kvm_amd": False, "kvm_pvm": False}, "", "kvm_pvm"),
    ],
)
def test_the_back_end_is_the_module_in_use(
    tmp_path: Path, modules: dict[str, bool], flags: str, backend: str
) -> None:
    assert make(tmp_path, modules, flags=flags).backend == backend


def test_only_the_first_processor_is_read(tmp_path: Path) -> None:
    plain = make(tmp_path, {}, "GenuineIntel")
    assert (plain.nested, plain.flag, plain.processor) == (False, "", "A processor")


@pytest.mark.parametrize(
    ("vendor", "flags", "module"),
    [
        ("GenuineIntel", "", "kvm_intel"),
        ("AuthenticAMD", "", "kvm_amd"),
        ("HygonGenuine", "svm", "kvm_amd"),
        ("  Shanghai  ", "vmx", "kvm_intel"),
    ],
)
def test_the_module_to_load_is_the_processors(
    tmp_path: Path, vendor: str, flags: str, module: str
) -> None:
    assert make(tmp_path, {}, vendor, flags).module == module


def test_files_that_are_not_there_are_no_failure(tmp_path: Path) -> None:
    nothing = Host(str(tmp_path / "no"), str(tmp_path / "none"))
    assert (nothing.backend, nothing.nested, nothing.flag) == ("", False, "")


@pytest.mark.needs_kvm
def test_this_host_is_what_its_modules_say() -> None:
    here = Host()
    assert here.backend == support.backend()
    assert here.nested == (" hypervisor" in Path("/proc/cpuinfo").read_text())
    assert here.kernel.split()[1] == Path("/proc/sys/kernel/osrelease").read_text().strip()
