"""The KVM that tests with the marker needs_linux_kvm get."""

from __future__ import annotations

import fcntl
import os

import pytest

from tests.support import host

KVM_GET_API_VERSION = 0xAE00


@pytest.mark.needs_linux_kvm
def test_it_is_hardware_virtualization_with_the_stable_api() -> None:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0) == 12
    finally:
        os.close(kvm)
    if host.lane() == "nested":
        assert host.backend() == "kvm_amd"
    else:
        assert host.backend() in ("kvm_amd", "kvm_intel")


@pytest.mark.parametrize(("native", "taken"), [("kvm_pvm", False), ("", True)])
def test_one_lane_is_enough(native: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMM_NATIVE_KVM", native)
    assert host.for_lane("nested", {"needs_kvm", "one_lane"}) is taken
    assert host.for_lane("nested", {"needs_kvm"})
    assert host.for_lane("native", {"needs_kvm", "one_lane"}) is (host.backend() is not None)
