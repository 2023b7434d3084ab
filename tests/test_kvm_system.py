"""vmm/kvm/system.py: what /dev/kvm says about itself, and what is said when it cannot be used."""

from __future__ import annotations

import os
import pwd
import re
import resource
import stat
import sys
import tempfile
from pathlib import Path

import pytest

import vmm.kvm
from tests.support import host
from vmm.errors import EXIT_HOST, HostError, KvmError
from vmm.kvm import DEV_KVM, Kvm, constants, hints

needs_kvm = pytest.mark.needs_kvm

NEEDED = """
    IRQCHIP USER_MEMORY SET_TSS_ADDR EXT_CPUID NR_VCPUS NR_MEMSLOTS MP_STATE USER_NMI
    SET_GUEST_DEBUG IRQ_ROUTING IRQFD PIT2 IOEVENTFD SET_IDENTITY_MAP_ADDR ADJUST_CLOCK
    VCPU_EVENTS DEBUGREGS ENABLE_CAP_VM XSAVE XCRS GET_TSC_KHZ MAX_VCPUS SIGNAL_MSI READONLY_MEM
    IOEVENTFD_NO_LENGTH SPLIT_IRQCHIP IOEVENTFD_ANY_LENGTH IMMEDIATE_EXIT GET_MSR_FEATURES
    SYNC_REGS COALESCED_MMIO COALESCED_PIO MANUAL_DIRTY_LOG_PROTECT2 X86_USER_SPACE_MSR
"""
"""Capabilities this project cannot do without; each KVM since Linux 5.10 has them."""
MSR_TSC, MSR_EFER, MSR_STAR, MSR_KVM_SYSTEM_TIME_NEW = 0x10, 0xC0000080, 0xC0000081, 0x4B564D01
MSR_UCODE_REV = 0x8B


@needs_kvm
def test_api_version() -> None:
    with Kvm() as kvm:
        assert kvm.api_version == constants.API_VERSION == 12


@needs_kvm
@pytest.mark.parametrize("name", NEEDED.split())
def test_a_capability_we_need(name: str) -> None:
    with Kvm() as kvm:
        assert kvm.check_extension(getattr(constants, f"CAP_{name}")) > 0


@needs_kvm
def test_an_unknown_capability_is_absent() -> None:
    with Kvm() as kvm:
        assert kvm.check_extension(0x7FFFFFF0) == 0


@needs_kvm
def test_limits_make_sense() -> None:
    with Kvm() as kvm:
        recommended = kvm.check_extension(constants.CAP_NR_VCPUS)
        most = kvm.check_extension(constants.CAP_MAX_VCPUS)
        assert 1 <= recommended <= most <= kvm.check_extension(constants.CAP_MAX_VCPU_ID)
        assert kvm.check_extension(constants.CAP_NR_MEMSLOTS) >= 509


@needs_kvm
def test_the_coalesced_ring_is_at_the_page_the_headers_say() -> None:
    with Kvm() as kvm:
        page = kvm.check_extension(constants.CAP_COALESCED_MMIO)
        assert page == constants.COALESCED_MMIO_PAGE_OFFSET
        assert kvm.vcpu_mmap_size() >= (page + 1) * 4096


@needs_kvm
def test_the_vcpu_mapping_holds_its_structure() -> None:
    with Kvm() as kvm:
        size = kvm.vcpu_mmap_size()
        assert size % 4096 == 0 and size >= 4096 + 4096  # kvm_run, and the PIO data page


@needs_kvm
def test_supported_cpuid() -> None:
    with Kvm() as kvm:
        entries = kvm.supported_cpuid()
    leaves = {(e.function, e.index): e for e in entries}
    vendor = leaves[0, 0]
    name = b"".join(part.to_bytes(4, "little") for part in (vendor.ebx, vendor.edx, vendor.ecx))
    assert name.decode() in Path("/proc/cpuinfo").read_text()
    assert vendor.eax >= 1 and leaves[1, 0].edx & 1  # FPU
    kvm_leaf = leaves[0x40000000, 0]
    parts = (kvm_leaf.ebx, kvm_leaf.ecx, kvm_leaf.edx)
    assert b"".join(part.to_bytes(4, "little") for part in parts) == b"KVMKVMKVM\0\0\0"
    indexed = {e.function for e in entries if e.flags & constants.CPUID_FLAG_SIGNIFCANT_INDEX}
    assert 0x7 in indexed or (0x7, 0) not in leaves
    assert len(leaves) == len(entries)


@needs_kvm
def test_emulated_cpuid() -> None:
    with Kvm() as kvm:
        leaves = {e.function for e in kvm.emulated_cpuid()}
    assert leaves and leaves <= {0, 1, 7, 0x80000001}


@needs_kvm
def test_msr_index_list() -> None:
    with Kvm() as kvm:
        indices = kvm.msr_index_list()
    assert len(set(indices)) == len(indices) > 20
    assert {MSR_TSC, MSR_STAR, MSR_KVM_SYSTEM_TIME_NEW} <= set(indices)


@needs_kvm
def test_feature_msrs() -> None:
    with Kvm() as kvm:
        indices = kvm.msr_feature_index_list()
        assert MSR_UCODE_REV in indices
        values = kvm.feature_msrs(indices)
        assert set(values) <= set(indices) and MSR_UCODE_REV in values


@needs_kvm
def test_feature_msrs_that_cannot_be_read_are_left_out() -> None:
    with Kvm() as kvm:
        assert list(kvm.feature_msrs([0xDEAD, MSR_UCODE_REV, MSR_EFER])) == [MSR_UCODE_REV]
        assert kvm.feature_msrs([]) == {}


@needs_kvm
def test_closing_twice_is_nothing_and_a_vm_lives_on() -> None:
    before = os.listdir("/proc/self/fd")
    with Kvm() as kvm:
        vm = kvm.create_vm()
        kvm.close()
    kvm.close()
    assert vm.check_extension(constants.CAP_IRQCHIP)
    vm.close()
    vm.close()
    assert os.listdir("/proc/self/fd") == before


@needs_kvm
def test_descriptors_are_not_for_children() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        assert not any(os.get_inheritable(fd) for fd in (kvm.fd, vm.fd, vcpu.fd))


@needs_kvm
@pytest.mark.parametrize("loaded", [True, False])
def test_too_many_descriptors_is_told_with_the_mend(
    loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the module with the hints is yet to be read, for which there is none left."""
    if not loaded:
        monkeypatch.delitem(sys.modules, hints.__name__)
        monkeypatch.delattr(vmm.kvm, "hints")
    with Kvm() as kvm:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), hard))
        try:
            with pytest.raises(KvmError, match=r"KVM_CREATE_VM: .*EMFILE.*ulimit -n"):
                kvm.create_vm()
        finally:
            lowest = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(lowest)


# --- a device that cannot be used -----------------------------------------------------------------


def refusal(path: str | Path) -> str:
    """The message when `path` is opened; one line, the host's exit status, nothing left open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(HostError) as caught:
        Kvm(str(path))
    assert os.listdir("/proc/self/fd") == before
    assert caught.value.exit_status == EXIT_HOST
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_a_missing_device(tmp_path: Path) -> None:
    message = refusal(tmp_path / "kvm")
    assert "does not exist; " in message and message.endswith("(`vmm doctor` tells more)")


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_device_that_is_not_kvm(path: str) -> None:
    assert refusal(path) == f"{path} is not a KVM device"


def test_a_file_that_is_not_kvm(tmp_path: Path) -> None:
    (tmp_path / "kvm").write_bytes(b"")
    assert refusal(tmp_path / "kvm").endswith("is not a KVM device")


def test_a_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"cannot open {tmp_path}: Is a directory; ")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a device node")
def test_a_device_without_a_driver() -> None:
    with tempfile.TemporaryDirectory(dir="/dev") as directory:
        path = Path(directory, "kvm")
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(10, 254))
        message = refusal(path)
    assert "no driver" in message and "modprobe" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_no_permission() -> None:
    """As nobody, in a child: the group is named, and what to type."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o711)
        path = Path(directory, "kvm")
        path.write_bytes(b"")
        path.chmod(0o660)
        with pytest.raises(HostError):
            Kvm("/nonexistent")  # nothing may be left to import in the child
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                nobody = pwd.getpwnam("nobody")
                os.setgroups([])
                os.setgid(nobody.pw_gid)
                os.setuid(nobody.pw_uid)
                Kvm(str(path))
            except HostError as err:
                os.write(writer, str(err).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            message = pipe.read().decode()
        os.waitpid(child, 0)
    pattern = rf"no permission on {path} for nobody .*usermod -aG kvm .*"
    assert re.fullmatch(pattern, message), message


@needs_kvm
def test_this_host_is_known() -> None:
    assert DEV_KVM == "/dev/kvm"
    assert host.backend() in ("kvm_intel", "kvm_amd", "kvm_pvm")
