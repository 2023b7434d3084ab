"""tools/stranger: all that a person does first, as a user made for it, from a wheel."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import netns, stranger, tiny
from vmm.testing.kernels import Kernel

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a user"),
]
SCRIPT = stranger.ROOT / "tools" / "stranger"


def run(directory: Path, *more: str) -> list[str]:
    """The steps that went well; nothing may be left of the user."""
    before = {entry.pw_name for entry in pwd.getpwall()}
    done = subprocess.run(
        [sys.executable, SCRIPT, *stranger.arguments(directory), *more],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {entry.pw_name for entry in pwd.getpwall()} == before
    assert done.stderr == ""
    print(done.stdout)
    return [line.split(": ")[1] for line in done.stdout.splitlines() if ": ok (" in line]


@pytest.mark.native_only
def test_where_small_guests_run(tmp_path: Path) -> None:
    steps = run(tmp_path, "--guest", tiny.kernel(tmp_path, tiny.ECHO))
    assert steps[-6:] == ["doctor", "run", "--net user", "--fs", "snapshot", "project"]
    assert steps[0] == "install"


@pytest.mark.needs_linux_kvm
def test_where_linux_runs(
    tmp_path: Path, cloud_kernel: Kernel, make_initrd: Callable[..., Path]
) -> None:
    # Without vmm-exit: in a restored machine QEMU's TCG refuses its port, for it takes a task state
    # segment for one only while that is not busy (helper_check_io), which KVM always says it is.
    initrd = make_initrd('echo ready; read -r line; echo "[$line]"')
    boot = ["--linux", str(cloud_kernel.vmlinuz), "--initrd", str(initrd)]
    if os.environ.get(stranger.VENV) is None:
        steps = run(tmp_path, *boot)
    else:
        # passt looks for an interface with a route, which this lane has not.
        with netns.network_namespace():
            netns.ip("tuntap add out mode tap")
            netns.ip("address add 192.0.2.2/24 dev out")
            netns.ip("link set out up")
            netns.ip("route add default via 192.0.2.1 dev out")
            steps = run(tmp_path, *boot)
    assert steps[-5:] == ["doctor", "run", "exec --root /, --fs, --net user", "snapshot", "project"]


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_step_that_goes_wrong_is_told(tmp_path: Path) -> None:
    guest = tiny.kernel(tmp_path, tiny.prints(b"ready\n") + tiny.exits(3))
    done = subprocess.run(
        [sys.executable, SCRIPT, "--venv", sys.prefix, "--guest", guest],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "stranger: version: FAILED: " in done.stdout or "stranger: run: FAILED: " in done.stdout
