"""vmm/doctor/parts.py: what is beside KVM, with every mend of what can be taken away here."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vmm.doctor import parts
from vmm.doctor.parts import HOST, LIBRARY, PROGRAM, Part

PROGRAMS = ("virtiofsd", "qemu-storage-daemon", "passt", "qemu-img", "busybox")


def named(name: str, found: list[Part]) -> Part:
    return next(part for part in found if part.name == name)


def doctor(before: str = "", **env: str) -> dict[str, dict[str, str | bool]]:
    """The parts in `vmm doctor --json`, after the shell has done `before`."""
    done = subprocess.run(
        ["sh", "-c", f'{before}\nexec "$@"', "sh", sys.executable, "-m", "vmm", "doctor", "--json"],
        env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 69), done.stderr
    parts: dict[str, dict[str, str | bool]] = json.loads(done.stdout)["parts"]
    return parts


def test_every_part_has_a_purpose_and_a_mend_where_it_is_not_there() -> None:
    found = parts.parts()
    assert {part.kind for part in found} == {"built in", LIBRARY, PROGRAM, HOST}
    assert len({part.name for part in found}) == len(found)
    for part in found:
        assert part.purpose and part.there != bool(part.mend), part.name
        assert "\n" not in part.value + part.purpose + part.mend
        if part.there:
            assert part.value


def test_programs_are_found_with_their_versions(tmp_path: Path) -> None:
    """Each once said something else: in another line, under another name, with no version."""
    said = {
        "virtiofsd": "virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7)",
        "qemu-storage-daemon": "qemu-storage-daemon version 9.1.0\nCopyright (c) 2003-2024",
        "passt": "passt 2025_02_17.a1e48a0-1\nCopyright Red Hat",
        "qemu-img": "qemu-img version 10.0.2",
        "busybox": "BusyBox v1.35.0 (Debian 1:1.35.0-4) multi-call binary.",
    }
    for name, text in said.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{text}'\n")
        path.chmod(0o755)
    found = doctor(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert [str(found[name]["value"]) for name in PROGRAMS] == [
        f"{version} ({tmp_path}/{name})"
        for name, version in zip(
            PROGRAMS, ("7.2.22", "9.1.0", "2025_02_17.a1e48a0-1", "10.0.2", "1.35.0"), strict=True
        )
    ]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 1", "of unknown version"),
        ("head -c 9000000 /dev/zero", "of unknown version"),
        ("sleep 60 & wait", "cannot be run: it does not answer"),
    ],
)
def test_programs_that_are_not_as_they_should_be(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "passt"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(parts, "VERSION_SECONDS", 0.5)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert named("passt", parts.programs()).value == f"{says} ({program})"


def test_programs_that_are_not_there_name_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = parts.programs()
    assert "apt-get install passt" in named("passt", found).mend
    assert "apt-get install qemu-system-common" in named("qemu-storage-daemon", found).mend


def test_packages_that_mends_name_are_debians() -> None:
    lists = Path("/var/lib/apt/lists")
    if not lists.is_dir() or not any(lists.glob("*Packages*")):
        pytest.skip("apt has no lists here")
    names = {"qemu-system-common", "qemu-utils", "passt", "busybox-static", "gcc", "libc6-dev"}
    known = subprocess.run(
        ["apt-cache", "pkgnames"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert names <= set(known)
    text = Path(parts.__file__).read_text()
    assert all(f'"{name}"' in text or f" {name}" in text for name in names)


def test_a_low_limit_of_open_files_has_a_mend_that_works() -> None:
    part = doctor("ulimit -Sn 256")["open files"]
    assert not part["there"] and str(part["value"]).startswith("256 (at most ")
    mended = doctor(f"ulimit -Sn 256; {part['mend']}")["open files"]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert mended["there"] and str(mended["value"]).startswith(f"{hard} ")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to raise a hard limit")
def test_a_low_hard_limit_names_the_shell_that_has_it() -> None:
    part = doctor("ulimit -n 256")["open files"]
    assert not part["there"]
    assert f"prlimit --nofile=65536 --pid {os.getpid()}" in str(part["mend"])


@pytest.mark.parametrize("path", ["/dev/net/tun", "/dev/vhost-net", "/dev/vhost-vsock"])
def test_a_device_is_there_if_it_opens(path: str) -> None:
    part = named(path, parts.host())
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    except OSError as err:
        assert not part.there and part.value == err.strerror
    else:
        assert part.there and part.value.startswith("opens")


def test_a_device_that_is_not_there_names_its_module(tmp_path: Path) -> None:
    part = parts._device(str(tmp_path / "vhost-net"), "vhost_net", "frames")
    assert not part.there and "modprobe vhost_net" in part.mend


def test_libraries_that_are_missing_name_an_extra_that_has_them() -> None:
    """The extra is one of the project's own (pyproject.toml)."""
    import importlib.metadata

    extras = importlib.metadata.metadata(parts.DISTRIBUTION).get_all("Provides-Extra")
    assert extras is not None
    for name, _, package in parts.LIBRARIES:
        part = parts._library((f"no-such-{name}", "nothing", package))
        assert part.mend == f"pip install {package}" and not part.there
        extra = package.strip("'").removeprefix(parts.DISTRIBUTION).strip("[]")
        assert extra in ("", *extras)
    assert named("cffi", parts.pieces()).value == importlib.metadata.version("cffi")


def test_version_tells_what_is_built_in() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "version", "--json"], capture_output=True, check=True
    )
    told = json.loads(done.stdout)
    assert told["executable"] == sys.executable and told["parts"]["cffi"]["there"]
    assert {"version", "python", "where"} <= told.keys()
    text = subprocess.run(
        [sys.executable, "-m", "vmm", "version"], capture_output=True, text=True, check=True
    ).stdout
    assert text.startswith(f"vmm {told['version']}\n") and "C path" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_run_gives_the_doctors_mend() -> None:
    """Of a device this user may not open: the same words from both, and they help."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o711)
        path = Path(directory, "vhost-net")
        path.write_bytes(b"")
        path.chmod(0o600)
        code = (
            "import os, sys; from vmm.doctor import parts; from vmm.virtio.vhost import Vhost\n"
            "import vmm.kvm.access, vmm.kvm.host, grp, pwd\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "print(parts._device(sys.argv[1], 'vhost_net', 'frames').mend)\n"
            "try: Vhost(sys.argv[1], '--net tap')\n"
            "except Exception as err: print(err)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
        )
        mend, said = done.stdout.splitlines()
        assert said == f"--net tap: {path}: Permission denied; {mend}, or leave vhost out"
        command = mend.removeprefix("as root: ").removeprefix("sudo ").partition(" (until")[0]
        subprocess.run(command.split(), check=True)
        opened = [
            sys.executable,
            "-c",
            f"import os; os.setuid(65534); os.open('{path}', os.O_RDWR)",
        ]
        assert subprocess.run(opened, check=False).returncode == 0


@pytest.mark.parametrize("there", [True, False])
def test_what_the_sandbox_is_made_of(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmm.sandbox import landlock, seccomp

    if not there:
        monkeypatch.setattr(landlock, "_abi", 0)
        monkeypatch.setattr(seccomp, "available", lambda action=0: False)
    found = {part.name: part for part in parts.host()}
    files, calls = found["Landlock"], found["seccomp"]
    if there:
        version = landlock.abi()
        assert files.value.startswith(f"ABI {version} (") if version else files.mend
        assert calls.value.startswith("filters") == seccomp.available()
    else:
        assert files.value == "not in this kernel, or off" and "lsm=" in files.mend
        assert calls.value == "no filters" and "CONFIG_SECCOMP_FILTER" in calls.mend
    assert "--sandbox" in files.purpose and "--sandbox" in calls.purpose


@pytest.mark.parametrize("there", [True, False])
def test_a_cgroup_is_tried(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmm.sandbox import cgroup

    if not there:
        monkeypatch.setattr(cgroup, "directory", lambda: "/proc/self")
    try:
        cgroup.Cgroup("probe").close()
        possible = True
    except OSError:
        possible = False
    found = {part.name: part for part in parts.host()}["cgroups"]
    if possible:
        assert (found.value, found.mend) == ("one can be made for each helper", "")
    else:
        assert found.value.startswith("none can be made (") and "systemd-run" in found.mend
    assert possible <= there
