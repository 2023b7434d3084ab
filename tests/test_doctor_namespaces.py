"""vmm/doctor/namespaces.py: whether user namespaces work, and what stands against them."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.doctor import namespaces
from vmm.kvm.access import as_root


def test_it_is_as_unshare_finds_it() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    made = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
    assert (namespaces.trouble() == "") == (made.returncode == 0)


def test_nothing_is_left_of_the_attempt() -> None:
    before = set(os.listdir("/proc/self/fd")), os.readlink("/proc/self/ns/user")
    namespaces.trouble()
    assert set(os.listdir("/proc/self/fd")) <= before[0]
    assert os.readlink("/proc/self/ns/user") == before[1]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a namespace with a limit")
def test_a_limit_of_none_is_found_and_its_mend_works() -> None:
    """In a user namespace of its own, whose limit is its own too: the host keeps its."""
    code = (
        "from vmm.doctor import namespaces as n; import subprocess as s; "
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0'); "
        "print(n.trouble()); mends = n.limits(); print(mends); "
        "path, _, value = mends[0].removeprefix('sysctl ').partition('='); "
        "open('/proc/sys/' + path.replace('.', '/'), 'w').write(value); print(n.trouble() or 'ok')"
    )
    done = subprocess.run(
        ["unshare", "-Urmpf", "--mount-proc", sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "max_user_namespaces" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no such namespace here: {done.stderr.splitlines()[-1]}")
    trouble, mends, mended = done.stdout.splitlines()
    assert trouble == "unshare: No space left on device" and mended == "ok", done
    assert "sysctl user.max_user_namespaces=15000" in mends


@pytest.mark.parametrize(
    ("path", "value", "mend"),
    [
        ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=15000"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("user/max_user_namespaces", "15000", ""),
        ("kernel/unprivileged_userns_clone", "1", ""),
    ],
)
def test_settings_and_their_mends(path: str, value: str, mend: str, tmp_path: Path) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(f"{value}\n")
    assert namespaces.limits(str(tmp_path)) == ([as_root(mend)] if mend else [])


@pytest.mark.parametrize("by", ["name", "number"])
def test_subordinate_ids(by: str, tmp_path: Path) -> None:
    uid = os.geteuid()
    name = pwd.getpwuid(uid).pw_name if by == "name" else str(uid)
    file = tmp_path / "subuid"
    assert namespaces.subordinate_ids(str(file)) == "no subordinate ids"
    file.write_text(f"other:1:2\nbroken\n{name}:100000:65536\n")
    assert namespaces.subordinate_ids(str(file)) == "65536 subordinate ids from 100000"
