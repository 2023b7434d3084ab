"""vmm/doctor/examination.py: the conclusions, on this host and drawn from given findings."""

from __future__ import annotations

import os
import threading

import pytest

from tests.support import host as support
from vmm.doctor import Problem, Report, examine
from vmm.kvm.host import Host


@pytest.mark.needs_kvm
def test_this_host() -> None:
    report = examine()
    assert report.usable
    assert report.api_version == 12
    assert os.path.isdir(f"/sys/module/{report.host.backend}")
    assert report.runs_linux == support.runs_linux()
    assert report.as_dict()["syscall_enters_cpl0"] is support.runs_linux()


@pytest.mark.native_only
def test_pvm_interprets_kernel_code_and_says_what_to_do() -> None:
    report = examine()
    assert report.interpreted is True
    assert report.syscall_enters_cpl0 is False
    assert report.verdict.startswith("Only small guests run here (kvm_pvm")
    assert "VT-x or AMD-V" in report.problems[-1].mend


@pytest.mark.needs_linux_kvm
def test_hardware_has_no_problems() -> None:
    report = examine()
    assert report.interpreted is False
    assert report.problems == []
    assert report.verdict.startswith("Stock Linux kernels run here (kvm_")


@pytest.mark.needs_kvm
def test_nothing_is_left_behind() -> None:
    examine()
    descriptors, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    examine()
    # What another test left may go meanwhile.
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize(
    ("cpl0", "cpl3", "fault", "runs", "words"),
    [
        (3000.0, 3000.0, "", True, "Stock Linux kernels run here"),
        (250.0, 460.0, "", True, "Stock Linux kernels run here"),
        (2.0, 7000.0, "", False, "guest kernel code is interpreted (2.0 M insn/s)"),
        (3000.0, 3000.0, "CS is 0x33", False, "SYSCALL does not enter CPL0"),
        (2.0, 7000.0, "CS is 0x33", False, "interpreted (2.0 M insn/s) and SYSCALL"),
        (None, None, None, False, "the test guests failed"),
        (3000.0, 3000.0, None, False, "the test guests failed"),
    ],
)
def test_the_verdict_follows_from_what_was_measured(
    cpl0: float | None, cpl3: float | None, fault: str | None, runs: bool, words: str
) -> None:
    report = Report("/dev/kvm", Host())
    report.usable = True
    report.cpl0_mips, report.cpl3_mips, report.syscall_fault = cpl0, cpl3, fault
    assert report.runs_linux is runs
    assert words in report.verdict
    assert report.verdict.endswith(".") and "\n" not in report.verdict


def test_an_unusable_device_runs_nothing_whatever_was_measured() -> None:
    report = Report("/dev/kvm", Host())
    report.problems = [Problem("the disk is on fire", "water"), Problem("second", "")]
    report.cpl0_mips = report.cpl3_mips = 3000.0
    report.syscall_fault = ""
    assert not report.runs_linux
    assert report.verdict == "Nothing runs here: the disk is on fire."
