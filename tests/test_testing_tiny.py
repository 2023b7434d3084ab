"""vmm/testing/tiny.py, with source packages made here that build in no time, and the real one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import tiny as guests
from vmm.boot.elf import Elf
from vmm.boot.file import InputFile
from vmm.boot.source import FileSource
from vmm.errors import HostError
from vmm.layout import MIB
from vmm.memory import GuestMemory
from vmm.testing import tiny
from vmm.testing.tiny import TinyKernel, tiny_kernel

MAKEFILE = """\
tinyconfig: ; : > .config
vmm.config: tinyconfig ; cat kernel/configs/vmm.config >> .config
vmlinux: ; @sleep 0.3; echo "  CC      init/main.o"; cp {elf} vmlinux; echo built >> {record}
bzImage: vmlinux ; mkdir -p arch/x86/boot; echo image > arch/x86/boot/bzImage
"""

needs_build_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in (*tiny.TOOLS, "dpkg-deb")),
    reason="building a kernel needs tools that are not installed",
)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache's directory of kernels."""
    monkeypatch.setenv("VMM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "kernels").mkdir(parents=True)
    return tmp_path / "cache" / "kernels"


def make_source(kernels: Path, makefile: str, version: str = "6.1.9-1") -> Path:
    """Put a source package into `kernels`; the file in which its builds are recorded."""
    work = kernels.parent / "work"
    source, package = work / "linux-source-6.1", work / "package"
    for directory in (source / "kernel" / "configs", package / "DEBIAN", package / "usr" / "src"):
        directory.mkdir(parents=True)
    record = kernels.parent / "record"
    (source / "Makefile").write_text(makefile.format(elf="/bin/true", record=record))
    (package / "DEBIAN" / "control").write_text(
        f"Package: linux-source-6.1\nVersion: {version}\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: for a test\n"
    )
    archive = package / "usr" / "src" / "linux-source-6.1.tar.xz"
    subprocess.run(["tar", "-cJf", archive, "-C", work, source.name], check=True)
    target = kernels / f"linux-source-6.1_{version}_all.deb"
    subprocess.run(["dpkg-deb", "-b", package, target], check=True, capture_output=True)
    shutil.rmtree(work)
    return record


def names(kernels: Path) -> set[str]:
    return {path.name for path in kernels.iterdir()} - {".tiny.lock"}


@needs_build_tools
def test_it_is_built_once_and_found_again(
    kernels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_source(kernels, MAKEFILE)
    kernel = tiny_kernel()
    assert kernel.version == "6.1.9-1"
    assert kernel.directory == kernels / f"linux-tiny-6.1.9-1-{tiny.INPUTS}"
    assert kernel.vmlinux.read_bytes()[:4] == b"\x7fELF"
    assert kernel.bzimage.read_text() == "image\n"
    assert kernel.config.read_text() == tiny.CONFIG
    # The sources, which are large, are gone.
    assert names(kernels) == {kernel.directory.name, "linux-source-6.1_6.1.9-1_all.deb"}
    assert tiny_kernel(build=False) == tiny_kernel() == kernel
    assert record.read_text() == "built\n"
    assert capsys.readouterr() == ("", ""), "quiet where no terminal is"


def test_the_newest_of_the_same_inputs_is_taken(kernels: Path) -> None:
    for name in (
        f"linux-tiny-6.1.9-1-{tiny.INPUTS}",
        f"linux-tiny-6.1.27-1-{tiny.INPUTS}",
        "linux-tiny-6.1.30-1-000000000000",
    ):
        (kernels / name).mkdir()
    assert tiny_kernel(build=False).version == "6.1.27-1"


def test_without_a_build_the_command_for_it_is_told(kernels: Path) -> None:
    with pytest.raises(HostError, match=r"python\S* -m vmm\.testing\.tiny$"):
        tiny_kernel(build=False)


def test_missing_tools_are_named_with_their_packages(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in set(tiny.TOOLS) - {"flex", "xz"}:
        (tmp_path / tool).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="needs flex, xz-utils; install: apt install flex xz-utils"):
        tiny_kernel()
    (tmp_path / "gcc").unlink()
    (tmp_path / "gcc").symlink_to("/bin/false")  # as one that finds no gelf.h
    with pytest.raises(HostError, match="apt install flex libelf-dev xz-utils"):
        tiny_kernel()


@needs_build_tools
def test_a_failed_build_tells_the_end_of_its_log(kernels: Path) -> None:
    wrong = "vmlinux: ; @echo kernel/fork.c: something is wrong; exit 1\nbzImage: vmlinux"
    make_source(kernels, MAKEFILE.split("vmlinux:")[0] + wrong)
    with pytest.raises(HostError) as caught:
        tiny_kernel()
    log = kernels / "linux-tiny.log"
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"building linux-tiny: make vmlinux bzImage ended with status 2; the log is {log}, its end:"
    )
    assert "kernel/fork.c: something is wrong" in lines
    assert log.exists()
    assert names(kernels) == {log.name, "linux-source-6.1_6.1.9-1_all.deb"}


@needs_build_tools
def test_options_the_sources_do_not_take_are_named(kernels: Path) -> None:
    make_source(kernels, MAKEFILE.replace("cat ", "grep -v PVH "))
    with pytest.raises(HostError, match="came out without CONFIG_PVH=y;"):
        tiny_kernel()


@needs_build_tools
def test_a_damaged_source_package_is_an_error(kernels: Path) -> None:
    (kernels / "linux-source-6.1_6.1.9-1_all.deb").write_text("not a package")
    with pytest.raises(HostError, match="dpkg -x"):
        tiny_kernel()
    assert names(kernels) == {"linux-source-6.1_6.1.9-1_all.deb"}


@needs_build_tools
def test_of_two_at_once_one_builds(kernels: Path) -> None:
    record = make_source(kernels, MAKEFILE)
    command = [sys.executable, "-m", "vmm.testing.tiny"]
    both = [
        subprocess.Popen(command, env=guests.environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert set(outputs) == {f"{kernels}/linux-tiny-6.1.9-1-{tiny.INPUTS}/vmlinux\n"}
    assert record.read_text() == "built\n"


@needs_build_tools
def test_what_a_killed_builder_left_goes(kernels: Path) -> None:
    slow = MAKEFILE.replace("sleep 0.3", "echo started >> {record}; exec sleep 60")
    record = make_source(kernels, slow)
    command = [sys.executable, "-m", "vmm.testing.tiny"]
    with subprocess.Popen(command, env=guests.environment(), start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not record.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, 9)
    assert any(name.startswith(".tiny-") for name in names(kernels))
    (kernels / "linux-source-6.1_6.1.9-1_all.deb").unlink()
    make_source(kernels, MAKEFILE)
    kernel = tiny_kernel()
    assert names(kernels) == {kernel.directory.name, "linux-source-6.1_6.1.9-1_all.deb"}


@needs_build_tools
def test_a_terminal_is_told_what_happens(kernels: Path) -> None:
    make_source(kernels, MAKEFILE)
    master, slave = os.openpty()
    try:
        subprocess.run(
            [sys.executable, "-m", "vmm.testing.tiny"],
            env=guests.environment(), stdout=subprocess.DEVNULL, stderr=slave, check=True,
        )  # fmt: skip
        said = os.read(master, 65536).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert said.startswith("tiny kernel: unpacking linux-source-6.1_6.1.9-1_all.deb\r\n")
    assert "tiny kernel: compiling" in said
    assert said.endswith(f"linux-tiny-6.1.9-1-{tiny.INPUTS}\r\n")


def test_the_command_takes_no_arguments() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmm.testing.tiny", "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "tiny: x: this takes no arguments\n")


# --- the real one ---------------------------------------------------------------------------------


@pytest.mark.timeout(300, func_only=True)
def test_the_kernel_can_start_every_way(tiny_kernel: TinyKernel) -> None:
    with InputFile(str(tiny_kernel.vmlinux), "kernel") as file:
        elf = Elf(FileSource(file))
        with GuestMemory(64 * MIB) as memory:
            elf.load(memory)
        assert elf.is_linux
        assert elf.has_entry_64
        assert elf.pvh_entry is not None
        assert elf.loads(elf.pvh_entry)
    assert tiny_kernel.bzimage.read_bytes()[0x202:0x206] == b"HdrS"
    config = tiny_kernel.config.read_text().splitlines()
    assert set(tiny.CONFIG.splitlines()) <= set(config)
    assert not [line for line in config if line.endswith("=m")]
