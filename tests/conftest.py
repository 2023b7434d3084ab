"""Fixtures and markers for every test.

Markers say what a test needs; a test without one needs no KVM.

    needs_kvm        any /dev/kvm
    needs_linux_kvm  a KVM in which stock Linux reaches user space (kvm_intel, kvm_amd)
    native_only      the PVM back end itself (/dev/kvm of kvm_pvm)
    one_lane         (beside needs_kvm) the back end makes no difference: where the native lane has
                     a KVM, the nested lane, twenty times slower, leaves it to that

Under plain `pytest`, a test whose need is not met is skipped, with the reason. tests/lanes (that is
`make test`) sets VMM_LANE, and each lane then takes only the tests that are for it.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import host
from vmm.errors import HostError
from vmm.testing import initrds
from vmm.testing.kernels import Kernel, debian_kernel
from vmm.testing.tiny import TinyKernel
from vmm.testing.tiny import tiny_kernel as build_tiny_kernel

MARKERS = {
    "needs_kvm": "needs /dev/kvm, whichever back end",
    "needs_linux_kvm": "needs a KVM in which stock Linux reaches user space (VT-x or AMD-V)",
    "native_only": "needs the PVM back end",
    "one_lane": "runs in one lane of those that have a KVM",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    # A shell's background job ignores these, and so would all it starts: what the tests start
    # is to find them as a person's command does.
    for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(signum) is signal.SIG_IGN:
            default = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
            signal.signal(signum, default)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lane = host.lane()
    kept, dropped = [], []
    for item in items:
        needs = {mark.name for mark in item.iter_markers()} & MARKERS.keys()
        if not host.for_lane(lane, needs):
            dropped.append(item)
            continue
        kept.append(item)
        reason = host.unmet(needs)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vmm keeps for its user (a key for snapshots) is kept for these tests only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def cloud_kernel() -> Kernel:
    """Debian's cloud kernel: .vmlinuz (bzImage, LZ4), .vmlinux() (ELF), .modules, .release."""
    return debian_kernel("cloud-amd64")


@pytest.fixture(scope="session")
def full_kernel() -> Kernel:
    """Debian's full amd64 kernel (XZ)."""
    return debian_kernel("amd64")


@pytest.fixture(scope="session")
def tiny_kernel(request: pytest.FixtureRequest) -> TinyKernel:
    """A small 6.1 kernel with virtio built in: .vmlinux (ELF), .bzimage (gzip), .config.

    Built on first use, in minutes: mark a test that needs it `timeout(N, func_only=True)`, which
    leaves fixtures out.
    """
    with contextlib.suppress(HostError):
        return build_tiny_kernel(build=False)
    # Whoever watches should see why nothing else happens for so long.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return build_tiny_kernel(tell=True)


@pytest.fixture
def make_initrd(tmp_path: Path) -> Callable[..., Path]:
    """Factory: `make_initrd(script, modules=[...], kernel=cloud_kernel, files={...})` -> path.

    See vmm.testing.initrds.build for what is in it.
    """
    numbers = itertools.count(1)

    def make(script: str, **options: object) -> Path:
        path = tmp_path / f"initrd-{next(numbers)}.img"
        initrds.build(script, **options).write(path)  # type: ignore[arg-type]
        return path

    return make


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A disk of 8 MiB whose blocks are 4 KiB; a file `backing` is under it."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(8 << 20))
    made = subprocess.run(
        ["losetup", "--sector-size", "4096", "--find", "--show", str(backing)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)
